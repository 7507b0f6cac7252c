"""AdaScope's knee decided while sampling: whether a step is trained depends on the states up to it alone.

A mask that looks ahead depends on the actions that it masks; this one does not, and what lies outside the interval need
not be stored. The price is that heights are not known yet, so floor, peak and gain are those of earlier rollouts.
"""

from typing import NamedTuple

import numpy as np


class Scale(NamedTuple):
    """What finished rollouts looked like: volatility at its floor and at its peak, and the preference's gain."""

    floor: float
    peak: float
    gain: float


def causal_start(
    q: np.ndarray, scale: Scale, low: int, high: int, *, lag: int, kappa: float, persist: int
) -> int | None:
    """The first state in low..high whose newest `persist` volatilities are within `kappa` of the highest one so far.

    Nothing starts before the volatility has once been above `kappa` of the earlier rollouts' peak: a curve that is calm
    because structure has not begun would start at once.

    Args:
        q: volatility of each step; at state i the newest one known is q[i - lag].
        low, high: first and last state that may start.
    """
    for i in range(max(low, lag + persist), min(high, len(q) - 1 + lag) + 1):
        known = q[: i - lag + 1]
        top = known.max()
        has_begun = top > scale.floor + kappa * max(scale.peak - scale.floor, 0.0)
        if has_begun and (known[-persist:] <= scale.floor + kappa * (top - scale.floor)).all():
            return i
    return None


def causal_end(
    g: np.ndarray, start: int, shortest: int, scale: Scale, *, width: int, phi: float, persist: int
) -> int | None:
    """The first state from `shortest` on at which preference has risen slowly, `persist` states in a row.

    Slow is at most `phi` of the steepest rise since `start`, which is taken to be at least the mean rise of the earlier
    rollouts. A rise is that over the last `width` steps.
    """
    steepest = scale.gain / (len(g) - 1)
    slow = 0
    for i in range(max(start, width), len(g)):
        rise = (g[i] - g[i - width]) / width
        steepest = max(steepest, rise)
        slow = slow + 1 if rise <= phi * steepest else 0
        if i >= shortest and slow >= persist:
            return i
    return None
