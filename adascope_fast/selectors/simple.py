"""The selectors that AdaScope is compared with: every step, a range, random ones, a threshold, what another leaves out.

Axes: `b` samples, `t` denoising steps, noisiest first. Intervals are half open, [start, end).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from adascope_fast.backbone import in_double
from adascope_fast.rollout import Trajectory
from adascope_fast.schedules import Schedule
from adascope_fast.selectors import settings
from adascope_fast.selectors.protocol import Stateless, TimestepSelector, checked, nonempty, num_usable
from adascope_fast.selectors.settings import LastStep
from adascope_fast.theory import schedule_correlation


class EveryStep(settings.EveryStep, Stateless):
    """See `settings.EveryStep`."""

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        """All steps, every iteration; the last one as `last_step` says."""
        return self._keep_interval(prompts, schedule, 0, num_usable(schedule, self.last_step))


class StaticRange(settings.StaticRange, Stateless):
    """See `settings.StaticRange`."""

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        """The same steps every iteration."""
        return self._keep_interval(prompts, schedule, *checked(self.start, self.end, schedule.num_steps))


class LateStart(settings.LateStart, Stateless):
    """See `settings.LateStart`."""

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        """The same steps every iteration."""
        steps = schedule.num_steps
        return self._keep_interval(prompts, schedule, *checked(*self.range_of(steps), steps))


class RandomFraction(settings.RandomFraction, Stateless):
    """See `settings.RandomFraction`."""

    seed: int = 0
    """Of the draws, with the iteration."""

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        """Other steps for each sample and iteration; all that have a log_prob where those are too few."""
        b, t = len(prompts), schedule.num_steps
        usable = schedule.trainable.cpu() & (torch.arange(t) < num_usable(schedule, self.last_step))
        num_kept = max(1, int(self.fraction * t + 1e-9))
        draw = torch.from_numpy(np.random.default_rng((self.seed, iteration)).random((b, t)))
        chosen = draw.masked_fill(~usable, 2).argsort(1)[:, :num_kept]
        keep = torch.zeros(b, t, dtype=torch.bool).scatter_(1, chosen, True) & usable
        self._tell({"fraction": keep.double().mean().item()})
        return nonempty(keep)


class Threshold(settings.Threshold, Stateless):
    """See `settings.Threshold`."""

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> Bool[Tensor, "b t"]:
        """The same steps every iteration."""
        uncertainty = 1 - schedule_correlation(schedule, self.variance)
        keep = (uncertainty >= self.uncertainty_low) & (uncertainty < self.uncertainty_high)
        if not keep.any():
            raise ValueError(
                f"no step has an uncertainty in [{self.uncertainty_low}, {self.uncertainty_high}): they reach from "
                f"{uncertainty.min():.3g} to {uncertainty.max():.3g} on this schedule; move the bounds"
            )
        keep &= schedule.trainable.cpu()
        self._tell({"fraction": keep.double().mean().item()})
        return nonempty(keep.expand(len(prompts), -1))


@dataclass
class Complement:
    """The steps that another selector leaves out: if that one is right about where RL pays, this one learns little.

    `selector` senses, decides and remembers as ever, and its decision is in the telemetry; "fraction" is what this one
    keeps.
    """

    selector: TimestepSelector
    last_step: LastStep = "auto"
    """`auto` leaves out the last step of flow samplers, too."""
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
        usable = torch.arange(schedule.num_steps, device=keep.device) < num_usable(schedule, self.last_step)
        rest = ~keep & usable & schedule.trainable.to(keep.device)
        if not rest.any():
            raise ValueError(
                f"the complement trains what {type(self.selector).__name__} leaves out, and it leaves out no step "
                f"that has a log_prob; choose another selector"
            )
        self._fraction = in_double(rest).mean().item()
        return rest
