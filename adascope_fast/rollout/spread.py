"""Samples that several ranks hold together: numbers of all of them on every rank, latents where they were sampled.

What a rank needs of the others' latents is brought to it once it is known which rows it trains: a state is sent to
those that train on it, and to no other.

Axes: `m` rows of a rank, `b` samples of all ranks, `t` steps, `n` pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from adascope_fast.distributed import Ranks
from adascope_fast.reference.rows import picked
from adascope_fast.rollout.trajectory import Recorded, StepBatch, Trajectory
from adascope_fast.schedules import Schedule


@dataclass(frozen=True)
class Spread:
    """A table [whole, ...] of which this rank has some rows, with their numbers in it, which ascend."""

    values: Float[Tensor, "m *rest"]
    numbers: Int64[Tensor, " m"]
    bounds: list[int]
    """Rank r has rows bounds[r] to bounds[r + 1], and those that were brought to it besides."""
    ranks: Ranks

    @classmethod
    def of(cls, values: Tensor, bounds: Sequence[int], ranks: Ranks, *, rows: int = 1) -> "Spread":
        """The table whose rows each rank has for its own samples, `rows` of them for each.

        Args:
            bounds: of the samples.
        """
        start, stop = (rows * bounds[ranks.rank + end] for end in (0, 1))
        numbers = torch.arange(start, stop, device=values.device)
        return cls(values, numbers, [rows * bound for bound in bounds], ranks)

    @property
    def shape(self) -> torch.Size:
        """Of the whole table."""
        return torch.Size((self.bounds[-1], *self.values.shape[1:]))

    @property
    def device(self) -> torch.device:
        return self.values.device

    def place(self, numbers: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """Where rows of the whole table lie in `values`. They must be here."""
        return torch.searchsorted(self.numbers, numbers)

    def __getitem__(self, numbers: Int64[Tensor, " n"]) -> Float[Tensor, "n *rest"]:
        """Rows of the whole table that are here. A copy."""
        return picked(self.values, self.place(numbers))

    def brought(self, wanted: Sequence[Int64[Tensor, " n"]]) -> "Spread":
        """What each rank wants of the table, on that rank; every rank calls it with the same numbers.

        Args:
            wanted: numbers of rows for each rank.
        """
        ranks = self.ranks
        start, stop = self.bounds[ranks.rank : ranks.rank + 2]
        lists = [numbers.unique() for numbers in wanted]  # ascending
        rows = [self[part[(part >= start) & (part < stop)]] for part in lists]
        mine = lists[ranks.rank]
        edges = torch.tensor(self.bounds, device=mine.device)
        counts = torch.searchsorted(mine, edges).diff().tolist()
        if is_channels_last(self.values):
            rows = [part.permute(0, 2, 3, 1) for part in rows]
            return replace(self, values=ranks.exchanged(rows, counts).permute(0, 3, 1, 2), numbers=mine)
        return replace(self, values=ranks.exchanged(rows, counts), numbers=mine)


def is_channels_last(values: Tensor) -> bool:
    """Whether the channels of a table of latents lie last in memory."""
    if values.dim() != 4 or values.is_contiguous():
        return False
    return values.is_contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class SpreadTrajectory(Recorded):
    """The trajectories of all ranks' samples, as `Trajectory` has them but for the tables, which no rank has whole."""

    local: Trajectory
    """Those that were sampled here."""
    bounds: list[int]
    """Rank r has samples bounds[r] to bounds[r + 1]."""
    ranks: Ranks
    log_prob: Float32[Tensor, "b t"]
    schedule: Schedule
    prompts: list[str]
    prompt_index: Int64[Tensor, " b"]
    x0_correlation: Float32[Tensor, "b t"] | None
    sample_correlation: Float32[Tensor, "b t"] | None
    states: Spread
    """All states of all samples, one after another."""
    guesses: Spread | None = None
    """The guess at each step of all samples, one after another; None until they are brought."""

    @classmethod
    def of(
        cls, local: Trajectory, bounds: list[int], ranks: Ranks, prompts: list[str], numbers: dict[str, Any]
    ) -> "SpreadTrajectory":
        """Of each rank's own trajectory.

        Args:
            prompts: of all samples.
            numbers: `log_prob`, `prompt_index`, and the correlations, of all samples.
        """
        states = Spread.of(local.latents.flatten(0, 1), bounds, ranks, rows=local.latents.shape[1])
        return cls(local, bounds, ranks, schedule=local.schedule, prompts=prompts, states=states, **numbers)

    @property
    def latents(self) -> Tensor:
        """None of this: ValueError."""
        raise ValueError(self._no("latents"))

    @property
    def x0(self) -> Tensor:
        """None of this: ValueError."""
        raise ValueError(self._no("x0"))

    def _no(self, name: str) -> str:
        return (
            f"`{name}` of a trajectory is spread over {self.ranks.size} processes, none of which has it whole; use "
            f"`over` for what is computed sample by sample and `gather` for pairs, or start one process"
        )

    @property
    def device(self) -> torch.device:
        return self.log_prob.device

    def over(self, compute: Callable[[Trajectory, slice], Tensor]) -> Tensor:
        """What `compute` gives of each rank's own samples, and which they are, put together."""
        start, stop = self.bounds[self.ranks.rank : self.ranks.rank + 2]
        return self.ranks.whole(compute(self.local, slice(start, stop)), self.bounds)

    def finals(self) -> Spread:
        """The final latents, by number of the sample."""
        return Spread.of(self.local.latents[:, -1], self.bounds, self.ranks)

    def guess(self, sample: Int64[Tensor, " n"], step: Int64[Tensor, " n"]) -> Float[Tensor, "n *latent"]:
        """The guesses at pairs that were brought here."""
        assert self.guesses is not None, "`brought` has them"
        return self.guesses[sample * self.num_steps + step]

    def brought(self, pairs: Sequence[Int64[Tensor, "n 2"]], *, guesses: bool = False) -> "SpreadTrajectory":
        """The states of the pairs that each rank trains, on that rank, and the guesses there."""
        t = self.num_steps
        starts = [sample * (t + 1) + step for sample, step in (part.unbind(1) for part in pairs)]
        states, found = self.states.brought([torch.cat([start, start + 1]) for start in starts]), None
        if guesses:
            table = Spread.of(self.local.x0.flatten(0, 1), self.bounds, self.ranks, rows=t)
            found = table.brought([sample * t + step for sample, step in (part.unbind(1) for part in pairs)])
        return replace(self, states=states, guesses=found)

    def gather(self, pairs: Int64[Tensor, "n 2"]) -> StepBatch:
        """The batch of pairs whose states are here: this rank's own, and those that were brought."""
        sample, step = pairs.unbind(1)
        rows = self.states.place(sample * (self.num_steps + 1) + step)
        return self._batch(self.states.values, rows, sample, step)
