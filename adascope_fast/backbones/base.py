"""A diffusers pipeline as a backbone: what all families share.

Frozen weights are in the pipeline's type; what is trained is float32. `n` samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adascope_fast.backbone import Condition, in_double
from adascope_fast.backbones import float16_gradients as half
from adascope_fast.backbones import settings
from adascope_fast.backbones.attention import use_attention
from adascope_fast.backbones.pipeline import cuts, keys
from adascope_fast.backbones.pipeline.cuts import Cut, Reading
from adascope_fast.backbones.pipeline.files import is_one_of
from adascope_fast.backbones.pipeline.state import refuse_state
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
    parts: ClassVar[Mapping[str, tuple[str, ...]]]
    """The pipeline's components that are run, and the classes that each may be of."""
    may_lack: ClassVar[frozenset[str]] = frozenset()
    """Of those, the ones that may be absent, all together."""
    default_targets: ClassVar[tuple[str, ...]]
    """The layers that diffusers' own LoRA training script of the family adapts."""
    own_options: ClassVar[frozenset[str]] = frozenset()
    """Of `Options`, those that this family alone has a use for."""
    size_multiple: int = 1
    """Sides of the latent are multiples of it."""
    like: ClassVar[str] = ""
    """The family whose pipelines' settings one of your own understands; "": it sees to its settings itself."""
    has_shift: ClassVar[bool] = False
    """The VAE's `shift_factor` is added to latents."""
    is_t5_silent: bool = False
    """The pipeline's T5 says nothing: no prompt is given to it."""

    def __init__(self, pipeline: DiffusionPipeline, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self._refuse_options_of_others()
        self.pipeline: Any = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self._refuse_parts_and_settings()
        self._refuse_state()
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        self.denoiser: Any = pipeline.components[self.denoiser_name]
        self.refuse(dict(self.denoiser.config))
        self.vae: Any = pipeline.components["vae"]
        self._readings: dict[str, dict[str, Reading]] = {}
        if self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast"):
            self.vae.float()  # it overflows in float16, says its own configuration
        self.dtype: torch.dtype = torch.float32 if options.train == "full" else self.denoiser.dtype
        self.latent_shape = self._latent_shape()
        self._refuse_parts_that_do_not_fit()
        self.attention = use_attention(self.denoiser, options.attention)
        self.weights = self._make_weights()
        self._gradient_scale = 1.0
        if self.dtype == torch.float16:
            self.scale_gradients()
        if options.gradient_checkpointing:
            # Nothing in it is random, so the generators' states need not be kept, which a CUDA graph could not.
            self.denoiser.enable_gradient_checkpointing(
                partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            )
            self.denoiser.train()  # diffusers recomputes only in training mode
            for module in self.denoiser.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
        self._device = self.denoiser.device
        self._has_encoders_near = True
        self._is_aligned = False

    @classmethod
    def refuse(cls, config: dict[str, Any]) -> None:
        """ValueError, with the reason, for a denoiser configuration that cannot be trained by RL."""

    def _refuse_state(self) -> None:
        refuse_state(self.pipeline, self.denoiser_name, train=self.options.train)

    def _make_weights(self) -> Weights:
        options = self.options
        if options.train == "full":
            return FullWeights(self.denoiser, self.denoiser_name, keep_reference=options.keep_reference)
        return LoraWeights(
            self.denoiser,
            self.denoiser_name,
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            targets=options.lora_targets or self.default_targets,
            seed=options.seed,
        )

    def _refuse_parts_and_settings(self) -> None:
        family, components = type(self).__name__, self.pipeline.components
        like = next((base.__name__ for base in type(self).__mro__ if base.__name__ in keys.FAMILIES), self.like)
        for part, classes in self.parts.items():
            component = components.get(part)
            if component is None:
                if part not in self.may_lack and not part.startswith("tokenizer"):  # an outline has no tokenizers
                    raise ValueError(f"a {family} must have a {part}, got none; load the pipeline with it")
            elif not is_one_of(type(component), classes):
                raise ValueError(
                    f"the {part} of a {family} must be a {' or '.join(classes)}, got {type(component).__name__}; "
                    f"use one of these classes, and do not compile it before: acceleration.compile does"
                )
            elif not part.startswith("tokenizer") and like:
                keys.refuse_settings(like, part, component)
        absent = {part for part in self.may_lack if not part.startswith("tokenizer") and components.get(part) is None}
        if any(components.get(f"tokenizer{part.removeprefix('text_encoder')}") is not None for part in absent):
            raise ValueError(
                f"a {family} lacks {', '.join(sorted(self.may_lack))} together or not at all, got a tokenizer without "
                f"its {sorted(absent)[0]}; load the pipeline with both, or with neither"
            )
        if like:
            keys.refuse_pipeline_settings(like, self.pipeline.config, components)

    def _refuse_parts_that_do_not_fit(self) -> None:
        channels, latent = self.vae.config.latent_channels, self.latent_shape[0]
        if channels != latent:
            raise ValueError(
                f"the vae must have the {latent} latent channels of the {self.denoiser_name}, got latent_channels = "
                f"{channels}; use the vae that the model was trained with"
            )
        shift, scale = self.vae.config.get("shift_factor"), self.vae.config.scaling_factor
        if not scale or (shift is None and self.has_shift):
            told = "shift_factor" if scale else "scaling_factor"
            raise ValueError(
                f"{told} of the vae must be a number{'' if scale else ' other than 0'} for a {type(self).__name__}, "
                f"got {shift if scale else scale}; correct vae/config.json"
            )
        for name, told in self.text_widths().items():
            wanted = self.condition_shape()[name][-1]
            if told != wanted:
                raise ValueError(
                    f"the {self.denoiser_name} must be told vectors as wide as the text encoders', {told} ({name}), "
                    f"got {wanted} in its config; use the encoders that it was trained with"
                )

    def text_widths(self) -> dict[str, int]:
        """Width of what the text encoders tell the denoiser, by the names of `condition_shape`."""
        raise NotImplementedError

    def _encoder_settings(self, number: int) -> Any:
        """Of the first, second or third text encoder."""
        return self.pipeline.components[f"text_encoder{'' if number == 1 else f'_{number}'}"].config

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
        size = self.denoiser.config.sample_size
        sides = list(size) if isinstance(size, (list, tuple)) else [size]
        side = sides[0] if sides and all(one == sides[0] for one in sides) else None
        if not isinstance(side, int) or isinstance(side, bool) or side < 1:
            raise ValueError(
                f"model.resolution must be set where sample_size of the {self.denoiser_name} is no side of a square, "
                f"got sample_size = {size}; set it to the side of the images in pixels"
            )
        return side

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
        with cuts.no_remarks(type(self.pipeline).__module__):  # `cut` tells of them
            return {name: value.to(self.dtype) for name, value in self._encode(list(prompts)).items()}

    def cut(self, prompts: Sequence[str]) -> list[Cut]:
        """What the text encoders do not read of each prompt: only tokenizers run, once for a prompt.

        ValueError where the pipeline has no tokenizers, as an outline has none.
        """
        return [cuts.cut_of(prompt, reading) for prompt, reading in zip(prompts, self._read(prompts), strict=True)]

    def same_prompts(self, prompts: Sequence[str]) -> list[list[str]]:
        """Groups of different prompts that every text encoder reads as one, so that the denoiser cannot tell them."""
        return cuts.same(prompts, self._read(prompts))

    def cut_summary(self, prompts: Sequence[str]) -> str:
        """One line on `cut` and `same_prompts`, empty where every prompt is read whole and told from the others."""
        different = list(dict.fromkeys(prompts))
        return cuts.summary(self.cut(different), self.same_prompts(different))

    def tokenizer_limits(self) -> dict[str, int]:
        """How many tokens, special ones included, are read by the encoder of each tokenizer that is in use."""
        raise NotImplementedError

    def _read(self, prompts: Sequence[str]) -> list[dict[str, Reading]]:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._readings]
        if new:
            if self.pipeline.components["tokenizer"] is None:
                raise ValueError("what is cut of a prompt is told by tokenizers, got an outline; load the whole model")
            self._readings |= {prompt: {} for prompt in new}
            for name, limit in self.tokenizer_limits().items():
                tokenizer = self.pipeline.components[name]
                texts = new
                if hasattr(self.pipeline, "maybe_convert_prompt"):  # tokens of textual inversion that are several
                    texts = self.pipeline.maybe_convert_prompt(new, tokenizer)
                for prompt, reading in zip(new, cuts.read(tokenizer, texts, limit), strict=True):
                    self._readings[prompt][name] = reading
        return [self._readings[prompt] for prompt in prompts]

    def settle(self) -> None:
        """Have all where `predict` wants it: offloaded text encoders away, before it is replayed and not called."""
        self._align()
        if self.options.offload_text_encoders:
            self._place_text_encoders(is_near=False)

    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Model output in the denoiser's type, or autocast's, float32 in place of float16.

        Offloaded text encoders leave the device here.
        """
        self.settle()
        output = self._predict(sample.to(self.dtype), timestep, condition)
        if self._gradient_scale == 1:
            return output
        return half.multiply_gradient(
            output.float(), self._gradient_scale
        )  # its gradient is float32, and enters scaled

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [n, 3, h, w] in [0, 1], float32; all NaN where a latent or what the VAE made of it is not finite."""
        self._align()
        scaled = self._unscaled(latents.to(self.vae.dtype))
        parts = [self.vae.decode(part, return_dict=False)[0] for part in scaled.split(self.num_decoded_at_once())]
        images = torch.cat(parts).float()
        is_finite = latents.isfinite().flatten(1).all(1) & images.isfinite().flatten(1).all(1)
        return torch.where(is_finite[:, None, None, None], (images / 2 + 0.5).clamp(0, 1), torch.nan)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [n, *latent] of pictures [n, 3, h, w] in [0, 1], float32: the VAE's mean, as `decode` takes it."""
        self._align()
        size = (3, self.resolution, self.resolution)
        if tuple(images.shape[1:]) != size:
            raise ValueError(
                f"pictures to encode must have the model's size {list(size)}, got {list(images.shape[1:])}; resize them"
            )
        shown = (2 * images - 1).to(self.vae.dtype)
        found = [self.vae.encode(part, return_dict=False)[0] for part in shown.split(self.num_decoded_at_once())]
        # AutoencoderTiny gives latents, AutoencoderKL their distribution.
        means = torch.cat([one if isinstance(one, Tensor) else one.mean for one in found])
        return self._scaled(in_double(means)).float().to(means.device)

    def _scaled(self, means: Tensor) -> Tensor:
        """Latents of what the VAE gives: the inverse of `_unscaled`, which is affine in each channel."""
        ends = means.new_tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, means.shape[1], 1, 1)
        offset, last = self._unscaled(ends).split(1)
        return (means - offset) / (last - offset)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Latents as the VAE takes them."""
        return latents / self.vae.config.scaling_factor

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
        self,
        num_steps: int,
        *,
        kind: str = "auto",
        eta: float | None = None,
        noise_level: float | None = None,
        shift: float | None = None,
    ) -> Schedule:
        raise NotImplementedError

    def deterministic_schedule(self, num_steps: int, *, shift: float | None = None) -> Schedule:
        raise NotImplementedError

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]

    def scale_gradients(self) -> None:
        """Have gradients pass through the denoiser in float16's range, as under its autocast; a float16 model does."""
        if self._gradient_scale == 1:
            self._gradient_scale = half.scale_for(torch.Size(self.latent_shape).numel())
            half.divide_gradients(self.trainable_parameters(), self._gradient_scale)

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

    def save_adapter(self, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
        self.weights.save(self.pipeline, folder, self.weights.tensors() if tensors is None else tensors)

    def adapter_file(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(tensors on the CPU, metadata) of the file that `save_adapter` writes of a LoRA; of all weights, the same.

        The names of the tensors begin with that of the denoiser.
        """
        named = {f"{self.denoiser_name}.{name}": value for name, value in self.adapter_tensors().items()}
        tensors = {name: value.detach().cpu().contiguous() for name, value in named.items()}
        return tensors, {"format": "pt", **self.weights.metadata()}

    def load_adapter_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back the tensors that `adapter_file` gave; ValueError where they are another model's."""
        prefix = f"{self.denoiser_name}."
        if others := sorted(name for name in tensors if not name.startswith(prefix)):
            raise ValueError(
                f"the model's trained weights are those of its {self.denoiser_name}, got {others[0]!r:.80}; give these"
            )
        self.load_adapter_tensors({name.removeprefix(prefix): value for name, value in tensors.items()})
