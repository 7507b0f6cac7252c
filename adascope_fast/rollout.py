"""Sampling trajectories: every step is one row of a table, every sample has its own noise.

`b` samples, `t` steps. Noise is drawn into the table that the latents then overwrite, so it costs no memory, and a
sample's noise does not depend on how many are denoised at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from adascope_fast import ops
from adascope_fast.backbones.protocol import Backbone
from adascope_fast.schedules import Schedule
from adascope_fast.trajectory import Condition, Trajectory, take


@dataclass(frozen=True)
class EncodedPrompts:
    """Distinct prompts, encoded once: `condition` has a row for each, `negative` one row for the empty prompt."""

    prompts: list[str]
    condition: Condition
    negative: Condition

    @classmethod
    def of(cls, backbone: Backbone, prompts: Sequence[str]) -> "EncodedPrompts":
        """Encode each distinct prompt once, in order of first appearance."""
        distinct = list(dict.fromkeys(prompts))
        return cls(distinct, backbone.encode(distinct), backbone.encode([""]))

    def index(self, prompts: Sequence[str], device: torch.device) -> Int64[Tensor, " b"]:
        """The row of each prompt."""
        row = {prompt: number for number, prompt in enumerate(self.prompts)}
        return torch.tensor([row[prompt] for prompt in prompts], device=device)


def predict(
    backbone: Backbone,
    encoded: EncodedPrompts,
    sample: Float[Tensor, "n *latent"],
    timestep: Float[Tensor, " n"],
    prompt_index: Int64[Tensor, " n"],
    guidance_scale: float,
) -> tuple[Float[Tensor, "n *latent"], Float[Tensor, "n *latent"] | None]:
    """(conditional, unconditional) model output, both in one forward; the second is None without guidance (scale 1)."""
    condition = take(encoded.condition, prompt_index)
    if guidance_scale == 1.0:
        return backbone.predict(sample, timestep, condition), None
    both = {name: torch.cat([value, encoded.negative[name].expand_as(value)]) for name, value in condition.items()}
    output = backbone.predict(torch.cat([sample, sample]), torch.cat([timestep, timestep]), both)
    with_prompt, without = output.chunk(2)
    return with_prompt, without


@torch.no_grad()
def rollout(
    backbone: Backbone,
    schedule: Schedule,
    encoded: EncodedPrompts,
    prompts: Sequence[str],
    *,
    guidance_scale: float,
    generator: torch.Generator,
    batch: int,
    initial: Float[Tensor, "b *latent"] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Trajectory:
    """Sample `b = len(prompts)` trajectories.

    Args:
        schedule: on the device of the backbone.
        encoded: must hold every prompt.
        guidance_scale: classifier-free guidance; 1 means none.
        generator: draws the initial latents and the noise of every step; on the device of the schedule.
        batch: samples denoised at once.
        initial: latents to start from in place of drawn ones.
        on_step: called with the number of samples after each step of each batch.
    """
    device, num_steps = schedule.coef.device, schedule.num_steps
    prompt_index = encoded.index(prompts, device)
    shape = (len(prompts), num_steps + 1, *backbone.latent_shape)
    latents = torch.randn(shape, generator=generator, device=device)
    if initial is not None:
        latents[:, 0] = initial
    x0 = torch.empty(len(prompts), num_steps, *backbone.latent_shape, device=device)
    log_prob = torch.empty(len(prompts), num_steps, device=device)
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        index = prompt_index[rows]
        for step in range(num_steps):
            sample = latents[rows, step]
            timestep = schedule.timesteps[step].expand(len(sample))
            output, without = predict(backbone, encoded, sample, timestep, index, guidance_scale)
            if without is not None:
                output = torch.lerp(without, output, guidance_scale)
            coef = schedule.coef[step].expand(len(sample), 3)
            latents[rows, step + 1], log_prob[rows, step] = ops.transition_step(
                sample, output, latents[rows, step + 1], coef
            )
            x0[rows, step] = schedule.x0_coef[step, 0] * sample + schedule.x0_coef[step, 1] * output
            if on_step is not None:
                on_step(len(sample))
    return Trajectory(latents, x0, log_prob, schedule, list(prompts), prompt_index)
