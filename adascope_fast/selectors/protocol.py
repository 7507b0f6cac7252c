"""The selector protocol: which denoising steps are trained.

Axes: `b` samples, `t` denoising steps, noisiest first. Intervals are half open, [start, end).

flow_grpo, MixGRPO and ddpo-pytorch build this choice into their loops; here it is one call, and the engine trains what
it keeps. A step with std = 0 has no log_prob and is never kept. Random choices depend on (seed, iteration) alone.
"""

from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from adascope_fast.rollout import Trajectory
from adascope_fast.schedules import Schedule
from adascope_fast.selectors.settings import LastStep


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


class Stateless:
    """A selector whose decision depends on the iteration alone: `ahead` is all that it has to say."""

    _last: ClassVar[dict[str, Any]] = {}
    """The last decision, replaced on the instance by each."""

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

    def _tell(self, decision: dict[str, Any]) -> None:
        object.__setattr__(self, "_last", decision)

    def _keep_interval(self, prompts: list[str], schedule: Schedule, start: int, end: int) -> Bool[Tensor, "b t"]:
        keep = torch.zeros(schedule.num_steps, dtype=torch.bool)
        keep[start:end] = True
        keep &= schedule.trainable.cpu()
        self._tell({"start": start, "end": end, "fraction": keep.sum().item() / schedule.num_steps})
        return nonempty(keep.expand(len(prompts), -1))


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


def num_usable(schedule: Schedule, last_step: LastStep) -> int:
    """Steps from the first on that a selector may keep: all but the last where that is left out."""
    is_skipped = last_step == "skip" or (last_step == "auto" and schedule.is_flow)
    return max(1, schedule.num_steps - is_skipped)
