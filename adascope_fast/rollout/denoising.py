"""One step of a rollout: what the denoiser says of some samples, and where the sampler takes them.

Axes: `n` rows of a denoiser call, `m` samples of a step.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from adascope_fast import ops
from adascope_fast.backbone import Backbone, take
from adascope_fast.reference import Kind
from adascope_fast.rollout.prompts import EncodedPrompts
from adascope_fast.schedules import Schedule


def predict(
    backbone: Backbone,
    encoded: EncodedPrompts,
    sample: Float[Tensor, "n *latent"],
    timestep: Float[Tensor, " n"],
    prompt_index: Int64[Tensor, " n"],
    guidance_scale: float,
    *,
    train_guidance: str = "both",
) -> tuple[Float[Tensor, "n *latent"], Float[Tensor, "n *latent"] | None]:
    """(conditional, unconditional) model output, both in one forward; the second is None without guidance (scale 1).

    Args:
        train_guidance: "conditional" makes the unconditional output apart, without gradient and without its cost.
    """
    condition = take(encoded.condition, prompt_index)
    if guidance_scale == 1.0:
        return backbone.predict(sample, timestep, condition), None
    if train_guidance == "conditional" and torch.is_grad_enabled():
        with torch.no_grad():
            nothing = {name: encoded.negative[name].expand_as(value) for name, value in condition.items()}
            without = backbone.predict(sample, timestep, nothing)
        return backbone.predict(sample, timestep, condition), without
    both = {name: torch.cat([value, encoded.negative[name].expand_as(value)]) for name, value in condition.items()}
    output = backbone.predict(torch.cat([sample, sample]), torch.cat([timestep, timestep]), both)
    with_prompt, without = output.chunk(2)
    return with_prompt, without


class Moved(NamedTuple):
    """Where a step took `m` samples: the next latents as stored, their log-probability, the guess of the final ones."""

    prev_sample: Float[Tensor, "m *latent"]
    log_prob: Float32[Tensor, " m"]
    x0: Float[Tensor, "m *latent"]


@dataclass(frozen=True)
class Denoising:
    """One step of some samples, without gradient: what `rollout` does unless it is told otherwise."""

    backbone: Backbone
    schedule: Schedule
    encoded: EncodedPrompts
    guidance_scale: float
    kind: Kind = "gaussian"
    """Of the log-probability that is recorded."""

    def __call__(
        self,
        step: int,
        samples: Int64[Tensor, " m"],
        sample: Float[Tensor, "m *latent"],
        noise: Float[Tensor, "m *latent"],
        prompt_index: Int64[Tensor, " m"],
    ) -> Moved:
        """Step `step` of the samples with these numbers (on the CPU)."""
        timestep, _ = self.row(step, len(sample))
        output = predict(self.backbone, self.encoded, sample, timestep, prompt_index, self.guidance_scale)
        return self.move(step, sample, noise, *output)

    def row(self, step: int, count: int) -> tuple[Float32[Tensor, " m"], Float32[Tensor, "m 3"]]:
        """The step's timestep and coefficients, for `count` samples."""
        return self.schedule.timesteps[step].expand(count), self.schedule.coef[step].expand(count, 3)

    def move(self, step: int, sample: Tensor, noise: Tensor, output: Tensor, without: Tensor | None) -> Moved:
        """The step itself, from the model outputs with and without the prompt."""
        _, coef = self.row(step, len(sample))
        x0_coef = self.schedule.x0_coef[step].expand(len(sample), 2)
        guidance: dict[str, Any] = {"output_uncond": without, "guidance_scale": self.guidance_scale}
        prev_sample, log_prob, x0, _ = ops.transition_step_with_x0(
            sample, output, noise, coef, x0_coef, **guidance, kind=self.kind
        )
        return Moved(prev_sample, log_prob, x0)

    def guess(
        self, step: Int64[Tensor, " m"], sample: Float[Tensor, "m *latent"], prompt_index: Int64[Tensor, " m"]
    ) -> Float32[Tensor, "m *latent"]:
        """The guided guess of the clean latents, each from the state that enters its own step."""
        schedule = self.schedule
        output, without = predict(
            self.backbone, self.encoded, sample, schedule.timesteps[step], prompt_index, self.guidance_scale
        )
        output = ops.guide(output, without, self.guidance_scale)
        of_x, of_output = schedule.x0_coef[step].view(len(sample), 2, *[1] * (sample.dim() - 1)).unbind(1)
        return of_x * sample + of_output * output


class Advance(Protocol):
    """What takes the steps of a rollout: `Denoising`, or something that does more on the way."""

    def __call__(self, step: int, samples: Tensor, sample: Tensor, noise: Tensor, prompt_index: Tensor, /) -> Moved: ...

    def guess(self, step: Tensor, sample: Tensor, prompt_index: Tensor, /) -> Tensor: ...
