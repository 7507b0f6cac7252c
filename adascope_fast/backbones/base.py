"""A diffusers pipeline as a backbone: what all families share.

Frozen weights are in the pipeline's type; what is trained is float32. `n` samples.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from adascope_fast.backbone import Condition
from adascope_fast.backbones import float16_gradients as half
from adascope_fast.backbones import settings
from adascope_fast.backbones.attention import use_attention
from adascope_fast.backbones.weights import FullWeights, LoraWeights, Weights
from adascope_fast.loading import align
from adascope_fast.schedules import Schedule

DECODED_AT_ONCE = 64
DECODED_PIXELS_AT_ONCE = 2**22


class Options(settings.Options):
    """How a pipeline becomes a backbone: the keys of `[model]`, and what a run adds to them."""

    seed: int = 0
    """Of the adapter's initial weights."""
    keep_reference: bool = False
    """Keep a frozen copy of a fully trained denoiser, for `reference_policy`."""


class PipelineBackbone:
    """Base of the families: everything but how the denoiser is called and how prompts are encoded."""

    denoiser_name: ClassVar[str]
    default_targets: ClassVar[tuple[str, ...]]
    """The layers that diffusers' own LoRA training script of the family adapts."""
    own_options: ClassVar[frozenset[str]] = frozenset()
    """Of `Options`, those that this family alone has a use for."""
    size_multiple: int = 1
    """Sides of the latent are multiples of it."""

    def __init__(self, pipeline: DiffusionPipeline, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self._refuse_options_of_others()
        self.pipeline: Any = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        self.denoiser: Any = pipeline.components[self.denoiser_name]
        self.refuse(dict(self.denoiser.config))
        self.vae: Any = pipeline.components["vae"]
        if self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast"):
            self.vae.float()  # it overflows in float16, says its own configuration
        self.dtype: torch.dtype = torch.float32 if options.train == "full" else self.denoiser.dtype
        self.latent_shape = self._latent_shape()
        self.attention = use_attention(self.denoiser, options.attention)
        self.weights: Weights
        if options.train == "full":
            self.weights = FullWeights(self.denoiser, self.denoiser_name, keep_reference=options.keep_reference)
        else:
            targets = options.lora_targets or self.default_targets
            self.weights = LoraWeights(
                self.denoiser,
                self.denoiser_name,
                rank=options.lora_rank,
                alpha=options.lora_alpha,
                targets=targets,
                seed=options.seed,
            )
        self._gradient_scale = 1.0
        if self.dtype == torch.float16:
            self._gradient_scale = half.scale_for(torch.Size(self.latent_shape).numel())
            half.divide_gradients(self.trainable_parameters(), self._gradient_scale)
        if options.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
            self.denoiser.train()  # diffusers recomputes only in training mode; these models have no dropout
        self._device = self.denoiser.device
        self._has_encoders_near = True
        self._is_aligned = False

    @classmethod
    def refuse(cls, config: dict[str, Any]) -> None:
        """ValueError, with the reason, for a denoiser configuration that cannot be trained by RL."""

    def _refuse_options_of_others(self) -> None:
        for option in ("embedded_guidance", "max_sequence_length"):
            value = getattr(self.options, option)
            if value is not None and option not in self.own_options:
                raise ValueError(f"model.{option} has no use for a {type(self).__name__}, got {value:g}; remove it")

    def _latent_shape(self) -> tuple[int, int, int]:
        scale, resolution = self.pipeline.vae_scale_factor, self.options.resolution
        size = self._default_size() if resolution is None else resolution // scale
        multiple = scale * self.size_multiple
        if size % self.size_multiple or (resolution is not None and resolution % multiple):
            raise ValueError(
                f"model.resolution must be a multiple of {multiple} pixels for this model, got {resolution}; "
                f"set it to {(resolution or size * scale) // multiple * multiple or multiple}"
            )
        return (self._channels(), size, size)

    def _default_size(self) -> int:
        return self.denoiser.config.sample_size

    def _channels(self) -> int:
        return self.denoiser.config.in_channels

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def resolution(self) -> int:
        """Side of the pictures in pixels."""
        return self.latent_shape[1] * self.pipeline.vae_scale_factor

    def to(self, device: torch.device) -> None:
        """Move what is used (a safety checker is not); offloaded text encoders follow when a prompt is encoded."""
        self._device = device
        for component in (self.denoiser, self.vae):
            if not getattr(component, "is_quantized", False):  # those were put on the GPU when they were loaded
                component.to(device)
        if not self.options.offload_text_encoders:
            for encoder in self._text_encoders():
                encoder.to(device)
        self._has_encoders_near = not self.options.offload_text_encoders

    def _align(self) -> None:
        """Before the first use on a CPU, not on loading: weights on their way to a GPU are not copied twice."""
        if self._device.type == "cpu" and not self._is_aligned:
            for component in self.pipeline.components.values():
                if isinstance(component, nn.Module):
                    align(component)
            self._is_aligned = True

    def _text_encoders(self) -> list[nn.Module]:
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        return [self.pipeline.components[name] for name in names if self.pipeline.components.get(name) is not None]

    def _place_text_encoders(self, *, is_near: bool) -> None:
        if is_near != self._has_encoders_near:
            for encoder in self._text_encoders():
                encoder.to(self._device if is_near else "cpu")
            self._has_encoders_near = is_near

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """One row a prompt, in the type of the denoiser; the empty prompt gives the unconditional row."""
        self._align()
        self._place_text_encoders(is_near=True)
        return {name: value.to(self.dtype) for name, value in self._encode(list(prompts)).items()}

    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Model output in float32; offloaded text encoders leave the device here."""
        self._align()
        if self.options.offload_text_encoders:
            self._place_text_encoders(is_near=False)
        output = self._predict(sample.to(self.dtype), timestep, condition).float()
        return output if self._gradient_scale == 1 else half.multiply_gradient(output, self._gradient_scale)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [n, 3, h, w] in [0, 1], float32."""
        self._align()
        config = self.vae.config
        scaled = latents.to(self.vae.dtype) / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        parts = [self.vae.decode(part, return_dict=False)[0] for part in scaled.split(self.num_decoded_at_once())]
        return (torch.cat(parts).float() / 2 + 0.5).clamp(0, 1)

    def num_decoded_at_once(self) -> int:
        """Pictures that the VAE decodes in one go: a large one takes gigabytes."""
        return max(1, min(DECODED_AT_ONCE, DECODED_PIXELS_AT_ONCE // self.resolution**2))

    def condition_shape(self) -> dict[str, tuple[int, ...]]:
        """Shape of a prompt's row of each tensor that `encode` gives."""
        raise NotImplementedError

    def _num_clip_tokens(self) -> int:
        encoder: Any = self._text_encoders()[0]
        return encoder.config.max_position_embeddings

    def _encode(self, prompts: list[str]) -> Condition:
        raise NotImplementedError

    def _predict(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        raise NotImplementedError

    def schedule(
        self, num_steps: int, *, kind: str = "auto", eta: float | None = None, noise_level: float | None = None
    ) -> Schedule:
        raise NotImplementedError

    def deterministic_schedule(self, num_steps: int) -> Schedule:
        raise NotImplementedError

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]

    @contextmanager
    def reference_policy(self) -> Iterator[None]:
        """Within it, `predict` is the base model's."""
        trained = self.denoiser
        with self.weights.reference(trained) as self.denoiser:
            try:
                yield
            finally:
                self.denoiser = trained

    def adapter_tensors(self) -> dict[str, Tensor]:
        return self.weights.tensors()

    def load_adapter_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.weights.load(tensors)

    def save_adapter(self, folder: Path) -> None:
        self.weights.save(self.pipeline, folder)
