"""HPSv2 (Wu et al. 2023, 2306.09341): ViT-H-14 fine-tuned on people's rankings; the bare cosine is the score.

Versions 2.0 and 2.1 differ by their weights alone. Published numbers lie in 0.2 to 0.35. The published code cuts a
picture that is not square to its middle, as CLIP does.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adascope_fast.rewards.clip import Clip


class Hps(Clip):
    """Reward in [-1, 1]: the cosine of picture and prompt by the CLIP of HPSv2.

    Args:
        version: which of the two it must be, where its folder says so; ValueError if it is the other.
    """

    called: ClassVar[str] = "hpsv2"
    rule: ClassVar[str] = (
        "reward.model of hpsv2 is the folder of a transformers CLIPModel in safetensors with its tokenizer, or a "
        "Hugging Face repository of that kind"
    )
    step: ClassVar[str] = "make it with: adascope-fast import-weights hpsv2 (or hpsv2.1) FILE... --out FOLDER"

    def __init__(self, model: Any, tokenizer: Any, *, version: str = "2.0", **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        found = getattr(model.config, "hps_version", None)
        if found is not None and found != version:
            raise ValueError(
                f'reward.version must be that of reward.model, got "{version}" with weights of HPSv{found}; set it to '
                f'"{found}", or name the other weights'
            )

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [b] float32 of pictures [b, 3, h, w] in [0, 1]; higher is better."""
        return (self.embed_images(images) * self.embed_prompts(prompts, images.device)).sum(1)
