"""Which denoising steps are trained: the selector protocol, and the baselines that AdaScope is compared with.

Axes: `b` samples, `t` denoising steps, noisiest first. Intervals are half open, [start, end).

flow_grpo, MixGRPO and ddpo-pytorch build this choice into their loops; here it is one call, and the engine trains what
it keeps. A step with std = 0 has no log_prob and is never kept. Random choices depend on (seed, iteration) alone.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from adascope_fast.schedules import Schedule
from adascope_fast.theory import schedule_correlation
from adascope_fast.trajectory import Trajectory


class TimestepSelector(Protocol):
    """Chooses the (sample, step) pairs of one iteration."""

    def __call__(self, trajectory: Trajectory, iteration: int) -> Bool[Tensor, "b t"]:
        """True where a step of a sample is to be trained, on the trajectory's device."""
        ...

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"] | None:
        """The same choice before the rollout, on the CPU; None where it cannot be known yet."""
        ...

    def sampler(self, schedule: Schedule, iteration: int) -> Schedule:
        """What this iteration's rollout samples with, if not all of `schedule`."""
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
class Stateless:
    """A selector whose decision depends on the iteration alone: `ahead` is all that it has to say."""

    _last: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def sampler(self, schedule: Schedule, iteration: int) -> Schedule:
        """The schedule as it is."""
        return schedule

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
class EveryStep(Stateless):
    """All steps that have a log_prob: DDPO and every other host without AdaScope."""

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        """All steps, every iteration."""
        return self._keep_interval(prompts, schedule, 0, schedule.num_steps)


@dataclass
class StaticRange(Stateless):
    """Steps start..end-1 of every sample."""

    start: int
    end: int

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        """The same steps every iteration."""
        return self._keep_interval(prompts, schedule, *checked(self.start, self.end, schedule.num_steps))


@dataclass
class RandomFraction(Stateless):
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
class Threshold(Stateless):
    """Steps whose uncertainty by Theorem 2, 1 - correlation of the latents around the step, lies in [low, high).

    It follows from the noise levels alone (`theory.schedule_correlation`), for data of the given variance: the same
    steps for every sampler of the same levels, whatever the model and the reward. `high` above 1 is no bound.
    """

    low: float
    high: float
    variance: float = 1.0

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        """The same steps every iteration."""
        uncertainty = 1 - schedule_correlation(schedule, self.variance)
        keep = (uncertainty >= self.low) & (uncertainty < self.high)
        if not keep.any():
            raise ValueError(
                f"no step has an uncertainty in [{self.low}, {self.high}): they reach from {uncertainty.min():.3g} to "
                f"{uncertainty.max():.3g} on this schedule; move the bounds"
            )
        keep &= schedule.trainable.cpu()
        self._last = {"fraction": keep.double().mean().item()}
        return nonempty(keep.expand(len(prompts), -1))


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

    def sampler(self, schedule: Schedule, iteration: int) -> Schedule:
        """That of `selector`."""
        return self.selector.sampler(schedule, iteration)

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


def checked(start: int, end: int, num_steps: int) -> tuple[int, int]:
    """[start, end) as it is; an error if that is no interval of the steps."""
    if not 0 <= start < end <= num_steps:
        raise ValueError(f"an interval has 0 <= start < end <= {num_steps} steps, but this is [{start}, {end})")
    return start, end
