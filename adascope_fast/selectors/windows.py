"""Windows of steps that move as training goes on: MixGRPO's schedules and Flow-GRPO-Fast's random window.

Axes: `b` samples, `t` denoising steps, noisiest first. Intervals are half open, [start, end).

As in the originals, the rollout of these selectors has noise inside the window alone and follows the sampler's
deterministic limit (the ODE) outside it, so images of a group differ by what the window did. `ode_outside=False`
samples with noise throughout and only trains the window.
"""

import math
from itertools import accumulate

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from adascope_fast.schedules import Schedule
from adascope_fast.selectors import settings
from adascope_fast.selectors.protocol import Stateless, checked, num_usable
from adascope_fast.selectors.settings import LastStep


class _Moving(Stateless):
    start: int | None
    end: int | None
    last_step: LastStep
    ode_outside: bool

    def interval(self, schedule: Schedule, iteration: int) -> tuple[int, int]:
        """(start, end) in this iteration of a sampler; known before the rollout."""
        raise NotImplementedError

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        """The window of this iteration, for every sample."""
        return self._keep_interval(prompts, schedule, *self.interval(schedule, iteration))

    def sampler(self, schedule: Schedule, iteration: int) -> Schedule:
        """`schedule` inside the window; outside it its deterministic limit, unless `ode_outside` is False."""
        return schedule.window(*self.interval(schedule, iteration)) if self.ode_outside else schedule

    def _range(self, schedule: Schedule) -> tuple[int, int]:
        end = num_usable(schedule, self.last_step) if self.end is None else self.end
        return checked(self.start or 0, end, schedule.num_steps)


class Window(settings.Window, _Moving):
    """See `settings.Window`."""

    seed: int = 0
    """Of random windows."""

    def interval(self, schedule: Schedule, iteration: int) -> tuple[int, int]:
        """(start, end) in this iteration of a sampler; known before the rollout."""
        first, limit = self._range(schedule)
        last = max(first, limit - self.window_size)
        if self.window_order == "random":
            begin = _draw(self.seed, iteration // self.shift_every, first, last)
        elif self.at_limit == "roll_back":
            begin = self._position(list(range(first, limit, self.window_shift)), limit, iteration, rolls_back=True)
        else:
            begins = [*range(first, last, self.window_shift), last]
            begin = self._position(begins, limit, iteration, rolls_back=False)
        return begin, min(begin + self.window_size, limit)

    def period_at(self, begin: int, limit: int) -> int:
        """Iterations that a progressive window beginning at `begin` stays there."""
        if self.shift_decay == "linear":
            share = begin / limit
            return max(1, int(self.shift_every * (1 - share) + self.shift_every_min * share + 1e-9))
        if self.shift_decay == "exponential":
            return math.ceil(self.shift_every * math.exp(-self.decay_rate * max(0, begin - self.decay_from)))
        return self.shift_every

    def _position(self, begins: list[int], limit: int, iteration: int, *, rolls_back: bool) -> int:
        """The beginning whose turn it is, each of them staying for its period."""
        periods = [self.period_at(begin, limit) for begin in begins]
        left = iteration % sum(periods) if rolls_back else iteration
        passed = sum(until <= left for until in accumulate(periods))
        return begins[min(passed, len(begins) - 1)]


class FastWindow(settings.FastWindow, _Moving):
    """See `settings.FastWindow`."""

    seed: int = 0
    """Of the places, with the iteration."""

    def interval(self, schedule: Schedule, iteration: int) -> tuple[int, int]:
        """(start, end) in this iteration of a sampler; known before the rollout."""
        low, high = self._range(schedule)
        if self.window_size > high - low:
            raise ValueError(f"a window of {self.window_size} steps does not fit into [{low}, {high}); lower its size")
        begin = _draw(self.seed, iteration, low, high - self.window_size)
        return begin, begin + self.window_size


def _draw(seed: int, iteration: int, low: int, high: int) -> int:
    return int(np.random.default_rng((seed, iteration)).integers(low, high, endpoint=True))
