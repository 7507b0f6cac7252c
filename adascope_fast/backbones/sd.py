"""Stable Diffusion 1.x and 2.x: a UNet on latents, one text encoder, DDIM."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adascope_fast.backbones.adapter import LoraBackbone
from adascope_fast.schedules import Schedule
from adascope_fast.trajectory import Condition


class StableDiffusion(LoraBackbone):
    """`StableDiffusionPipeline`; the embedded `scenes` is one in small."""

    denoiser_name = "unet"

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        text, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, False)
        return {"text": text}

    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        output = self.denoiser(
            sample.to(self.dtype), timestep, encoder_hidden_states=condition["text"], return_dict=False
        )[0]
        return output.float()

    def schedule(self, num_steps: int, *, eta: float, noise_level: float) -> Schedule:
        return Schedule.from_diffusers(self.pipeline.scheduler, num_steps, eta=eta).to(self.device)

    def deterministic_schedule(self, num_steps: int) -> Schedule:
        return Schedule.from_diffusers(self.pipeline.scheduler, num_steps, eta=0.0).to(self.device)
