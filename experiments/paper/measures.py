"""From scores at points to gains over seconds and pairs, times to a gain, intervals, and verdicts.

Axes: `s` seeds, `g` the common grid of seconds (or pairs), `c` captions, `b` draws of the bootstrap.

A run's gain of a caption is its mean score less the base model's on the same noise; between two points it is
interpolated. The time to a gain is where the mean over seeds and captions first reaches it. A draw of the bootstrap
takes seeds and captions with replacement: the same captions in every arm, since all are measured on the same ones, and
seeds of each arm by itself. Where an arm does not reach a gain within the seconds that all arms have, its time is
known from below alone; `times_faster` carries that through, so an interval may be open above or reach down to 0.

Verdicts, by the 95 % interval [low, high] and the goal:
    confirmed           low >= goal
    not confirmed       high < goal
    too noisy to tell   otherwise
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Verdict = Literal["confirmed", "not confirmed", "too noisy to tell"]
DRAWS = 2000
QUANTILES = (0.025, 0.975)
GRID_POINTS = 201


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; None: it cannot be known from what was measured."""

    value: float | None
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, float | None]:
        """Open ends are None: JSON has no infinity."""
        return {name: _finite(getattr(self, name)) for name in ("value", "low", "high")}


def gains(points: Sequence[Mapping[str, Any]], base: Sequence[Sequence[float]], axis: str) -> tuple[Array, Array]:
    """(x [p], gain [p, c]) of a run along "cpu_seconds" or "pairs", the base itself first."""
    start = np.nanmean(np.asarray(base, dtype=np.float64), 1)
    rows = [np.nanmean(np.asarray(point["scores"], dtype=np.float64), 1) - start for point in points]
    x = np.array([0.0, *(float(point[axis]) for point in points)])
    return x, np.stack([np.zeros_like(start), *rows])


def on_grid(runs: Sequence[tuple[Array, Array]], grid: Array) -> Array:
    """Gains [s, g, c] of runs at the values of a grid, none of which lies beyond a run's end."""
    return np.stack([np.stack([np.interp(grid, x, column) for column in gain.T], 1) for x, gain in runs])


def common_grid(arms: Mapping[str, Sequence[tuple[Array, Array]]]) -> Array:
    """From 0 to the end of the run that ends first."""
    return np.linspace(0, min(x[-1] for runs in arms.values() for x, _ in runs), GRID_POINTS)


def draws(arms: Mapping[str, Array], num_draws: int = DRAWS, seed: int = 0) -> dict[str, Array]:
    """Mean gain [b, g] of each arm in every draw of seeds and captions."""
    random = np.random.default_rng(seed)
    num_captions = next(iter(arms.values())).shape[2]
    captions = _shares(random, num_draws, num_captions)
    return {
        name: np.einsum("bs,sgc,bc->bg", _shares(random, num_draws, len(gain)), gain, captions, optimize=True)
        for name, gain in arms.items()
    }


def _shares(random: np.random.Generator, num_draws: int, count: int) -> Array:
    """How often each of `count` is drawn, over the number of draws; rows sum to 1."""
    return random.multinomial(count, np.full(count, 1 / count), size=num_draws) / count


def time_to(curve: Array, grid: Array, gain: float) -> float:
    """Where a curve [g] first reaches a gain; infinity where it does not."""
    reached = np.nonzero(curve >= gain)[0]
    if not len(reached):
        return math.inf
    at = int(reached[0])
    if at == 0:
        return float(grid[0])
    share = (gain - curve[at - 1]) / (curve[at] - curve[at - 1])
    return float(grid[at - 1] + share * (grid[at] - grid[at - 1]))


def times(drawn: Array, grid: Array, gain: float) -> Array:
    """`time_to` of every draw [b]."""
    return np.array([time_to(curve, grid, gain) for curve in drawn])


def time_interval(whole: Array, drawn: Array, grid: Array, gain: float) -> Interval:
    """Time to a gain; an end that is not reached is None."""
    reached = times(drawn, grid, gain)
    low, high = quantiles(reached, reached)
    return Interval(*(_finite(value) for value in (time_to(whole, grid, gain), low, high)))


def bounds_of_ratio(base: float, arm: float, end: float) -> tuple[float, float]:
    """(least, most) that base / arm can be, where infinity means: later than `end`."""
    if math.isinf(base) and math.isinf(arm):
        return 0.0, math.inf
    if math.isinf(base):
        return end / arm if arm > 0 else math.inf, math.inf
    if math.isinf(arm):
        return 0.0, base / end
    ratio = base / arm if arm > 0 else math.inf
    return ratio, ratio


def times_faster(
    arm: tuple[Array, Array], base: tuple[Array, Array], grid: Array, gain: float
) -> tuple[Interval, tuple[float, float]]:
    """How many times sooner than `base` an arm reaches a gain; and the bounds of the figure itself.

    Args:
        arm, base: the mean curve [g], and that of every draw [b, g].
    """
    end = float(grid[-1])
    least, most = bounds_of_ratio(time_to(base[0], grid, gain), time_to(arm[0], grid, gain), end)
    drawn = [
        bounds_of_ratio(of_base, of_arm, end)
        for of_base, of_arm in zip(times(base[1], grid, gain), times(arm[1], grid, gain), strict=True)
    ]
    low, high = quantiles(np.array([one[0] for one in drawn]), np.array([one[1] for one in drawn]))
    return Interval(least if least == most else None, low, high), (least, most)


def best_within(curve: Array) -> float:
    """The highest gain of a curve [g]."""
    return float(curve.max())


def interval_of(value: float, drawn: Array) -> Interval:
    """A figure and the quantiles of its draws."""
    return Interval(value, *quantiles(drawn, drawn))


def quantiles(least: Array, most: Array) -> tuple[float, float]:
    """The lower quantile of what is known from below and the upper one of what is known from above."""
    low = np.quantile(least, QUANTILES[0], method="inverted_cdf")
    high = np.quantile(most, QUANTILES[1], method="inverted_cdf")
    return float(low), float(high)


def verdict(interval: Interval, goal: float) -> Verdict:
    """By the rule above; an open end is infinity."""
    low = -math.inf if interval.low is None else interval.low
    high = math.inf if interval.high is None else interval.high
    if low >= goal:
        return "confirmed"
    return "not confirmed" if high < goal else "too noisy to tell"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
