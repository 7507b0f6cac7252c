"""The way from the last trained step to the picture in fewer steps: a second-order solver of the sampler's ODE.

Axes: `b` samples, `t` steps of the sampler, `k` steps of a tail.

After its last trained step a rollout needs a picture to be judged, but no log-probability. DPM-Solver++(2M) (Lu et al.,
2211.01095) gets there in fewer steps, as MixGRPO-Flash does. A step is x_next = c0 * x + c1 * guess + c2 * last guess;
the numbers are in a table. It starts at first order, and its last step is the guess itself, as in diffusers. The
sampler "dpm_solver" is the same solver from the first step on.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from adascope_fast.schedules.noise import CLEAN, solver_rows
from adascope_fast.schedules.samplers import Schedule


class Tail(NamedTuple):
    """Steps of the sampler at whose states the solver stops, and (x, guess, last guess) weights of each."""

    step: Int64[Tensor, " k"]
    coef: Float64[Tensor, "k 3"]


def tail(schedule: Schedule, start: int, share: float) -> Tail:
    """The solver's steps from state `start`: `share` of the sampler's remaining ones, rounded up; none from the end."""
    if not 0 < share <= 1:
        raise ValueError(f"a tail has a share of the remaining steps in (0, 1], but it is {share}; 0.4 is usual")
    remaining = schedule.num_steps - start
    count = math.ceil(share * remaining - 1e-9)
    step = torch.linspace(start, schedule.num_steps, count + 1, dtype=torch.float64).round().long()[:-1]
    signal, sigma = (torch.cat([level[step], end]) for level, end in zip(schedule.levels(), CLEAN, strict=True))
    return Tail(step, solver_rows(signal, sigma))


@dataclass(frozen=True)
class Tails:
    """The tail of each of `b` samples; shorter ones are padded."""

    start: Int64[Tensor, " b"]
    """The sampler's step that is not taken any more; on the CPU."""
    count: Int64[Tensor, " b"]
    """Steps of the tail; on the CPU."""
    step: Int64[Tensor, "b k"]
    coef: Float32[Tensor, "b k 3"]

    @classmethod
    def of(cls, schedule: Schedule, keep: Bool[Tensor, "b t"], share: float) -> "Tails":
        """From the steps `keep` (on the CPU) that will be trained; a sample without any has a tail alone."""
        order = torch.arange(1, schedule.num_steps + 1)
        start = (keep * order).amax(1)
        known = {number: tail(schedule, number, share) for number in set(start.tolist())}
        count = torch.tensor([len(known[number].step) for number in start.tolist()])
        step = torch.zeros(len(keep), int(count.max()), dtype=torch.long)
        coef = torch.zeros(*step.shape, 3)
        for number, found in known.items():
            step[start == number, : len(found.step)] = found.step
            coef[start == number, : len(found.step)] = found.coef.float()
        device = schedule.coef.device
        return cls(start, count, step.to(device), coef.to(device))

    def rows(self, samples: slice) -> "Tails":
        """Those of some samples."""
        return Tails(self.start[samples], self.count[samples], self.step[samples], self.coef[samples])

    @property
    def num_forwards(self) -> int:
        """Of all samples together, in the sampler's steps and the tails."""
        return int((self.start + self.count).sum())
