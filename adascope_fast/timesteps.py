"""Which denoising steps are trained: the selector protocol, and the baselines that AdaScope is compared with.

Axes: `b` samples, `t` denoising steps, noisiest first. Intervals are half open, [start, end).

flow_grpo, MixGRPO and ddpo-pytorch build this choice into their loops; here it is one call, and the engine trains what
it keeps. A step with std = 0 has no log_prob and is never kept. Random choices depend on (seed, iteration) alone.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from adascope_fast.schedules import Schedule
from adascope_fast.trajectory import Trajectory


class TimestepSelector(Protocol):
    """Chooses the (sample, step) pairs of one iteration."""

    def __call__(self, trajectory: Trajectory, iteration: int) -> Bool[Tensor, "b t"]:
        """True where a step of a sample is to be trained, on the trajectory's device."""
        ...

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"] | None:
        """The same choice before the rollout, on the CPU; None where it cannot be known yet."""
        ...

    def gains(self) -> Float64[Tensor, "b t"] | None:
        """What each step of the last rollout added to the preference; None if that was not sensed."""
        ...

    def senses(self, iteration: int) -> bool:
        """Whether the call of this iteration looks at the rollout, which then has to be sampled in full."""
        ...

    def telemetry(self) -> dict[str, Any]:
        """The last decision, as JSON; empty before the first."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the next decision depends on, as JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        ...


@dataclass
class _Stateless:
    _last: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def gains(self) -> None:
        """None: nothing is sensed."""

    def senses(self, iteration: int) -> bool:
        """Never: the steps depend on nothing that is sampled."""
        return False

    def telemetry(self) -> dict[str, Any]:
        """The last decision."""
        return dict(self._last)

    def state_dict(self) -> dict[str, Any]:
        """Empty: a decision depends on the iteration alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept the empty state alone."""
        if state:
            raise ValueError(
                f"{type(self).__name__} has no state, but is given {sorted(state)}; the checkpoint is another's"
            )

    def __call__(self, trajectory: Trajectory, iteration: int) -> Bool[Tensor, "b t"]:
        """What `ahead` says, on the trajectory's device."""
        keep = self.ahead(trajectory.prompts, trajectory.schedule, iteration)
        return keep.to(trajectory.log_prob.device)

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        """The steps of this iteration; they depend on nothing else."""
        raise NotImplementedError

    def _keep_interval(self, prompts: list[str], schedule: Schedule, start: int, end: int) -> Bool[Tensor, "b t"]:
        keep = torch.zeros(schedule.num_steps, dtype=torch.bool)
        keep[start:end] = True
        keep &= schedule.trainable.cpu()
        self._last = {"start": start, "end": end, "fraction": keep.sum().item() / schedule.num_steps}
        return nonempty(keep.expand(len(prompts), -1))


@dataclass
class EveryStep(_Stateless):
    """All steps that have a log_prob: DDPO and every other host without AdaScope."""

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        """All steps, every iteration."""
        return self._keep_interval(prompts, schedule, 0, schedule.num_steps)


@dataclass
class StaticRange(_Stateless):
    """Steps start..end-1 of every sample."""

    start: int
    end: int

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        """The same steps every iteration."""
        return self._keep_interval(prompts, schedule, *_checked(self.start, self.end, schedule.num_steps))


@dataclass
class RandomFraction(_Stateless):
    """floor(fraction * t) random steps of each sample, as ddpo-pytorch's shuffled timesteps with timestep_fraction."""

    fraction: float
    seed: int = 0

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        """Other steps for each sample and iteration; all that have a log_prob where those are too few."""
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction lies in (0, 1], but it is {self.fraction}; 1 trains every step")
        b, t = len(prompts), schedule.num_steps
        trainable = schedule.trainable.cpu()
        num_kept = max(1, int(self.fraction * t + 1e-9))
        draw = torch.from_numpy(np.random.default_rng((self.seed, iteration)).random((b, t)))
        chosen = draw.masked_fill(~trainable, 2).argsort(1)[:, :num_kept]
        keep = torch.zeros(b, t, dtype=torch.bool).scatter_(1, chosen, True) & trainable
        self._last = {"fraction": keep.double().mean().item()}
        return nonempty(keep)


@dataclass
class Window(_Stateless):
    """MixGRPO's window of `size` steps (2507.21802), sampled with `schedule.window(*selector.interval(...))`.

    "progressive" moves the window by `shift` steps every `period` iterations from `start`; at `limit` it begins again
    ("roll_back"; windows are cut short there) or stays at the last full one ("clamp"). "random" draws one of the full
    windows every `period` iterations. Unlike theirs, no window begins at the limit: it would be empty.
    """

    size: int = 4
    period: int = 25
    shift: int = 1
    start: int = 0
    limit: int | None = None
    order: Literal["progressive", "random"] = "progressive"
    at_limit: Literal["roll_back", "clamp"] = "roll_back"
    seed: int = 0

    def interval(self, num_steps: int, iteration: int) -> tuple[int, int]:
        """(start, end) in this iteration of a sampler with `num_steps` steps; known before the rollout."""
        first, limit = _checked(self.start, num_steps if self.limit is None else self.limit, num_steps)
        last = max(first, limit - self.size)
        if min(self.size, self.period, self.shift) < 1:
            raise ValueError(f"size, period and shift are at least 1, but are {self.size}, {self.period}, {self.shift}")
        phase = iteration // self.period
        if self.order == "random":
            begin = _draw(self.seed, phase, first, last)
        elif self.at_limit == "roll_back":
            begin = first + self.shift * (phase % math.ceil((limit - first) / self.shift))
        else:
            begin = min(first + self.shift * phase, last)
        return begin, min(begin + self.size, limit)

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        """The window of this iteration, for every sample."""
        return self._keep_interval(prompts, schedule, *self.interval(schedule.num_steps, iteration))


@dataclass
class FastWindow(_Stateless):
    """Flow-GRPO-Fast: `size` steps in a row, start uniform in low..high-size, anew every iteration."""

    size: int
    low: int
    high: int
    seed: int = 0

    def interval(self, num_steps: int, iteration: int) -> tuple[int, int]:
        """(start, end) in this iteration of a sampler with `num_steps` steps; known before the rollout."""
        low, high = _checked(self.low, self.high, num_steps)
        if not 1 <= self.size <= high - low:
            raise ValueError(f"a window of {self.size} steps does not fit into [{low}, {high}); lower size")
        begin = _draw(self.seed, iteration, low, high - self.size)
        return begin, begin + self.size

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        """One window for the whole batch of this iteration."""
        return self._keep_interval(prompts, schedule, *self.interval(schedule.num_steps, iteration))


@dataclass
class Complement:
    """The steps that another selector leaves out: if that one is right about where RL pays, this one learns little.

    `selector` senses, decides and remembers as ever, and its decision is in the telemetry; "fraction" is what this one
    keeps.
    """

    selector: TimestepSelector
    _fraction: float | None = field(default=None, init=False, repr=False, compare=False)

    def __call__(self, trajectory: Trajectory, iteration: int) -> Bool[Tensor, "b t"]:
        """The steps with a log_prob that `selector` does not keep."""
        return self._rest(self.selector(trajectory, iteration), trajectory.schedule)

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"] | None:
        """The same before the rollout, where `selector` knows."""
        keep = self.selector.ahead(prompts, schedule, iteration)
        return None if keep is None else self._rest(keep, schedule)

    def gains(self) -> Float64[Tensor, "b t"] | None:
        """Those of `selector`."""
        return self.selector.gains()

    def senses(self, iteration: int) -> bool:
        """Whether `selector` does."""
        return self.selector.senses(iteration)

    def telemetry(self) -> dict[str, Any]:
        """That of `selector`, whose steps are the ones left out."""
        inner = self.selector.telemetry()
        return inner if self._fraction is None else inner | {"fraction": self._fraction, "is_complement": True}

    def state_dict(self) -> dict[str, Any]:
        """That of `selector`."""
        return self.selector.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.selector.load_state_dict(state)

    def _rest(self, keep: Bool[Tensor, "b t"], schedule: Schedule) -> Bool[Tensor, "b t"]:
        rest = ~keep & schedule.trainable.to(keep.device)
        if not rest.any():
            raise ValueError(
                f"the complement trains what {type(self.selector).__name__} leaves out, and it leaves out no step "
                f"that has a log_prob; choose another selector"
            )
        self._fraction = rest.double().mean().item()
        return rest


def nonempty(keep: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """`keep` as it is; an error if it keeps nothing."""
    if not keep.any():
        raise ValueError(
            "every chosen step is deterministic (std = 0), so it has no log_prob; raise eta or noise_level"
        )
    return keep


def _checked(start: int, end: int, num_steps: int) -> tuple[int, int]:
    if not 0 <= start < end <= num_steps:
        raise ValueError(f"an interval has 0 <= start < end <= {num_steps} steps, but this is [{start}, {end})")
    return start, end


def _draw(seed: int, iteration: int, low: int, high: int) -> int:
    return int(np.random.default_rng((seed, iteration)).integers(low, high, endpoint=True))
