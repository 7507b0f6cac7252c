"""FLUX.1: a transformer on packed latents, CLIP's pooled vector and T5's tokens, rectified flow.

Latents keep their picture shape [n, 16, h, w] everywhere but inside the transformer, which takes 2 x 2 patches as
tokens [n, h/2 * w/2, 64]. The guidance that FLUX.1-dev was distilled to take as an input (`embedded_guidance`) costs
nothing; `guidance_scale` is true classifier-free guidance, diffusers' `true_cfg_scale`, and costs a second forward.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from adascope_fast.backbone import Condition
from adascope_fast.backbones.sd import CLIP_TOKENIZERS, VAES
from adascope_fast.backbones.sd3 import T5_TOKENIZERS, FlowTransformer
from adascope_fast.schedules import Schedule
from adascope_fast.schedules.samplers import FLOW_SCHEDULER


class Flux(FlowTransformer):
    """`FluxPipeline` with guidance embedding (FLUX.1-dev)."""

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("FluxTransformer2DModel",),
        "vae": VAES,
        "scheduler": (FLOW_SCHEDULER,),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": CLIP_TOKENIZERS,
        "text_encoder_2": ("T5EncoderModel",),
        "tokenizer_2": T5_TOKENIZERS,
    }

    # examples/dreambooth/train_dreambooth_lora_flux.py: attention and feed-forward of the double-stream blocks, and the
    # attention of the single-stream ones.
    default_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    own_options = frozenset({"max_sequence_length", "embedded_guidance"})

    @classmethod
    def refuse(cls, config: dict[str, Any]) -> None:
        """FLUX.1-schnell, and the relatives that see a picture."""
        if not config.get("guidance_embeds", False):
            raise ValueError(
                "FLUX without guidance embedding (FLUX.1-schnell) is refused for RL: it is distilled to draw in 1 to 4 "
                "steps, so its output is no velocity of a flow that an SDE could follow; use FLUX.1-dev"
            )
        channels, outputs = config.get("in_channels", 64), config.get("out_channels")
        if outputs not in (None, channels):
            raise ValueError(
                f"a text-to-image FLUX has as many input as output channels, got {channels} and {outputs} "
                f"(Fill, Canny or Depth); use FLUX.1-dev"
            )

    def _default_size(self) -> int:
        return self.pipeline.default_sample_size

    def _channels(self) -> int:
        return self.denoiser.config.in_channels // 4

    def _schedule(self, num_steps: int, **options) -> Schedule:
        return super()._schedule(num_steps, sigmas=np.linspace(1.0, 1 / num_steps, num_steps), **options)

    def condition_shape(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        tokens = (self._num_t5_tokens(), config.joint_attention_dim)
        return {"text": tokens, "pooled": (config.pooled_projection_dim,)}

    def text_widths(self) -> dict[str, int]:
        return {"text": self._encoder_settings(2).d_model, "pooled": self._encoder_settings(1).hidden_size}

    def tokenizer_limits(self) -> dict[str, int]:
        return {"tokenizer": self.pipeline.tokenizer_max_length, "tokenizer_2": self._num_t5_tokens()}

    def _num_t5_tokens(self) -> int:
        return self.options.max_sequence_length or 512

    def _encode(self, prompts: list[str]) -> Condition:
        text, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, device=self.device, max_sequence_length=self._num_t5_tokens()
        )
        return {"text": text, "pooled": pooled}

    def _predict(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        n, _, height, width = sample.shape
        guidance = 3.5 if self.options.embedded_guidance is None else self.options.embedded_guidance
        output = self.denoiser(
            hidden_states=pack(sample),
            timestep=timestep / 1000,
            guidance=torch.full((n,), guidance, dtype=torch.float32, device=sample.device),
            pooled_projections=condition["pooled"],
            encoder_hidden_states=condition["text"],
            txt_ids=torch.zeros(condition["text"].shape[1], 3, dtype=self.dtype, device=sample.device),
            img_ids=_patch_positions(height // 2, width // 2, sample.device, self.dtype),
            return_dict=False,
        )[0]
        return unpack(output, height, width)


def pack(latents: Tensor) -> Tensor:
    """Latents [n, c, h, w] as tokens [n, h/2 * w/2, 4c]: each 2 x 2 patch is one, channel by channel."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """What `pack` made tokens of."""
    n, _, c = tokens.shape
    patches = tokens.view(n, height // 2, width // 2, c // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(n, c // 4, height, width)


def _patch_positions(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(0, row, column) of each token."""
    row = torch.arange(rows, device=device, dtype=dtype)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device, dtype=dtype).expand(rows, columns)
    return torch.stack([torch.zeros_like(row), row, column], -1).view(-1, 3)
