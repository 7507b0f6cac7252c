"""Branched rollouts (SPO, Liang et al. 2024, 2406.04314): several next states of a step, and which of them is better.

`k` candidates are drawn from the Gaussian of one step, from one forward of the denoiser, and a step-aware preference
model scores them. The rollout walks on from the first, which is as good as a random one, as in the original: the
candidates are drawn alike, and nobody has looked at them. So the walk is that of a plain rollout, number for number.

Axes: `b` samples, `t` steps, `s` of them branched, `m` samples of a step, `n` candidates. Kept besides the trajectory
are the better and the worse state of each branched step: 2 s latents a sample, where the trajectory has 2 t + 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from adascope_fast import ops
from adascope_fast.backbone import Condition, take
from adascope_fast.distributed import Ranks
from adascope_fast.rollout.denoising import Denoising, predict
from adascope_fast.rollout.noise import OwnNoise
from adascope_fast.rollout.spread import Spread
from adascope_fast.rollout.trajectory import Tables


@dataclass(frozen=True)
class Candidates:
    """`n` states that a step may lead to, as a preference model is shown them."""

    sample: Float[Tensor, "n *latent"]
    timestep: Float32[Tensor, " n"]
    """Of the step that they would enter; 0 for the final latents."""
    condition: Condition
    """The encoded prompt of each."""
    prompts: list[str]
    clean: Callable[[], Tensor]
    """The guided guess of the final latents, at the cost of a forward; the final latents themselves."""


class PreferenceModel(Protocol):
    """A step-aware preference model: scores of states as noisy as a step leaves them."""

    def __call__(self, candidates: Candidates, /) -> Float32[Tensor, " n"]:
        """Higher is better; NaN where a state cannot be judged."""
        ...


@dataclass(frozen=True)
class Branches:
    """What a branched rollout leaves behind beside its trajectory."""

    better: Float[Tensor, "b s *latent"]
    worse: Float[Tensor, "b s *latent"]
    log_prob: Float32[Tensor, "b s 2"]
    """Of the better and the worse state, as the rollout had them."""
    is_live: Bool[Tensor, "b t"]
    """Whether the two differ by the margin; False where a step was not branched."""
    column: Int64[Tensor, " t"]
    """Where a branched step lies in the tables."""

    def states(
        self, sample: Int64[Tensor, " n"], column: Int64[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n *latent"], Float[Tensor, "n *latent"]]:
        """The better and the worse state of some branched steps."""
        return self.better[sample, column], self.worse[sample, column]

    def rows(self, samples: Int64[Tensor, " m"]) -> "Branches":
        """Those of some samples alone."""
        own = {name: getattr(self, name)[samples] for name in ("better", "worse", "log_prob", "is_live")}
        return replace(self, **own)


@dataclass(frozen=True)
class SpreadBranches:
    """Those of all ranks: the states on the ranks where they were drawn, or to which they were brought."""

    better: Spread
    worse: Spread
    log_prob: Float32[Tensor, "b s 2"]
    is_live: Bool[Tensor, "b t"]
    column: Int64[Tensor, " t"]

    @classmethod
    def of(cls, own: Branches, bounds: list[int], ranks: Ranks) -> "SpreadBranches":
        """From what each rank has of its own samples."""
        s = own.log_prob.shape[1]
        better, worse = (Spread.of(x.flatten(0, 1), bounds, ranks, rows=s) for x in (own.better, own.worse))
        return cls(better, worse, ranks.whole(own.log_prob, bounds), ranks.whole(own.is_live, bounds), own.column)

    def states(self, sample: Int64[Tensor, " n"], column: Int64[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """As `Branches`, of states that are here."""
        row = sample * self.log_prob.shape[1] + column
        return self.better[row], self.worse[row]

    def brought(self, pairs: Sequence[Int64[Tensor, "n 2"]]) -> "SpreadBranches":
        """Those that each rank trains, on that rank."""
        s = self.log_prob.shape[1]
        rows = [sample * s + self.column[step] for sample, step in (part.unbind(1) for part in pairs)]
        return replace(self, better=self.better.brought(rows), worse=self.worse.brought(rows))


class Branching:
    """Takes the steps of a rollout as `Denoising` does, and branches some of them on the way.

    Args:
        where: the (sample, step) pairs that are branched, on the CPU.
        prompts: of the samples.
        num_candidates: k.
        margin: a pair is live if p - (1 - p) exceeds it, with p = sigmoid(difference of scores / temperature).
        noise: of the candidates: a sample's depends neither on its batch nor on the other steps.
        numbers: of the samples among all of the iteration; None: 0, 1, ...
    """

    def __init__(
        self,
        denoising: Denoising,
        where: Bool[Tensor, "b t"],
        prompts: list[str],
        preference: PreferenceModel,
        *,
        num_candidates: int,
        margin: float,
        temperature: float,
        noise: OwnNoise,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self._numbers = range(len(prompts)) if numbers is None else numbers
        self.denoising, self.preference, self.num_guesses = denoising, preference, 0
        self._where, self._prompts, self._noise = where, prompts, noise
        self._num_candidates, self._margin, self._temperature = num_candidates, margin, temperature
        device, shape = denoising.schedule.coef.device, denoising.backbone.latent_shape
        steps = where.any(0)
        size = len(prompts), int(steps.sum())
        self._columns = (steps.cumsum(0) - 1).clamp(min=0).tolist()
        better, worse = (torch.full((*size, *shape), torch.nan, device=device) for _ in range(2))
        log_prob = torch.full((*size, 2), torch.nan, device=device)
        is_live = torch.zeros(where.shape, dtype=torch.bool, device=device)
        self.branches = Branches(better, worse, log_prob, is_live, torch.tensor(self._columns, device=device))

    def __call__(
        self,
        step: int,
        samples: Int64[Tensor, " m"],
        at: slice | Int64[Tensor, " m"],
        tables: Tables,
        prompt_index: Int64[Tensor, " b"],
    ) -> None:
        """As `Denoising`, from the same forward of which the candidates are drawn."""
        plain = self.denoising
        sample = tables.sample(at, step)
        timestep, coef = plain.row(step, len(sample))
        own = prompt_index[at]
        output, without = predict(plain.backbone, plain.encoded, sample, timestep, own, plain.guidance_scale)
        plain.move(step, at, tables, output, without)
        is_branched = self._where[samples, step]
        if not is_branched.any():
            return
        numbers = samples[is_branched]
        rows, inside = numbers.to(sample.device), is_branched.nonzero()[:, 0].to(sample.device)
        states, log_probs = [tables.latents[rows, step + 1]], [tables.log_prob[rows, step]]
        for noise in self._drawn(step, numbers, tables.latents).unbind(1):
            state, log_prob = ops.transition_step(
                sample[inside],
                output[inside],
                noise,
                coef[: len(rows)],
                output_uncond=None if without is None else without[inside],
                guidance_scale=plain.guidance_scale,
                kind=plain.kind,
            )
            states.append(state)
            log_probs.append(log_prob.float())
        prompts = [self._prompts[number] for number in numbers.tolist()]
        scores = torch.stack([self._score(step + 1, state, prompt_index[rows], prompts) for state in states])
        self._keep(step, rows, torch.stack(states), torch.stack(log_probs), scores)

    def guess(
        self, step: Int64[Tensor, " m"], sample: Float[Tensor, "m *latent"], prompt_index: Int64[Tensor, " m"]
    ) -> Float32[Tensor, "m *latent"]:
        """As `Denoising`."""
        return self.denoising.guess(step, sample, prompt_index)

    def _drawn(self, step: int, rows: Int64[Tensor, " m"], latents: Tensor) -> Float[Tensor, "m k-1 *latent"]:
        """Of some samples, for one step."""
        shape = (self._num_candidates - 1, *latents.shape[2:])
        numbers = [self._numbers[row] for row in rows.tolist()]
        return self._noise.of_use(step).of(numbers, shape, latents.device).to(latents.dtype)

    def _score(
        self, state: int, sample: Float[Tensor, "m *latent"], prompt_index: Int64[Tensor, " m"], prompts: list[str]
    ) -> Float32[Tensor, " m"]:
        plain, timesteps = self.denoising, self.denoising.schedule.timesteps
        is_final = state == len(timesteps)

        def clean() -> Tensor:
            if is_final:
                return sample
            self.num_guesses += len(sample)
            return plain.guess(torch.full_like(prompt_index, state), sample, prompt_index)

        timestep = timesteps.new_zeros(()) if is_final else timesteps[state]
        condition = take(plain.encoded.condition, prompt_index)
        return self.preference(Candidates(sample, timestep.expand(len(sample)), condition, prompts, clean)).float()

    def _keep(
        self,
        step: int,
        rows: Int64[Tensor, " m"],
        states: Float[Tensor, "k m *latent"],
        log_probs: Float32[Tensor, "k m"],
        scores: Float32[Tensor, "k m"],
    ) -> None:
        """The best and the worst of those that could be judged."""
        best = scores.masked_fill(scores.isnan(), -torch.inf).argmax(0)
        worst = scores.masked_fill(scores.isnan(), torch.inf).argmin(0)
        counted, column, kept = torch.arange(len(rows), device=rows.device), self._columns[step], self.branches
        difference = scores[best, counted] - scores[worst, counted]
        kept.better[rows, column], kept.worse[rows, column] = states[best, counted], states[worst, counted]
        kept.log_prob[rows, column] = torch.stack([log_probs[best, counted], log_probs[worst, counted]], 1)
        # p - (1 - p) = tanh(difference / 2 temperature); NaN exceeds nothing.
        kept.is_live[rows, step] = torch.tanh(difference / (2 * self._temperature)) > self._margin
