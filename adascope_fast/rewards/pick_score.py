"""PickScore (Kirstain et al. 2023, 2305.01569): a CLIP trained on people's choices between pictures of a prompt.

The published number is exp(logit_scale) times the cosine, about 100 times it: 17 to 23 for pictures of today's models.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adascope_fast.rewards.clip import Clip


class PickScore(Clip):
    """Reward of the cosine of picture and prompt by the CLIP of PickScore.

    Args:
        scale: "percent" multiplies it by exp(logit_scale), as published; "unit" leaves the cosine.
    """

    called: ClassVar[str] = "pick_score"
    rule: ClassVar[str] = (
        "reward.model of pick_score is the folder of a transformers CLIPModel in safetensors with its tokenizer, or a "
        "Hugging Face repository of that kind"
    )

    def __init__(self, model: Any, tokenizer: Any, *, scale: str = "percent", **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        self.scale = scale

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [b] float32 of pictures [b, 3, h, w] in [0, 1]; higher is better."""
        cosine = (self.embed_images(images) * self.embed_prompts(prompts, images.device)).sum(1)
        return cosine if self.scale == "unit" else cosine * self.model.logit_scale.float().exp().to(images.device)
