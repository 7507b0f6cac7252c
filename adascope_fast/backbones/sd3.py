"""Stable Diffusion 3 and 3.5: an MMDiT on latents, two CLIP encoders and T5, rectified flow."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adascope_fast.backbones.adapter import LoraBackbone
from adascope_fast.schedules import Schedule
from adascope_fast.trajectory import Condition


class StableDiffusion3(LoraBackbone):
    """`StableDiffusion3Pipeline`; the embedded `scenes-flow` is one in small.

    The T5 of `scenes-flow` says nothing (`is_t5_silent`), so one of its tokens is enough there.
    """

    denoiser_name = "transformer"
    num_t5_tokens = 256  # the pipeline's own max_sequence_length
    is_t5_silent = False

    @staticmethod
    def default_targets() -> list[str]:
        """The attention projections of both streams, as in flow_grpo."""
        names = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        return [f"attn.{name}" for name in names]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        text, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts),
            None,
            [""] * len(prompts) if self.is_t5_silent else None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=1 if self.is_t5_silent else self.num_t5_tokens,
        )
        return {"text": text, "pooled": pooled}

    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        output = self.denoiser(
            hidden_states=sample.to(self.dtype),
            timestep=timestep,
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]
        return output.float()

    def schedule(self, num_steps: int, *, eta: float, noise_level: float) -> Schedule:
        return Schedule.from_diffusers(self.pipeline.scheduler, num_steps, noise_level=noise_level).to(self.device)

    def deterministic_schedule(self, num_steps: int) -> Schedule:
        return Schedule.from_diffusers(self.pipeline.scheduler, num_steps, kind="flow_ode").to(self.device)
