"""Stable Diffusion 3 and 3.5: an MMDiT on latents, two CLIP encoders and T5, rectified flow."""

from torch import Tensor

from adascope_fast.backbone import Condition
from adascope_fast.backbones.base import PipelineBackbone
from adascope_fast.schedules import Schedule


class FlowTransformer(PipelineBackbone):
    """What SD3 and FLUX share: a transformer, and sigmas that may be shifted by the size of the picture."""

    denoiser_name = "transformer"
    size_multiple = 2

    def schedule(
        self, num_steps: int, *, kind: str = "auto", eta: float | None = None, noise_level: float | None = None
    ) -> Schedule:
        """Flow-SDE with noise_level (0.7 by default), or another sampler of flows."""
        return self._schedule(num_steps, kind=None if kind == "auto" else kind, eta=eta, noise_level=noise_level)

    def deterministic_schedule(self, num_steps: int) -> Schedule:
        """The scheduler's own Euler steps."""
        return self._schedule(num_steps, kind="flow_ode")

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
        return low + (tokens - few) * (high - low) / (many - few)

    default_max_shift = 1.15


class StableDiffusion3(FlowTransformer):
    """`StableDiffusion3Pipeline`; the embedded `scenes-flow` is one in small.

    The T5 of `scenes-flow` says nothing (`is_t5_silent`), so one of its tokens is enough there.
    """

    # examples/dreambooth/train_dreambooth_lora_sd3.py: the attention projections of both streams.
    default_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    own_options = frozenset({"max_sequence_length"})
    default_max_shift = 1.16
    is_t5_silent = False

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
