"""Stable Diffusion 3 and 3.5: an MMDiT on latents, two CLIP encoders and T5, rectified flow."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from adascope_fast.backbone import Condition
from adascope_fast.backbones.base import PipelineBackbone
from adascope_fast.backbones.sd import CLIP_TOKENIZERS, VAES
from adascope_fast.schedules import Schedule
from adascope_fast.schedules.samplers import FLOW_SCHEDULER

T5_TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast")


class FlowTransformer(PipelineBackbone):
    """What SD3 and FLUX share: a transformer, and sigmas that may be shifted by the size of the picture."""

    denoiser_name = "transformer"
    like = "StableDiffusion3"
    size_multiple = 2
    has_shift = True

    def schedule(
        self,
        num_steps: int,
        *,
        kind: str = "auto",
        eta: float | None = None,
        noise_level: float | None = None,
        shift: float | None = None,
    ) -> Schedule:
        """Flow-SDE with noise_level (0.7 by default), or another sampler of flows."""
        noise: dict[str, Any] = {"eta": eta, "noise_level": noise_level, "shift": shift}
        return self._schedule(num_steps, kind=None if kind == "auto" else kind, **noise)

    def deterministic_schedule(self, num_steps: int, *, shift: float | None = None) -> Schedule:
        """The scheduler's own Euler steps."""
        return self._schedule(num_steps, kind="flow_ode", shift=shift)

    def _schedule(self, num_steps: int, **options) -> Schedule:
        scheduler = self.pipeline.scheduler
        if scheduler.config.get("use_dynamic_shifting"):
            options["mu"] = self._shift(scheduler.config)
        return Schedule.from_diffusers(scheduler, num_steps, **options).to(self.device)

    def _shift(self, config) -> float:
        """diffusers' `calculate_shift`: linear in the number of picture tokens."""
        tokens = (self.latent_shape[1] // self.size_multiple) ** 2
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", self.default_max_shift)
        if few == many or low is None or high is None:
            raise ValueError(
                f"a scheduler with use_dynamic_shifting must have base_shift and max_shift at two lengths, got {low} "
                f"at {few} and {high} at {many}; correct scheduler_config.json"
            )
        return low + (tokens - few) * (high - low) / (many - few)

    default_max_shift = 1.15

    def _unscaled(self, latents: Tensor) -> Tensor:
        return super()._unscaled(latents) + self.vae.config.shift_factor


class StableDiffusion3(FlowTransformer):
    """`StableDiffusion3Pipeline`; the embedded `scenes-flow` is one in small.

    Without T5 the denoiser is told zeros in its place, as in diffusers. The T5 of `scenes-flow` says nothing
    (`is_t5_silent`), so one of its tokens is enough there.
    """

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("SD3Transformer2DModel",),
        "vae": VAES,
        "scheduler": (FLOW_SCHEDULER,),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "tokenizer": CLIP_TOKENIZERS,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": CLIP_TOKENIZERS,
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer_3": T5_TOKENIZERS,
    }
    may_lack = frozenset({"text_encoder_3", "tokenizer_3"})

    # examples/dreambooth/train_dreambooth_lora_sd3.py: the attention projections of both streams.
    default_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    own_options = frozenset({"max_sequence_length"})
    default_max_shift = 1.16

    @classmethod
    def refuse(cls, config: dict[str, Any]) -> None:
        """The relatives that see a picture."""
        channels, outputs = config.get("in_channels", 16), config.get("out_channels", 16)
        if channels != outputs:
            raise ValueError(
                f"a text-to-image SD3 has as many input as output channels, got {channels} and {outputs}; use a "
                f"text-to-image model"
            )

    def _latent_shape(self) -> tuple[int, int, int]:
        self.size_multiple = self.denoiser.config.patch_size
        shape = super()._latent_shape()
        largest = self.denoiser.config.pos_embed_max_size * self.size_multiple
        if shape[1] > largest:
            limit = largest * self.pipeline.vae_scale_factor
            raise ValueError(
                f"model.resolution is at most {limit} pixels for this model, got {self.options.resolution}; lower it"
            )
        return shape

    def condition_shape(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        tokens = self._num_clip_tokens() + self._num_t5_tokens()
        return {"text": (tokens, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def text_widths(self) -> dict[str, int]:
        """T5's tokens, and the CLIP encoders' beside each other with zeros behind; those of both pooled."""
        first, second = self._encoder_settings(1), self._encoder_settings(2)
        clip = first.hidden_size + second.hidden_size
        text = max(
            clip, self._encoder_settings(3).d_model if self._has_t5 else self.denoiser.config.joint_attention_dim
        )
        return {"text": text, "pooled": first.projection_dim + second.projection_dim}

    @property
    def _has_t5(self) -> bool:
        return self.pipeline.components.get("text_encoder_3") is not None

    def tokenizer_limits(self) -> dict[str, int]:
        limits: dict[str, int] = dict.fromkeys(("tokenizer", "tokenizer_2"), self.pipeline.tokenizer_max_length)
        reads_t5 = self._has_t5 and not self.is_t5_silent
        return limits | ({"tokenizer_3": self._num_t5_tokens()} if reads_t5 else {})

    def _num_t5_tokens(self) -> int:
        return self.options.max_sequence_length or (1 if self.is_t5_silent else 256)

    def _encode(self, prompts: list[str]) -> Condition:
        text, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            [""] * len(prompts) if self.is_t5_silent else None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._num_t5_tokens(),
        )
        return {"text": text, "pooled": pooled}

    def _predict(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return self.denoiser(
            hidden_states=sample,
            timestep=timestep,
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]
