"""Sampling trajectories: every step is one row of a table, every sample has its own noise.

`b` samples, `t` steps. Noise is drawn into the table that the latents then overwrite, so it costs no memory, and a
sample's noise does not depend on how many are denoised at once.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from adascope_fast import ops
from adascope_fast.backbones.protocol import Backbone
from adascope_fast.ode_tail import Tails
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


@dataclass
class PromptCache:
    """Encodes prompts, each distinct one once in the run, as long as `max_bytes` hold them."""

    backbone: Backbone
    max_bytes: int = 2**30
    _rows: OrderedDict[str, Condition] = field(default_factory=OrderedDict, init=False, repr=False)
    _negative: Condition | None = field(default=None, init=False, repr=False)

    def __call__(self, prompts: Sequence[str]) -> EncodedPrompts:
        """The distinct prompts in order of first appearance; the text encoder runs for the unknown ones alone."""
        distinct = list(dict.fromkeys(prompts))
        for prompt in distinct:  # one at a time: what is cached cannot depend on its neighbours, nor on a resume
            if prompt not in self._rows:
                self._rows[prompt] = self.backbone.encode([prompt])
        if self._negative is None:
            self._negative = self.backbone.encode([""])
        rows = [self._rows[prompt] for prompt in distinct]
        condition = {name: torch.cat([row[name] for row in rows]) for name in self._negative}
        self._forget(distinct)
        return EncodedPrompts(distinct, condition, self._negative)

    def _forget(self, used: list[str]) -> None:
        """Drop the prompts used least recently beyond `max_bytes`."""
        for prompt in used:
            self._rows.move_to_end(prompt)
        size_of = sum(value.numel() * value.element_size() for value in self._rows[used[-1]].values())
        while len(self._rows) * size_of > self.max_bytes:
            self._rows.popitem(last=False)


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
        guidance = {"output_uncond": without, "guidance_scale": self.guidance_scale}
        prev_sample, log_prob, x0, _ = ops.transition_step_with_x0(sample, output, noise, coef, x0_coef, **guidance)
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
    advance: Advance | None = None,
    tails: Tails | None = None,
    on_step: Callable[[int], None] | None = None,
    on_batch: Callable[[slice, Tensor], None] | None = None,
) -> Trajectory:
    """Sample `b = len(prompts)` trajectories.

    Args:
        schedule: on the device of the backbone.
        encoded: must hold every prompt.
        guidance_scale: classifier-free guidance; 1 means none.
        generator: draws the initial latents and the noise of every step; on the device of the schedule.
        batch: samples denoised at once.
        initial: latents to start from in place of drawn ones.
        advance: takes the steps; None: `Denoising`.
        tails: where samples leave the sampler for a shorter way to the picture. The states that they skip are NaN.
        on_step: called with the number of samples after each step of each batch.
        on_batch: called with (rows, final latents) as soon as a batch is done.
    """
    device, num_steps = schedule.coef.device, schedule.num_steps
    advance = advance or Denoising(backbone, schedule, encoded, guidance_scale)
    prompt_index = encoded.index(prompts, device)
    shape = (len(prompts), num_steps + 1, *backbone.latent_shape)
    latents = torch.randn(shape, generator=generator, device=device)
    if initial is not None:
        latents[:, 0] = initial
    x0 = torch.full((len(prompts), num_steps, *backbone.latent_shape), torch.nan, device=device)
    log_prob = torch.full((len(prompts), num_steps), torch.nan, device=device)
    for start in range(0, len(prompts), batch):
        rows = slice(start, min(start + batch, len(prompts)))
        for step in range(num_steps):
            samples, at = _walking(rows, None if tails is None else tails.start > step, device)
            if not len(samples):
                break
            moved = advance(step, samples, latents[at, step], latents[at, step + 1], prompt_index[at])
            for table, column, value in zip((latents, log_prob, x0), (step + 1, step, step), moved, strict=True):
                table[at, column] = value.to(table.dtype)
            if on_step is not None:
                on_step(len(samples))
        if tails is not None:
            _finish(advance, tails, rows, latents, prompt_index, on_step)
        if on_batch is not None:
            on_batch(rows, latents[rows, -1])
    return Trajectory(latents, x0, log_prob, schedule, list(prompts), prompt_index)


def _walking(rows: slice, flags: Tensor | None, device: torch.device) -> tuple[Tensor, slice | Tensor]:
    """The samples of a batch whose flag is set, on the CPU, and what picks them from a table on the device."""
    samples = torch.arange(rows.start, rows.stop)
    if flags is None or flags[rows].all():
        return samples, rows
    samples = samples[flags[rows]]
    return samples, samples.to(device, non_blocking=True)


def _finish(
    advance: Advance,
    tails: Tails,
    rows: slice,
    latents: Float[Tensor, "b t+1 *latent"],
    prompt_index: Int64[Tensor, " b"],
    on_step: Callable[[int], None] | None,
) -> None:
    """Take the samples of a batch from where they left the sampler to the picture, the last of the `latents`."""
    device, last = latents.device, torch.zeros_like(latents[rows, -1])
    for number in range(int(tails.count[rows].max())):
        samples, at = _walking(rows, tails.count > number, device)
        if number == 0:
            number_of, start = (x.to(device, non_blocking=True) for x in (samples, tails.start[samples]))
            latents[number_of, -1] = latents[number_of, start]
        x, own = latents[at, -1], slice(None) if isinstance(at, slice) else at - rows.start
        guess = advance.guess(tails.step[at, number], x, prompt_index[at])
        of_x, of_guess, of_last = tails.coef[at, number].view(len(samples), 3, *[1] * (x.dim() - 1)).unbind(1)
        latents[at, -1] = (of_x * x + of_guess * guess + of_last * last[own]).to(latents.dtype)
        last[own] = guess.to(last.dtype)
        if on_step is not None:
            on_step(len(samples))
    for step in range(1, latents.shape[1] - 1):  # the noise of the steps that were not taken
        _, at = _walking(rows, tails.start < step, device)
        latents[at, step] = torch.nan
