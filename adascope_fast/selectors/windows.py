"""Windows of steps that move as training goes on: MixGRPO's schedules and Flow-GRPO-Fast's random window.

Axes: `b` samples, `t` denoising steps, noisiest first. Intervals are half open, [start, end).

As in the originals, the rollout of these selectors has noise inside the window alone and follows the sampler's
deterministic limit (the ODE) outside it, so pictures of a group differ by what the window did. `ode_outside=False`
samples with noise throughout and only trains the window.
"""

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from adascope_fast.schedules import Schedule
from adascope_fast.selectors.protocol import Stateless, checked


@dataclass
class _Moving(Stateless):
    ode_outside: bool = field(default=True, kw_only=True)

    def interval(self, num_steps: int, iteration: int) -> tuple[int, int]:
        """(start, end) in this iteration of a sampler with `num_steps` steps; known before the rollout."""
        raise NotImplementedError

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        """The window of this iteration, for every sample."""
        return self._keep_interval(prompts, schedule, *self.interval(schedule.num_steps, iteration))

    def sampler(self, schedule: Schedule, iteration: int) -> Schedule:
        """`schedule` inside the window; outside it its deterministic limit, unless `ode_outside` is False."""
        return schedule.window(*self.interval(schedule.num_steps, iteration)) if self.ode_outside else schedule


@dataclass
class Window(_Moving):
    """MixGRPO's window of `size` steps (2507.21802).

    "progressive" moves the window from `start` by `shift` steps every `period` iterations (size for windows that do not
    overlap); at `limit` it begins again ("roll_back"; windows are cut short there) or stays at the last full one
    ("clamp"). "random" draws one of the full windows every `period` iterations. Unlike theirs, no window begins at the
    limit: it would be empty.

    `decay` shortens the period of a progressive window that begins at l: "linear", from `period` at 0 to `min_period`
    at the limit, rounded down; "exponential", ceil(period * exp(-decay_rate * max(0, l - decay_from))).
    """

    size: int = 4
    period: int = 25
    shift: int = 1
    start: int = 0
    limit: int | None = None
    order: Literal["progressive", "random"] = "progressive"
    at_limit: Literal["roll_back", "clamp"] = "roll_back"
    seed: int = 0
    decay: Literal["none", "linear", "exponential"] = "none"
    min_period: int = 1
    decay_rate: float = 0.1
    decay_from: int = 13

    def __post_init__(self) -> None:
        if min(self.size, self.period, self.shift) < 1:
            raise ValueError(f"size, period and shift are at least 1, but are {self.size}, {self.period}, {self.shift}")
        if not 1 <= self.min_period <= self.period:
            raise ValueError(
                f"min_period lies in 1..{self.period}, the period at the start, but it is {self.min_period}; lower it"
            )
        if self.order == "random" and self.decay != "none":
            raise ValueError(
                f'the period of a random window does not decay, got decay = "{self.decay}"; set decay = "none", or '
                f'order = "progressive"'
            )

    def interval(self, num_steps: int, iteration: int) -> tuple[int, int]:
        """(start, end) in this iteration of a sampler with `num_steps` steps; known before the rollout."""
        first, limit = checked(self.start, num_steps if self.limit is None else self.limit, num_steps)
        last = max(first, limit - self.size)
        if self.order == "random":
            begin = _draw(self.seed, iteration // self.period, first, last)
        elif self.at_limit == "roll_back":
            begin = self._position(list(range(first, limit, self.shift)), limit, iteration, rolls_back=True)
        else:
            begin = self._position([*range(first, last, self.shift), last], limit, iteration, rolls_back=False)
        return begin, min(begin + self.size, limit)

    def period_at(self, begin: int, limit: int) -> int:
        """Iterations that a progressive window beginning at `begin` stays there."""
        if self.decay == "linear":
            share = begin / limit
            return max(1, int(self.period * (1 - share) + self.min_period * share + 1e-9))
        if self.decay == "exponential":
            return math.ceil(self.period * math.exp(-self.decay_rate * max(0, begin - self.decay_from)))
        return self.period

    def _position(self, begins: list[int], limit: int, iteration: int, *, rolls_back: bool) -> int:
        """The beginning whose turn it is, each of them staying for its period."""
        periods = [self.period_at(begin, limit) for begin in begins]
        left = iteration % sum(periods) if rolls_back else iteration
        passed = sum(until <= left for until in accumulate(periods))
        return begins[min(passed, len(begins) - 1)]


@dataclass
class FastWindow(_Moving):
    """Flow-GRPO-Fast: `size` steps in a row, start uniform in low..high-size, anew every iteration."""

    size: int
    low: int
    high: int
    seed: int = 0

    def interval(self, num_steps: int, iteration: int) -> tuple[int, int]:
        """(start, end) in this iteration of a sampler with `num_steps` steps; known before the rollout."""
        low, high = checked(self.low, self.high, num_steps)
        if not 1 <= self.size <= high - low:
            raise ValueError(f"a window of {self.size} steps does not fit into [{low}, {high}); lower size")
        begin = _draw(self.seed, iteration, low, high - self.size)
        return begin, begin + self.size


def _draw(seed: int, iteration: int, low: int, high: int) -> int:
    return int(np.random.default_rng((seed, iteration)).integers(low, high, endpoint=True))
