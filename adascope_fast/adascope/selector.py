"""AdaScope (arXiv 2605.15855): train only the steps between "structure has formed" and "reward has saturated".

Axes: `b` samples, `t` denoising steps, noisiest first; states 0..t, t the image. Intervals are half open, [start, end).

`AdaScope` keeps what the rule needs from one iteration to the next; the rule itself is in `interval_rule`, the curves
come from `sensing`, and Theorem 2 is in `theory`. Decisions are made on the host in float64, from sums in the order of
the values: neither the order of the samples nor the number of ranks can matter.
"""

from collections import Counter
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float64
from pydantic import ConfigDict, Field, PrivateAttr, SkipValidation, model_validator
from torch import Tensor

from adascope_fast.adascope import settings
from adascope_fast.adascope.interval_rule import Interval as Interval
from adascope_fast.adascope.interval_rule import IntervalRule as IntervalRule
from adascope_fast.adascope.interval_rule import Scale, finite_mean, host, mean, rounded
from adascope_fast.adascope.interval_rule import select_interval as select_interval
from adascope_fast.adascope.sensing import Curves, LatentSensor, Sensor
from adascope_fast.distributed.ranks import gathered
from adascope_fast.rollout import Trajectory
from adascope_fast.schedules import Schedule
from adascope_fast.selectors.protocol import nonempty
from adascope_fast.theory import theoretical_correlation as theoretical_correlation
from adascope_fast.theory import theoretical_cross_correlation as theoretical_cross_correlation

SCALE_DECAY = 0.9
Pools = list[tuple[str, list[int]]]


class AdaScope(settings.AdaScope, IntervalRule):
    """Selects, for each prompt and iteration, the steps between structure and saturation; see `settings.AdaScope`.

    >>> keep = AdaScope().decide(curves_of_guesses(x0, final), prompts)  # in a loop of your own
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    sensor: SkipValidation[Sensor] = Field(default_factory=LatentSensor, repr=False)
    """Where the curves come from, and in which iterations."""
    _memory: dict[str, tuple[float, float]] = PrivateAttr(default_factory=dict)
    _overall: tuple[float, float] | None = PrivateAttr(default=None)
    _scale: Scale | None = PrivateAttr(default=None)
    _gains: np.ndarray | None = PrivateAttr(default=None)
    _last: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _sensor_suits_the_rule(self) -> Self:
        if self.rule == "knee_causal" and not self.sensor.is_causal:
            raise ValueError(
                "knee_causal decides while sampling, so its sensor must know a state's values at that state, got "
                f'{self.sensor}; use a DecodedSensor with stride = 1, or rule "knee"'
            )
        return self

    def fresh(self, **changes: Any) -> "AdaScope":
        """The same settings but for `changes`, and nothing remembered."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**fields | changes)

    def __call__(self, trajectory: Trajectory, iteration: int) -> Bool[Tensor, "b t"]:
        """The interval of each pool, less the steps without log_prob."""
        schedule = trajectory.schedule
        is_sensed = self.senses(iteration) and trajectory.num_steps >= 4
        keep = self.decide(
            self.sensor(trajectory) if is_sensed else None,
            trajectory.prompts,
            log_snr=schedule.log_snr,
            trainable=schedule.trainable,
        )
        if not self._last["fraction"]:  # of all processes' samples: there may be none of this one
            nonempty(keep)
        return keep.to(trajectory.log_prob.device)

    def decide(
        self,
        curves: Curves | None,
        prompts: list[str],
        *,
        log_snr: Any = None,
        trainable: Any = None,
        num_steps: int | None = None,
    ) -> Bool[Tensor, "b t"]:
        """The steps to train of samples whose curves were sensed by whatever means; on the CPU.

        With several processes each gives its own samples, and a prompt's samples on all of them have one interval.

        Args:
            curves: None where nothing was sensed: the decision is made from memory.
            log_snr: [t], of the state that enters each step; places the fallback.
            trainable: [t], False where a step has no log_prob; None: all have one.
            num_steps: t, where neither curves nor log_snr say it.
        """
        t = num_steps if curves is None else curves.preference.shape[1] - 1
        t = t if t is not None else len(log_snr)
        usable = np.ones(t, dtype=bool) if trainable is None else host(trainable) > 0
        sensed = None if curves is None else _to_host(curves)
        every_prompt, sensed, own = gathered(prompts, sensed)
        return self._decided(every_prompt, sensed, None if log_snr is None else host(log_snr), usable, own)

    def _decided(
        self,
        every_prompt: list[str],
        sensed: dict[str, np.ndarray] | None,
        log_snr: np.ndarray | None,
        usable: np.ndarray,
        own: slice,
    ) -> Bool[Tensor, "m t"]:
        """The steps of the samples `own` of all ranks' samples."""
        t = len(usable)
        pools = self._pools(every_prompt)
        remembered = [self._remembered(prompt, t, log_snr) for prompt, _ in pools]
        if sensed is None:
            found = chosen = remembered
        else:
            found = [self._found(sensed, rows, log_snr) for _, rows in pools]
            is_ahead = self.mask_source == "previous"
            steady = [self._steady(prompt, interval, t) for (prompt, _), interval in zip(pools, found, strict=True)]
            chosen = remembered if is_ahead else steady
            self._remember([prompt for prompt, _ in pools], found, t)
            self._rescale(sensed, [rows for _, rows in pools])
        keep = _keep(pools, chosen, usable, len(every_prompt))
        self._gains = None if sensed is None else _gains(sensed["preference"], pools)[own]
        self._tell(pools, chosen, found if self.mask_source == "previous" else chosen, keep, usable, sensed)
        return torch.from_numpy(keep[own])

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"] | None:
        """The interval of each pool before its rollout, where memory decides; else None.

        It does with mask_source "previous", and in an iteration that is not sensed.
        """
        if not self.senses(iteration):
            usable = host(schedule.trainable) > 0
            return nonempty(self._decided(prompts, None, host(schedule.log_snr), usable, slice(None)))
        if self.mask_source != "previous":
            return None
        t, pools = schedule.num_steps, self._pools(prompts)
        log_snr, trainable = host(schedule.log_snr), schedule.trainable.cpu().numpy()
        chosen = [self._remembered(prompt, t, log_snr) for prompt, _ in pools]
        return nonempty(torch.from_numpy(_keep(pools, chosen, trainable, len(prompts))))

    def sampler(self, schedule: Schedule, iteration: int) -> Schedule:
        """The schedule as it is: before the rollout nobody knows where to do without noise."""
        return schedule

    def senses(self, iteration: int) -> bool:
        """Whether this iteration's curves are looked at."""
        return self.is_sensed and iteration % self.sensor.every == 0

    def gains(self) -> Float64[Tensor, "b t"] | None:
        """What each step of the last rollout added to the preference, averaged over its pool; None if not sensed."""
        return None if self._gains is None else torch.from_numpy(self._gains)

    def telemetry(self) -> dict[str, Any]:
        """The last decision: intervals and prompts pool by pool, reasons counted, means over pools, share kept.

        `curves` holds the means over all sensed samples; `deterministic` counts chosen steps that have no log_prob.
        """
        return dict(self._last)

    def state_dict(self) -> dict[str, Any]:
        """The moving average of each prompt's interval, and of all, as fractions of t; that of the curves' scale."""
        state: dict[str, Any] = {"memory": {prompt: list(share) for prompt, share in self._memory.items()}}
        for name, value in (("overall", self._overall), ("scale", self._scale)):
            state |= {} if value is None else {name: list(value)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the moving averages of `state`."""
        self._memory = {prompt: (start, end) for prompt, (start, end) in state["memory"].items()}
        overall, scale = state.get("overall"), state.get("scale")
        self._overall = None if overall is None else (overall[0], overall[1])
        self._scale = None if scale is None else Scale(*scale)

    def _found(self, sensed: dict[str, np.ndarray], rows: list[int], log_snr: np.ndarray | None) -> Interval:
        part = {name: values[rows] for name, values in sensed.items()}
        return self.interval(
            part.get("structure"),
            part["preference"],
            volatility=part.get("volatility"),
            log_snr=log_snr,
            scale=self._scale,
        )

    def _pools(self, prompts: list[str]) -> Pools:
        keys = {"prompt": prompts, "sample": range(len(prompts)), "batch": [""] * len(prompts)}[self.pooling]
        rows: dict[Any, list[int]] = {}
        for row, key in enumerate(keys):
            rows.setdefault(key, []).append(row)
        return [("" if self.pooling == "batch" else prompts[pool[0]], pool) for pool in rows.values()]

    def _steady(self, prompt: str, interval: Interval, t: int) -> Interval:
        if prompt not in self._memory or interval.reason in ("fixed", "schedule", "fallback:short"):
            return interval
        start, end = (share * t for share in self._memory[prompt])
        remembered = rounded(start), max(rounded(end), rounded(start) + 1)
        if interval.reason.startswith("fallback"):
            return Interval(*remembered, f"{interval.reason}:memory")
        moved = max(abs(interval.start - start), abs(interval.end - end)) >= 1
        return interval if moved else Interval(*remembered, interval.reason)

    def _remembered(self, prompt: str, t: int, log_snr: np.ndarray | None) -> Interval:
        """What is known of a prompt before its rollout: its own past, that of all prompts, or nothing."""
        unsensed = self.unsensed(t, log_snr)
        if unsensed is not None:
            return unsensed
        share = self._memory.get(prompt, self._overall)
        if share is None:
            return Interval(*self.fallback_interval(t, log_snr), "fallback:first")
        start = rounded(share[0] * t)
        return Interval(start, max(rounded(share[1] * t), start + 1), "previous")

    def _remember(self, prompts: list[str], found: list[Interval], t: int) -> None:
        new: dict[str, list[tuple[int, int]]] = {}
        for prompt, (start, end, reason) in zip(prompts, found, strict=True):
            if not reason.startswith("fallback") and reason not in ("fixed", "schedule"):
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

    def _rescale(self, sensed: dict[str, np.ndarray], pools: list[list[int]]) -> None:
        """Let the finished curves into the moving average of their scale, which "knee_causal" needs."""
        if self.rule != "knee_causal":
            return
        parts = [{name: values[rows] for name, values in sensed.items()} for rows in pools]
        scales = [
            self.scale(part.get("structure"), part["preference"], volatility=part.get("volatility")) for part in parts
        ]
        known = [scale for scale in scales if scale is not None]
        if known:
            new = mean(np.array(known))
            old = new if self._scale is None else np.array(self._scale)
            self._scale = Scale(*(SCALE_DECAY * old + (1 - SCALE_DECAY) * new).tolist())

    def _tell(
        self,
        pools: Pools,
        chosen: list[Interval],
        reasons: list[Interval],
        keep: np.ndarray,
        usable: np.ndarray,
        sensed: dict[str, np.ndarray] | None,
    ) -> None:
        self._last = {
            "intervals": [[start, end] for start, end, _ in chosen],
            "prompts": [prompt for prompt, _ in pools],
            "reasons": dict(Counter(reason for *_, reason in reasons)),
            "mean_start": float(np.mean([start for start, *_ in chosen])),
            "mean_end": float(np.mean([end for _, end, _ in chosen])),
            "fraction": float(keep.mean()),
            "deterministic": sum(
                int((~usable[start:end]).sum()) * len(rows)
                for (_, rows), (start, end, _) in zip(pools, chosen, strict=True)
            ),
        }
        if sensed is not None:
            self._last["curves"] = {name: _as_json(finite_mean(values)) for name, values in sensed.items()}


def _keep(pools: Pools, intervals: list[Interval], trainable: np.ndarray, num_samples: int) -> np.ndarray:
    keep = np.zeros((num_samples, len(trainable)), dtype=bool)
    for (_, rows), (start, end, _) in zip(pools, intervals, strict=True):
        keep[rows, start:end] = trainable[start:end]
    return keep


def _gains(preference: np.ndarray, pools: Pools) -> np.ndarray:
    gains = np.empty((preference.shape[0], preference.shape[1] - 1))
    for _, rows in pools:
        gains[rows] = np.diff(finite_mean(preference[rows]))
    return gains


def _as_json(values: np.ndarray) -> list[float | None]:
    return [round(float(value), 6) if np.isfinite(value) else None for value in values]


def _to_host(curves: Curves) -> dict[str, np.ndarray]:
    """The curves by name, in one transfer."""
    parts = {name: value for name, value in curves._asdict().items() if value is not None}
    flat = host(torch.cat([torch.as_tensor(value).flatten() for value in parts.values()]))
    split = np.split(flat, np.cumsum([value.numel() for value in parts.values()])[:-1])
    return {name: values.reshape(parts[name].shape) for name, values in zip(parts, split, strict=True)}
