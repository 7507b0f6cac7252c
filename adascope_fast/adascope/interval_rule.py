"""From the curves of the samples that share a decision to the steps worth training: AdaScope's rules and their limits.

Axes: `p` samples, `t` steps, noisiest first; states 0..t, t the image. Intervals are half open, [start, end).

The rule as printed ("literal") stops where second differences vanish, so also wherever the reward rises steadily; the
default, "knee", follows the paper's text instead. "knee_causal" decides while sampling: whether a step is trained
depends on the states up to it alone, so the mask does not depend on the actions that it masks, and what lies outside
the interval need not be stored; the price is that heights are not known yet, so floor, peak and gain are those of
earlier rollouts. Every case without an answer has a reason that says so.

Arithmetic runs on the host in float64, over [p, n] samples by states or steps; sums run in the order of the values, so
neither the order of the samples nor the rank they were on can matter.
"""

import math
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from adascope_fast.adascope import settings
from adascope_fast.adascope.settings import Rule

LOG_SNR = (-4.05, 0.086)
"""SD1.5's steps 5..31 of 50, the paper's mean interval, as log signal-to-noise ratios."""


class Interval(NamedTuple):
    """Steps start..end-1, and why: "ok", "fixed", "schedule", "clamped:..." or "fallback:..."."""

    start: int
    end: int
    reason: str


class Scale(NamedTuple):
    """What finished rollouts looked like: volatility at its floor and at its peak, and the preference's gain."""

    floor: float
    peak: float
    gain: float


class IntervalRule(settings.IntervalRule):
    """See `settings.IntervalRule`; and what is the same in every run."""

    smoothing_structure: int = 3
    """Width of the moving average over volatilities, odd."""
    smoothing_preference: int = 5
    """Width of the moving average over preferences, odd."""
    earliest_start: float = 0.0
    latest_start: float = 0.30
    latest_end: float = 0.90
    """Bounds, as shares of t."""
    smallest_range: float = 1e-6
    """Smaller ranges of structure and gains of preference count as none."""

    @model_validator(mode="after")
    def _widths_are_odd(self) -> Self:
        widths = self.smoothing_structure, self.smoothing_preference
        if min(widths) < 1 or any(width % 2 == 0 for width in widths):
            raise ValueError(f"smoothing widths are odd, got {widths[0]} and {widths[1]}; 3 and 5 are the defaults")
        return self

    def interval(
        self,
        structure: Any,
        preference: Any,
        *,
        volatility: Any = None,
        log_snr: Any = None,
        scale: Scale | None = None,
    ) -> Interval:
        """See `select_interval`."""
        g = host(preference)
        s = host(structure if volatility is None else volatility)
        t = g.shape[1] - 1
        unsensed = self.unsensed(t, log_snr)
        if unsensed is not None:
            return unsensed
        fallback = self.fallback_interval(t, log_snr)
        finite = np.isfinite(s).all(1) & np.isfinite(g).all(1)
        if not finite.any():
            return Interval(*fallback, "fallback:nonfinite")
        s, g = s[finite], g[finite]
        q = self._volatility(s, is_volatility=volatility is not None)
        if self.rule == "knee_causal":
            return self._causal(q, mean(g), fallback, scale, lag=2 if volatility is None else 1)
        if volatility is None and np.ptp(s, axis=1).max() < self.smallest_range:
            return Interval(*fallback, "fallback:constant_f")
        if self.rule == "literal":
            return self._literal(s, g, fallback, is_volatility=volatility is not None)
        if self.rule == "fraction":
            start = self._formed(mean(s), is_volatility=volatility is not None)
        else:
            start = self._start(smooth(q, self.smoothing_structure), t)
        if start is None:
            return Interval(*fallback, "fallback:no_start")
        return self._end(smooth(mean(g), self.smoothing_preference), start, t, fallback[1])

    def unsensed(self, t: int, log_snr: Any) -> Interval | None:
        """The interval where no curve is needed: rollouts of fewer than 4 steps, "fixed" and "schedule"; else None."""
        if t < 4:
            return Interval(0, t, "fallback:short")
        if self.rule == "fixed":
            return Interval(*self.fallback_interval(t, log_snr), "fixed")
        if self.rule != "schedule":
            return None
        if log_snr is None:
            raise ValueError('rule "schedule" needs the log_snr of the steps, got none; pass it, or use rule "fixed"')
        steps = _by_snr(log_snr)
        return Interval(*(steps or self._share(t)), "schedule" if steps else "fallback:no_snr")

    def scale(self, structure: Any, preference: Any, *, volatility: Any = None) -> Scale | None:
        """Floor, peak and gain of finished curves, which "knee_causal" needs of the past; None if none is finite."""
        g, s = host(preference), host(structure if volatility is None else volatility)
        finite = np.isfinite(s).all(1) & np.isfinite(g).all(1)
        t = g.shape[1] - 1
        if not finite.any() or t < 4:
            return None
        q, g = (
            self._volatility(s[finite], is_volatility=volatility is not None),
            smooth(mean(g[finite]), self.smoothing_preference),
        )
        peak = q[: rounded(self.latest_start * t) + 1]
        return Scale(float(np.median(q[t // 2 :])), float(peak.max()), float(g[t] - g[int(peak.argmax())]))

    def fallback_interval(self, t: int, log_snr: Any) -> tuple[int, int]:
        """Where to train when nothing is known: `fallback`, else by log-SNR, else (0.10, 0.64) of t."""
        return (None if self.fallback is not None or log_snr is None else _by_snr(log_snr)) or self._share(t)

    def _share(self, t: int) -> tuple[int, int]:
        start, end = (rounded(share * t) for share in self.fallback or (0.10, 0.64))
        start = min(max(start, 0), t - 1)
        return start, min(max(end, start + 1), t)

    def _volatility(self, s: np.ndarray, *, is_volatility: bool) -> np.ndarray:
        return mean(s) if is_volatility else np.sqrt(mean(np.diff(s, 2) ** 2))

    def _bounds(self, t: int) -> tuple[int, int]:
        """Of a start: at least one step comes after it."""
        return rounded(self.earliest_start * t), min(rounded(self.latest_start * t), t - 1)

    def _start(self, q: np.ndarray, t: int) -> int | None:
        low, high = self._bounds(t)
        floor, peak = np.median(q[t // 2 :]), int(q[: high + 1].argmax())
        if q[peak] <= floor:
            return None
        return first(q <= floor + self.kappa * (q[peak] - floor), max(peak, low), high, self.persistence)

    def _formed(self, s: np.ndarray, *, is_volatility: bool) -> int | None:
        """The first state with `formed` of the structure's change behind it; volatilities add up to the change."""
        f = np.concatenate([[0.0], s.cumsum()]) if is_volatility else s
        if abs(f[-1] - f[0]) < self.smallest_range:
            return None
        return first((f - f[0]) / (f[-1] - f[0]) >= self.formed, *self._bounds(len(f) - 1), 1)

    def _shortest(self, start: int, t: int) -> int:
        return start + max(1, rounded(self.min_fraction * t))

    def _end(self, g: np.ndarray, start: int, t: int, fallback_end: int) -> Interval:
        gain = g[t] - g[start]
        if gain <= self.smallest_range:
            return self._no_gain(start, t, fallback_end)
        found = first((g[t] - g) / gain <= self.phi_end, self._shortest(start, t), t, self.persistence)
        return self._clamped(start, found, t)

    def _no_gain(self, start: int, t: int, fallback_end: int) -> Interval:
        end = max(min(fallback_end, rounded(self.latest_end * t)), self._shortest(start, t))
        return self._clamped(start, end, t, "fallback:no_gain")

    def _clamped(self, start: int, end: int | None, t: int, reason: str = "ok") -> Interval:
        latest = max(rounded(self.latest_end * t), self._shortest(start, t))
        if end is None:
            end, reason = latest, "clamped:no_end"
        longest = start + rounded(self.max_fraction * t)
        for bound, name in ((latest, "clamped:max_end"), (longest, "clamped:max_len"), (t, "clamped:max_end")):
            if end > bound > start:
                end, reason = bound, name if reason == "ok" else reason
        return Interval(start, end, reason)

    def _literal(self, s: np.ndarray, g: np.ndarray, fallback: tuple[int, int], *, is_volatility: bool) -> Interval:
        f, g = mean(s), mean(g)
        change = f if is_volatility else np.abs(np.diff(f, 2))
        start = first(change <= self.literal_epsilon * np.ptp(f), 0, len(change), 1)
        if start is None:
            return Interval(*fallback, "fallback:no_start")
        change = np.abs(np.diff(g, 2))
        end = first(change <= self.literal_epsilon * np.ptp(g), start + 1, len(change), 1)
        if end is None:
            return Interval(start, max(rounded(self.latest_end * (len(g) - 1)), start + 1), "clamped:no_end")
        return Interval(start, end, "ok")

    def _causal(
        self, q: np.ndarray, g: np.ndarray, fallback: tuple[int, int], scale: Scale | None, *, lag: int
    ) -> Interval:
        t = len(g) - 1
        if scale is None:
            return Interval(*fallback, "fallback:first")
        start = causal_start(q, scale, *self._bounds(t), lag=lag, kappa=self.kappa, persistence=self.persistence)
        if start is None:  # known at the last state that may start; steps before it were not trained
            start = max(fallback[0], self._bounds(t)[1])
            return self._clamped(start, max(fallback[1], self._shortest(start, t)), t, "fallback:no_start")
        if scale.gain <= self.smallest_range:
            return self._no_gain(start, t, fallback[1])
        width = min(self.smoothing_preference, t) - 1 or 1
        end = causal_end(
            g, start, self._shortest(start, t), scale, width=width, phi=self.phi_end, persistence=self.persistence
        )
        return self._clamped(start, end, t)


def select_interval(
    structure: Float[Tensor, "p t+1"] | None,
    preference: Float[Tensor, "p t+1"],
    *,
    rule: Rule = "knee",
    volatility: Float[Tensor, "p q"] | None = None,
    log_snr: Float[Tensor, " t"] | None = None,
    scale: Scale | None = None,
    **parameters: Any,
) -> Interval:
    """The steps worth training, from the curves of the samples that share the decision.

    "knee": q is the smoothed root mean square over samples of structure's second differences. `start` is the first step
    from q's early peak on with q <= floor + kappa (peak - floor), the floor being the median of q's later half. `end`
    is the first with at most phi_end of the smoothed mean preference's gain since `start` left. Both hold `persistence`
    times in a row. Then the bounds. Samples with a value that is not finite are left out; degenerate cases say why.

    "knee_causal" decides a step from the states up to it alone. "fraction" starts when `formed` of the structure's
    change is done. "schedule" goes by the log-SNR alone, "fixed" by `fallback`.

    Args:
        structure: text-image similarity of the clean guess at each state; not used if volatility is given.
        preference: reward of the clean guess at each state; higher is better.
        volatility: how much the structure changes at each step, directly (latent mode).
        log_snr: of the state entering each step; places the fallback.
        scale: what earlier rollouts looked like, for "knee_causal".
        parameters: fields of `IntervalRule`.
    """
    made = IntervalRule(rule=rule, **parameters)
    return made.interval(structure, preference, volatility=volatility, log_snr=log_snr, scale=scale)


def _by_snr(log_snr: Any) -> tuple[int, int] | None:
    snr = host(log_snr)
    steps = np.flatnonzero((snr >= LOG_SNR[0]) & (snr < LOG_SNR[1]))
    return (int(steps[0]), int(steps[-1]) + 1) if len(steps) else None


def causal_start(
    q: np.ndarray, scale: Scale, low: int, high: int, *, lag: int, kappa: float, persistence: int
) -> int | None:
    """The first state in low..high whose newest `persistence` volatilities are within `kappa` of the highest so far.

    Nothing starts before the volatility has once been above `kappa` of the earlier rollouts' peak: a curve that is calm
    because structure has not begun would start at once.

    Args:
        q: volatility of each step; at state i the newest one known is q[i - lag].
        low, high: first and last state that may start.
    """
    for i in range(max(low, lag + persistence), min(high, len(q) - 1 + lag) + 1):
        known = q[: i - lag + 1]
        top = known.max()
        has_begun = top > scale.floor + kappa * max(scale.peak - scale.floor, 0.0)
        if has_begun and (known[-persistence:] <= scale.floor + kappa * (top - scale.floor)).all():
            return i
    return None


def causal_end(
    g: np.ndarray, start: int, shortest: int, scale: Scale, *, width: int, phi: float, persistence: int
) -> int | None:
    """The first state from `shortest` on at which preference has risen slowly, `persistence` states in a row.

    Slow is at most `phi` of the steepest rise since `start`, which is taken to be at least the mean rise of the earlier
    rollouts. A rise is that over the last `width` steps.
    """
    steepest = scale.gain / (len(g) - 1)
    slow = 0
    for i in range(max(start, width), len(g)):
        rise = (g[i] - g[i - width]) / width
        steepest = max(steepest, rise)
        slow = slow + 1 if rise <= phi * steepest else 0
        if i >= shortest and slow >= persistence:
            return i
    return None


def host(x: Any) -> np.ndarray:
    """`x` as float64 in numpy."""
    return np.asarray(x.detach().cpu().double() if isinstance(x, Tensor) else x, dtype=np.float64)


def mean(curves: np.ndarray) -> np.ndarray:
    """Mean over the first axis, summed in the order of the values."""
    return np.sort(curves, axis=0).mean(0)


def finite_mean(curves: np.ndarray) -> np.ndarray:
    """`mean` of the rows that are finite throughout; NaN where there is none."""
    rows = curves[np.isfinite(curves).all(1)]
    return mean(rows) if len(rows) else np.full(curves.shape[1], np.nan)


def smooth(curve: np.ndarray, width: int) -> np.ndarray:
    """Centred moving average of odd width, edges replicated."""
    return np.convolve(np.pad(curve, width // 2, mode="edge"), np.full(width, 1 / width), mode="valid")


def first(holds: np.ndarray, low: int, high: int, persistence: int) -> int | None:
    """The first index in low..high from which `holds` is true `persistence` times in a row."""
    starts = range(low, min(high, len(holds) - persistence) + 1)
    return next((i for i in starts if holds[i : i + persistence].all()), None)


def rounded(x: float) -> int:
    """The nearest integer, halves upward."""
    return math.floor(x + 0.5)
