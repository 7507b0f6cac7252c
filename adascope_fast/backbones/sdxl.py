"""Stable Diffusion XL: a UNet told of two text encoders, a pooled one, and the size and crop of the picture."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from adascope_fast.backbone import Condition
from adascope_fast.backbones.sd import CLIP_TOKENIZERS, UNET_PARTS, DenoisingUNet


class StableDiffusionXL(DenoisingUNet):
    """`StableDiffusionXLPipeline` without a refiner; pictures are uncropped and of the size that they are drawn in."""

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = UNET_PARTS | {
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": CLIP_TOKENIZERS,
    }

    def condition_shape(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {"text": (self._num_clip_tokens(), config.cross_attention_dim), "pooled": (pooled,), "time_ids": (6,)}

    def text_widths(self) -> dict[str, int]:
        first, second = self._encoder_settings(1), self._encoder_settings(2)
        return {"text": first.hidden_size + second.hidden_size, "pooled": second.projection_dim}

    def tokenizer_limits(self) -> dict[str, int]:
        return {name: self.pipeline.components[name].model_max_length for name in ("tokenizer", "tokenizer_2")}

    def _unscaled(self, latents: Tensor) -> Tensor:
        """With the VAE's mean and deviation where it has both, as diffusers does in this family alone."""
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return super()._unscaled(latents)
        mean, std = (latents.new_tensor(value).view(1, -1, 1, 1) for value in (mean, std))
        return latents * std / config.scaling_factor + mean

    def _encode(self, prompts: list[str]) -> Condition:
        text, _, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            is_told = torch.tensor([bool(prompt) for prompt in prompts], device=text.device)
            text = torch.where(is_told[:, None, None], text, 0)
            pooled = torch.where(is_told[:, None], pooled, 0)
        side = self.resolution
        size_crop_target = torch.tensor([side, side, 0, 0, side, side], device=text.device)
        return {"text": text, "pooled": pooled, "time_ids": size_crop_target.expand(len(prompts), 6)}

    def _predict(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return self.denoiser(
            sample,
            timestep,
            encoder_hidden_states=condition["text"],
            added_cond_kwargs={"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]},
            return_dict=False,
        )[0]
