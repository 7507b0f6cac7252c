"""One step of a rollout: what the denoiser says of some samples, and where the sampler takes them.

Axes: `n` rows of a denoiser call, `k` outputs of each, `m` samples of a step, `b` samples and `t` steps of a rollout.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from adascope_fast import ops
from adascope_fast.backbone import Backbone, take
from adascope_fast.reference import Kind
from adascope_fast.rollout.prompts import EncodedPrompts
from adascope_fast.rollout.trajectory import Tables
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
    outputs, without = predict_in_one(
        backbone, encoded, sample, timestep, prompt_index, guidance_scale, train_guidance=train_guidance
    )
    return split(outputs, without, len(sample))


def predict_in_one(
    backbone: Backbone,
    encoded: EncodedPrompts,
    sample: Float[Tensor, "n *latent"],
    timestep: Float[Tensor, " n"],
    prompt_index: Int64[Tensor, " n"],
    guidance_scale: float,
    *,
    train_guidance: str = "both",
) -> tuple[Float[Tensor, "kn *latent"], Float[Tensor, "n *latent"] | None]:
    """`predict`'s outputs as the denoiser gave them: conditional, then, if in the same call, unconditional; else apart.

    What is differentiated is the first tensor whole: a gradient of its halves would have to be put together again.
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
    return backbone.predict(torch.cat([sample, sample]), torch.cat([timestep, timestep]), both), None


def split(
    outputs: Float[Tensor, "kn *latent"], without: Float[Tensor, "n *latent"] | None, n: int
) -> tuple[Float[Tensor, "n *latent"], Float[Tensor, "n *latent"] | None]:
    """(conditional, unconditional) of what `predict_in_one` gave."""
    return (outputs[:n], outputs[n:]) if len(outputs) > n else (outputs, without)


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
        at: slice | Int64[Tensor, " m"],
        tables: Tables,
        prompt_index: Int64[Tensor, " b"],
    ) -> None:
        """Step `step` of the samples with these numbers (on the CPU), which `at` picks from the tables."""
        sample = tables.sample(at, step)
        timestep, _ = self.row(step, len(sample))
        output = predict(self.backbone, self.encoded, sample, timestep, prompt_index[at], self.guidance_scale)
        self.move(step, at, tables, *output)

    def row(self, step: int, count: int) -> tuple[Float32[Tensor, " m"], Float32[Tensor, "m 3"]]:
        """The step's timestep and coefficients, for `count` samples."""
        return self.schedule.timesteps[step].expand(count), self.schedule.coef[step].expand(count, 3)

    def move(self, step: int, at: slice | Tensor, tables: Tables, output: Tensor, without: Tensor | None) -> None:
        """The step itself, from the model outputs with and without the prompt: what it gives is in the tables.

        In a multistep solver the guess before takes the place of the noise, and no log-probability is recorded.
        """
        _, coef = self.row(step, len(output))
        x0_coef = self.schedule.x0_coef[step].expand(len(output), 2)
        whole, rows = (at, None) if isinstance(at, slice) else (slice(None), at)
        noise = after = tables.latents[whole, step + 1]
        log_prob, multistep = tables.log_prob[whole, step], self.schedule.multistep
        if multistep is not None:
            coef, log_prob = multistep[step].expand(len(output), 3), torch.empty_like(log_prob)
            noise = tables.x0[whole, step - 1] if step else noise
        out = ops.Step(
            after,
            log_prob,
            tables.x0[whole, step],
            tables.x0_correlation[whole, step - 1] if step else None,
            tables.sample_correlation[whole, step],
        )
        ops.transition_step_with_x0(
            tables.latents[whole, step],
            output,
            noise,
            coef,
            x0_coef,
            prev_x0=tables.x0[whole, step - 1] if step else None,
            output_uncond=without,
            guidance_scale=self.guidance_scale,
            kind=self.kind,
            rows=rows,
            out=out,
        )

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

    def __call__(self, step: int, samples: Tensor, at: Any, tables: Tables, prompt_index: Tensor, /) -> None: ...

    def guess(self, step: Tensor, sample: Tensor, prompt_index: Tensor, /) -> Tensor: ...
