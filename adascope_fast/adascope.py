"""AdaScope (arXiv 2605.15855): train only the steps between "structure has formed" and "reward has saturated".

Axes: `b` samples, `p` of them pooled into one decision, `t` denoising steps, noisiest first; states 0..t, t the image.
Intervals are half open, [start, end).

The printed rule ("literal") stops where second differences vanish, so also wherever the reward rises steadily; the
default, "knee", follows the paper's text instead. Decisions are made on the host in float64, from sums in the order of
the values: the order of the samples cannot matter.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from adascope_fast.schedules import Schedule
from adascope_fast.sensing import latent_curves
from adascope_fast.timesteps import nonempty
from adascope_fast.trajectory import Trajectory


class Interval(NamedTuple):
    """Steps start..end-1, and why: "ok", "fixed", "clamped:..." or "fallback:..."."""

    start: int
    end: int
    reason: str


@dataclass(kw_only=True)
class IntervalRule:
    """Parameters of `select_interval`; fractions are of t and round half up."""

    rule: Literal["knee", "literal", "fixed"] = "knee"
    kappa_s: float = 0.25
    """Structure has formed when its volatility has fallen to this share of its peak above the floor."""
    persist: int = 2
    """Steps in a row for which a test must hold."""
    phi_e: float = 0.10
    """Reward has saturated when this share of its gain since the start is left."""
    smooth_s: int = 3
    smooth_g: int = 5
    start_lo: float = 0.0
    start_hi: float = 0.30
    end_hi: float = 0.90
    min_frac: float = 0.20
    max_frac: float = 0.80
    fallback: tuple[float, float] | None = None
    """Interval as fractions of t; None means log-SNR in [-4.05, 0.086) where it is known, else (0.10, 0.64)."""
    range_eps: float = 1e-6
    """Smaller ranges of structure and gains of preference count as none."""
    literal_eps: float = 0.02
    """What "literal" takes for zero, as a share of the curve's range; the paper's value is unpublished."""

    def __post_init__(self) -> None:
        if self.rule not in ("knee", "literal", "fixed"):
            raise ValueError(f"rule is knee, literal or fixed, not {self.rule!r}")
        if min(self.smooth_s, self.smooth_g, self.persist) < 1 or self.smooth_s % 2 == 0 or self.smooth_g % 2 == 0:
            raise ValueError(
                f"smoothing widths are odd, but are {self.smooth_s}, {self.smooth_g}; persist is at least 1"
            )

    def interval(self, structure: Any, preference: Any, *, volatility: Any = None, log_snr: Any = None) -> Interval:
        """See `select_interval`."""
        g = _host(preference)
        s = _host(structure if volatility is None else volatility)
        t = g.shape[1] - 1
        if t < 4:
            return Interval(0, t, "fallback:short")
        fallback = self._fallback(t, log_snr)
        if self.rule == "fixed":
            return Interval(*fallback, "fixed")
        finite = np.isfinite(s).all(1) & np.isfinite(g).all(1)
        if not finite.any():
            return Interval(*fallback, "fallback:nonfinite")
        s, g = s[finite], g[finite]
        if volatility is None and np.ptp(s, axis=1).max() < self.range_eps:
            return Interval(*fallback, "fallback:constant_f")
        if self.rule == "literal":
            return self._literal(s, g, fallback, is_volatility=volatility is not None)
        q = _mean(s) if volatility is not None else np.sqrt(_mean(np.diff(s, 2) ** 2))
        start = self._start(_smooth(q, self.smooth_s), t)
        if start is None:
            return Interval(*fallback, "fallback:no_start")
        return self._end(_smooth(_mean(g), self.smooth_g), start, t, fallback[1])

    def _start(self, q: np.ndarray, t: int) -> int | None:
        low, high = _round(self.start_lo * t), _round(self.start_hi * t)
        floor, peak = np.median(q[t // 2 :]), int(q[: high + 1].argmax())
        if q[peak] <= floor:
            return None
        return _first(q <= floor + self.kappa_s * (q[peak] - floor), max(peak, low), high, self.persist)

    def _end(self, g: np.ndarray, start: int, t: int, fallback_end: int) -> Interval:
        shortest = start + max(1, _round(self.min_frac * t))
        latest, longest = max(_round(self.end_hi * t), shortest), start + _round(self.max_frac * t)
        gain = g[t] - g[start]
        if gain <= self.range_eps:
            end, reason = max(min(fallback_end, _round(self.end_hi * t)), shortest), "fallback:no_gain"
        else:
            found = _first((g[t] - g) / gain <= self.phi_e, shortest, t, self.persist)
            end, reason = (latest, "clamped:no_end") if found is None else (found, "ok")
        for bound, name in ((latest, "clamped:max_end"), (longest, "clamped:max_len"), (t, "clamped:max_end")):
            if end > bound > start:
                end, reason = bound, name if reason == "ok" else reason
        return Interval(start, end, reason)

    def _literal(self, s: np.ndarray, g: np.ndarray, fallback: tuple[int, int], *, is_volatility: bool) -> Interval:
        f, g = _mean(s), _mean(g)
        change = f if is_volatility else np.abs(np.diff(f, 2))
        start = _first(change <= self.literal_eps * np.ptp(f), 0, len(change), 1)
        if start is None:
            return Interval(*fallback, "fallback:no_start")
        change = np.abs(np.diff(g, 2))
        end = _first(change <= self.literal_eps * np.ptp(g), start + 1, len(change), 1)
        if end is None:
            return Interval(start, max(_round(self.end_hi * (len(g) - 1)), start + 1), "clamped:no_end")
        return Interval(start, end, "ok")

    def _fallback(self, t: int, log_snr: Any) -> tuple[int, int]:
        if self.fallback is None and log_snr is not None:
            snr = _host(log_snr)
            steps = np.flatnonzero((snr >= -4.05) & (snr < 0.086))  # SD1.5's steps 5..31 of 50, the paper's mean
            if len(steps):
                return int(steps[0]), int(steps[-1]) + 1
        start, end = (_round(share * t) for share in self.fallback or (0.10, 0.64))
        start = min(max(start, 0), t - 1)
        return start, min(max(end, start + 1), t)


def select_interval(
    structure: Float[Tensor, "p t+1"] | None,
    preference: Float[Tensor, "p t+1"],
    *,
    rule: Literal["knee", "literal", "fixed"] = "knee",
    volatility: Float[Tensor, "p q"] | None = None,
    log_snr: Float[Tensor, " t"] | None = None,
    **parameters: Any,
) -> Interval:
    """The steps worth training, from the curves of the samples that share the decision.

    "knee": q is the smoothed root mean square over samples of structure's second differences. `start` is the first step
    from q's early peak on with q <= floor + kappa_s (peak - floor), the floor being the median of q's later half. `end`
    is the first with at most phi_e of the smoothed mean preference's gain since `start` left. Both hold `persist` times
    in a row. Then the bounds. Samples with a value that is not finite are left out; degenerate cases say their reason.

    Args:
        structure: text-image similarity of the clean guess at each state; not used if volatility is given.
        preference: reward of the clean guess at each state; higher is better.
        volatility: how much the structure changes at each step, directly (latent mode).
        log_snr: of the state entering each step; places the fallback.
        parameters: fields of `IntervalRule`.
    """
    return IntervalRule(rule=rule, **parameters).interval(structure, preference, volatility=volatility, log_snr=log_snr)


@dataclass(kw_only=True)
class AdaScope(IntervalRule):
    """Selects, for each prompt and iteration, the steps between structure and saturation, from latents.

    A decision that falls back takes the prompt's moving average instead; one within a step of it does not move.
    """

    pooling: Literal["prompt", "sample", "batch"] = "prompt"
    """Samples that share a decision."""
    mask_source: Literal["current", "previous"] = "current"
    """Whether this rollout decides or the ones before it. A mask that has not seen the rollout leaves the policy
    gradient unbiased, and lets the steps be trained while they are sampled (one-pass)."""
    memory_decay: float = 0.7
    """Weight of the past in the moving average of each prompt's interval; 0 remembers the last one alone."""
    _memory: dict[str, tuple[float, float]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _overall: tuple[float, float] | None = field(default=None, init=False, repr=False, compare=False)
    _last: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_source not in ("current", "previous"):
            raise ValueError(f"mask_source is current or previous, not {self.mask_source!r}")
        if self.pooling not in ("prompt", "sample", "batch"):
            raise ValueError(f"pooling is prompt, sample or batch, not {self.pooling!r}")

    def __call__(self, trajectory: Trajectory, iteration: int) -> Bool[Tensor, "b t"]:
        """The interval of each pool, less the steps without log_prob."""
        known = self.ahead(trajectory.prompts, trajectory.schedule, iteration)
        b, t = trajectory.log_prob.shape
        curves = (torch.zeros(b, t), torch.zeros(b, t + 1)) if self.rule == "fixed" else latent_curves(trajectory)
        change, preference, log_snr, trainable = _to_host(*curves, trajectory.schedule)
        pools = self._pools(trajectory.prompts)
        found = [self.interval(None, preference[i], volatility=change[i], log_snr=log_snr) for _, i in pools]
        if known is None:
            chosen = [self._steady(prompt, interval, t) for (prompt, _), interval in zip(pools, found, strict=True)]
        else:
            chosen = [self._remembered(prompt, t, log_snr) for prompt, _ in pools]
        self._remember([prompt for prompt, _ in pools], found, t)
        keep = _keep(pools, chosen, trainable, b)
        self._last = {
            "intervals": [[start, end] for start, end, _ in chosen],
            "prompts": [prompt for prompt, _ in pools],
            "reasons": dict(Counter(reason for *_, reason in (chosen if known is None else found))),
            "mean_start": float(np.mean([start for start, *_ in chosen])),
            "mean_end": float(np.mean([end for _, end, _ in chosen])),
            "fraction": float(keep.mean()),
        }
        return nonempty(torch.from_numpy(keep)).to(trajectory.log_prob.device)

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"] | None:
        """With mask_source "previous", the interval of each pool before its rollout; else None."""
        if self.mask_source != "previous":
            return None
        t, pools = schedule.num_steps, self._pools(prompts)
        log_snr, trainable = _host(schedule.log_snr), schedule.trainable.cpu().numpy()
        chosen = [self._remembered(prompt, t, log_snr) for prompt, _ in pools]
        return nonempty(torch.from_numpy(_keep(pools, chosen, trainable, len(prompts))))

    def telemetry(self) -> dict[str, Any]:
        """The last decision: intervals and prompts pool by pool, reasons counted, means over pools, share kept."""
        return dict(self._last)

    def state_dict(self) -> dict[str, Any]:
        """The moving average of each prompt's interval, and of all, as fractions of t."""
        memory = {prompt: list(share) for prompt, share in self._memory.items()}
        return {"memory": memory} | ({"overall": list(self._overall)} if self._overall else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the moving averages of `state`."""
        self._memory = {prompt: (start, end) for prompt, (start, end) in state["memory"].items()}
        overall = state.get("overall")
        self._overall = None if overall is None else (overall[0], overall[1])

    def _pools(self, prompts: list[str]) -> list[tuple[str, list[int]]]:
        keys = {"prompt": prompts, "sample": range(len(prompts)), "batch": [""] * len(prompts)}[self.pooling]
        rows: dict[Any, list[int]] = {}
        for row, key in enumerate(keys):
            rows.setdefault(key, []).append(row)
        return [("" if self.pooling == "batch" else prompts[pool[0]], pool) for pool in rows.values()]

    def _steady(self, prompt: str, interval: Interval, t: int) -> Interval:
        if prompt not in self._memory or interval.reason in ("fixed", "fallback:short"):
            return interval
        start, end = (share * t for share in self._memory[prompt])
        remembered = _round(start), max(_round(end), _round(start) + 1)
        if interval.reason.startswith("fallback"):
            return Interval(*remembered, f"{interval.reason}:memory")
        moved = max(abs(interval.start - start), abs(interval.end - end)) >= 1
        return interval if moved else Interval(*remembered, interval.reason)

    def _remembered(self, prompt: str, t: int, log_snr: np.ndarray) -> Interval:
        """What is known of a prompt before its rollout: its own past, that of all prompts, or nothing."""
        if self.rule == "fixed" or t < 4:
            return self.interval(None, np.zeros((1, t + 1)), volatility=np.zeros((1, t)), log_snr=log_snr)
        share = self._memory.get(prompt, self._overall)
        if share is None:
            return Interval(*self._fallback(t, log_snr), "fallback:first")
        start = _round(share[0] * t)
        return Interval(start, max(_round(share[1] * t), start + 1), "previous")

    def _remember(self, prompts: list[str], found: list[Interval], t: int) -> None:
        new: dict[str, list[tuple[int, int]]] = {}
        for prompt, (start, end, reason) in zip(prompts, found, strict=True):
            if not reason.startswith("fallback") and reason != "fixed":
                new.setdefault(prompt, []).append((start, end))
        for prompt, pairs in new.items():
            self._memory[prompt] = self._average(self._memory.get(prompt), pairs, t)
        if new:
            self._overall = self._average(self._overall, [pair for pairs in new.values() for pair in pairs], t)

    def _average(self, past: tuple[float, float] | None, pairs: list[tuple[int, int]], t: int) -> tuple[float, float]:
        share = np.sort(pairs, axis=0).mean(0) / t
        old = share if past is None else np.array(past)
        start, end = (self.memory_decay * old + (1 - self.memory_decay) * share).tolist()
        return start, end


def theoretical_correlation(
    alphas_cumprod_t: float | Tensor, alphas_cumprod_s: float | Tensor, variance: float | Tensor
) -> Float64[Tensor, "..."]:
    """Correlation of one latent component at two noise levels of the forward process (Theorem 2).

    sqrt((variance + 1/SNR) / (variance + 1/SNR of the noisier)): the law of ancestral sampling, not of ODE or Flow-SDE.
    The levels come in either order; variance is that of the component in the data, 1 for SD's latents.
    """
    alphas = (torch.as_tensor(alpha, dtype=torch.float64) for alpha in (alphas_cumprod_t, alphas_cumprod_s))
    clean, noisy = (variance + (1 - alpha) / alpha for alpha in alphas)
    return (torch.minimum(clean, noisy) / torch.maximum(clean, noisy)).sqrt()


def theoretical_cross_correlation(
    alphas_cumprod_t: float, alphas_cumprod_s: float, covariance: Float[Tensor, "d d"]
) -> Float64[Tensor, "d d"]:
    """Correlation of component i at level t with component j at the noisier level s (Theorem 2)."""
    covariance = torch.as_tensor(covariance, dtype=torch.float64)
    noise = math.sqrt(alphas_cumprod_s / alphas_cumprod_t) * (1 - alphas_cumprod_t)
    cross = math.sqrt(alphas_cumprod_t * alphas_cumprod_s) * covariance + noise * torch.eye(len(covariance)).double()
    variances = [alpha * covariance.diagonal() + 1 - alpha for alpha in (alphas_cumprod_t, alphas_cumprod_s)]
    return cross / torch.outer(*variances).sqrt()


def _keep(
    pools: list[tuple[str, list[int]]], intervals: list[Interval], trainable: np.ndarray, num_samples: int
) -> np.ndarray:
    keep = np.zeros((num_samples, len(trainable)), dtype=bool)
    for (_, rows), (start, end, _) in zip(pools, intervals, strict=True):
        keep[rows, start:end] = trainable[start:end]
    return keep


def _to_host(structure: Tensor, preference: Tensor, schedule: Schedule) -> list[np.ndarray]:
    """Volatility [b, t], preference [b, t+1], log_snr [t] and trainable [t], in one transfer."""
    parts = [structure, preference, schedule.log_snr.to(structure), schedule.trainable.to(structure)]
    flat = np.split(
        _host(torch.cat([part.flatten() for part in parts])), np.cumsum([part.numel() for part in parts])[:-1]
    )
    change, curve, log_snr, trainable = (values.reshape(part.shape) for values, part in zip(flat, parts, strict=True))
    return [change, curve, log_snr, trainable > 0]


def _host(x: Any) -> np.ndarray:
    return np.asarray(x.detach().double().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)


def _mean(curves: np.ndarray) -> np.ndarray:
    """Mean over the first axis, summed in the order of the values."""
    return np.sort(curves, axis=0).mean(0)


def _smooth(curve: np.ndarray, width: int) -> np.ndarray:
    """Centred moving average of odd width, edges replicated."""
    return np.convolve(np.pad(curve, width // 2, mode="edge"), np.full(width, 1 / width), mode="valid")


def _first(holds: np.ndarray, low: int, high: int, persist: int) -> int | None:
    """The first index in low..high from which `holds` is true `persist` times in a row."""
    starts = range(low, min(high, len(holds) - persist) + 1)
    return next((i for i in starts if holds[i : i + persist].all()), None)


def _round(x: float) -> int:
    return math.floor(x + 0.5)
