"""ImageReward (Xu et al. 2023, 2304.05977): BLIP's text encoder reads the prompt with the picture, a stack rates it.

The first token's state goes through the linear layers; the result is centred and scaled by the mean and standard
deviation that the authors publish, so 0 is a middling picture. As in their code the first token stays [CLS] (BLIP's own
matching puts [ENC] there), prompts are padded to 35 tokens, and the picture is cut to its middle at 224 pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, BlipConfig, BlipTextModel, BlipVisionModel
from transformers.models.blip.modeling_blip import BlipPreTrainedModel

from adascope_fast.loading import align, load_whole
from adascope_fast.rewards.aesthetic import stack
from adascope_fast.rewards.clip import MEAN, STD, colours_of, device_of, prepared, refuse_absent, refuse_bare, told

CENTRE, SPREAD = 0.16717362830052426, 1.0333394966054072
MOST_TOKENS = 35
STEP = "make it with: adascope-fast import-weights image_reward FILE... --out FOLDER"


class ImageRewardModel(BlipPreTrainedModel):
    """BLIP's two encoders and the stack, with the names that `import-weights` writes."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config
        text: Any = config.text_config
        self.vision_model = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.layers = stack(text.hidden_size)
        self.post_init()

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [b] float32, neither centred nor scaled."""
        seen = self.vision_model(pixel_values=pixel_values).last_hidden_state
        read = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen)
        return self.layers(read.last_hidden_state[:, 0].float())[:, 0]


class ImageReward:
    """Reward of picture and prompt, about -2 to 2.

    Args:
        model: the networks, which are frozen.
        tokenizer: BERT's.
        length: tokens that a prompt is padded and cut to.
        mean, std, name, device, batch: as those of `rewards.clip.Clip`.
    """

    def __init__(
        self,
        model: ImageRewardModel,
        tokenizer: Any,
        *,
        length: int = MOST_TOKENS,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        name: str = "image_reward",
        device: str = "auto",
        batch: int | None = None,
    ) -> None:
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer, self.name = tokenizer, name
        align(self.model)
        self.length, self.device, self.batch = length, device, batch
        self._mean, self._std = mean, std

    @classmethod
    def load(
        cls, model: str, *, dtype: str = "float32", device: str = "auto", batch: int | None = None
    ) -> "ImageReward":
        """What `import-weights` wrote to a folder, or a Hugging Face repository of that kind; ValueError if none."""
        refuse_absent(device)
        rule = "reward.model of image_reward is a folder that import-weights wrote, with its tokenizer"
        with told(rule, model, STEP):
            refuse_bare(model)
            network = load_whole(ImageRewardModel, model, "it", trust_remote_code=False, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        for encoder in (network.vision_model, network.text_encoder):  # the stack stays float32, as in their code
            encoder.to(getattr(torch, dtype))
        mean, std = colours_of(model, f"the model {model!r}")
        length = min(MOST_TOKENS, tokenizer.model_max_length, network.config.text_config.max_position_embeddings)
        options: Any = {"length": length, "mean": mean, "std": std, "device": device, "batch": batch}
        return cls(network, tokenizer, name=f"image_reward ({model})", **options)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [b] float32 of pictures [b, 3, h, w] in [0, 1]; higher is better."""
        device = device_of(self.device, images)
        self.model.to(device)
        size = self.model.config.vision_config.image_size
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(device)
        batch, found = self.batch or max(1, len(images)), []
        parts = zip(*(values.split(batch) for values in (images, tokens.input_ids, tokens.attention_mask)), strict=True)
        for part, ids, mask in parts:
            pixels = prepared(part.to(device).float(), size, self._mean, self._std).to(self.model.dtype)
            found.append(self.model(pixels, ids, mask))
        return ((torch.cat(found) - CENTRE) / SPREAD).to(images.device)
