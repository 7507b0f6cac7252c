"""Sections of the simple selectors and the windows: the keys of `[selector]`, by `selector.name`.

Steps are counted from noise (0) to image (T), `end` excluded. Nothing here imports torch.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from adascope_fast.settings import (
    Count,
    CountOrZero,
    Own,
    Positive,
    PositiveOrZero,
    Section,
    Share,
    Steps,
    only_with,
    or_none,
)

LastStep = Literal["auto", "train", "skip"]


class EveryStep(Section):
    """All steps that have a log_prob: DDPO and every other method without AdaScope.

    A flow sampler's last step is left out unless `last_step = "train"`, as in flow_grpo (timestep_fraction 0.99): its
    std is small, so it would carry a third to a half of the gradient.
    """

    implementation: ClassVar[str] = "adascope_fast.selectors.simple:EveryStep"

    name: Literal["every_step"] = "every_step"
    last_step: LastStep = "auto"
    """`auto` leaves out the last step of flow samplers; `train` keeps it, `skip` leaves it out of every sampler."""

    def share(self, num_steps: int) -> float:
        """Share of the steps that are trained, for a plan."""
        return 1.0


class RandomFraction(Section):
    """floor(fraction * T) random steps of each sample, as ddpo-pytorch's shuffled timesteps with timestep_fraction."""

    implementation: ClassVar[str] = "adascope_fast.selectors.simple:RandomFraction"

    name: Literal["random_fraction"] = "random_fraction"
    fraction: Share = Field(examples=[0.5])
    """Share of the steps to train; 1 trains every step."""
    last_step: LastStep = "auto"
    """`auto` leaves out the last step of flow samplers; `train` keeps it, `skip` leaves it out of every sampler."""

    def share(self, num_steps: int) -> float:
        """Share of the steps that are trained, for a plan."""
        return self.fraction


class StaticRange(Section):
    """Steps start..end-1 of every sample."""

    implementation: ClassVar[str] = "adascope_fast.selectors.simple:StaticRange"

    name: Literal["static_range"] = "static_range"
    start: CountOrZero = Field(examples=[2])
    """First trained step."""
    end: Count = Field(examples=[12])
    """Step after the last trained one."""

    @model_validator(mode="after")
    def _is_an_interval(self) -> Self:
        refuse_empty(self.start, self.end)
        return self

    def share(self, num_steps: int) -> float:
        """Share of the steps that are trained, for a plan."""
        return (min(self.end, num_steps) - self.start) / num_steps


class LateStart(Section):
    """Steps from `start` on: SPO (2406.04314) begins at step 4 of 20."""

    implementation: ClassVar[str] = "adascope_fast.selectors.simple:LateStart"

    name: Literal["late_start"] = "late_start"
    start: CountOrZero | None = None
    """First trained step; absent: T / 5."""
    end: Count | None = None
    """Step after the last trained one; absent: T."""

    @model_validator(mode="after")
    def _is_an_interval(self) -> Self:
        refuse_empty(self.start, self.end)
        return self

    def range_of(self, num_steps: int) -> tuple[int, int]:
        """First trained step and the one after the last, of `num_steps`."""
        return (num_steps + 2) // 5 if self.start is None else self.start, self.end or num_steps

    def share(self, num_steps: int) -> float:
        """Share of the steps that are trained, for a plan."""
        start, end = self.range_of(num_steps)
        return (end - start) / num_steps


class Threshold(Section):
    """Steps whose uncertainty by Theorem 2, 1 - correlation of the latents around the step, lies within bounds.

    It follows from the noise levels alone, for data of the given variance: the same steps for every sampler of the same
    levels, whatever the model and the reward. `adascope-fast calibrate` shows the uncertainty of each step.
    """

    implementation: ClassVar[str] = "adascope_fast.selectors.simple:Threshold"

    name: Literal["threshold"] = "threshold"
    uncertainty_low: PositiveOrZero = Field(examples=[0.02])
    """Train the steps whose uncertainty is at least this."""
    uncertainty_high: Positive = Field(examples=[0.1])
    """Train the steps whose uncertainty is below this; above 1 it is no bound."""
    variance: Positive = 1.0
    """Variance of the data's latents; about 1 for Stable Diffusion's."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.uncertainty_low >= self.uncertainty_high:
            raise ValueError(
                "selector.uncertainty_low must be below selector.uncertainty_high, got "
                f"{self.uncertainty_low} and {self.uncertainty_high}; swap them"
            )
        return self

    def share(self, num_steps: int) -> float:
        """The most that can be trained: the noise levels that decide are not read for a plan."""
        return 1.0


class _Windowed(Section):
    window_size: Steps = 2
    """Steps in the window."""
    start: CountOrZero | None = None
    """First step of the range that the window moves in; absent: 0."""
    end: Count | None = None
    """Step after that range; absent: T, or T - 1 for flow samplers (see `last_step`)."""
    last_step: LastStep = "auto"
    """`auto` leaves out the last step of flow samplers; `train` keeps it, `skip` leaves it out of every sampler."""
    ode_outside: bool = True
    """Rollouts have noise in the window alone, as MixGRPO's and Flow-GRPO-Fast's; false: noise throughout."""

    @model_validator(mode="after")
    def _is_an_interval(self) -> Self:
        refuse_empty(self.start, self.end)
        return self

    def share(self, num_steps: int) -> float:
        """Share of the steps that are trained, for a plan."""
        return min(1.0, self.window_size / num_steps)


class Window(_Windowed):
    """MixGRPO's window that moves as training goes on (2507.21802).

    "progressive" moves the window from `start` by `window_shift` steps every `shift_every` iterations (`window_size`
    for windows that do not overlap); at the end of its range it begins again ("roll_back"; windows are cut short there)
    or stays at the last full one ("clamp"). "random" draws one of the full windows every `shift_every` iterations.
    Unlike theirs, no window begins at the end of the range: it would be empty.
    """

    implementation: ClassVar[str] = "adascope_fast.selectors.windows:Window"

    name: Literal["window"] = "window"
    shift_every: Count = 25
    """Iterations after which the window moves on."""
    window_shift: Annotated[Steps, only_with(window_order=["progressive"])] = 1
    """Steps by which it moves."""
    window_order: Literal["progressive", "random"] = "progressive"
    """It moves towards the image, or to a random place."""
    at_limit: Annotated[Literal["roll_back", "clamp"], only_with(window_order=["progressive"])] = "roll_back"
    """At the end of its range it begins again, or stays."""
    shift_decay: Literal["none", "linear", "exponential"] = "none"
    """How `shift_every` falls as a progressive window that begins at l moves on: linearly to `shift_every_min` at the
    end of the range, rounded down, or as ceil(shift_every * exp(-decay_rate * max(0, l - decay_from)))."""
    shift_every_min: Annotated[Count, only_with(shift_decay=["linear"])] = 1
    """`shift_every` at the end of the range, with linear decay."""
    decay_rate: Annotated[Positive, only_with(shift_decay=["exponential"])] = 0.1
    """Rate of the exponential decay for each step beyond `decay_from`."""
    decay_from: Annotated[CountOrZero, only_with(shift_decay=["exponential"])] = 13
    """Step from which the exponential decay sets in."""

    @model_validator(mode="after")
    def _decays_in_order(self) -> Self:
        if self.window_order == "random" and self.shift_decay != "none":
            raise ValueError(
                "selector.shift_every does not decay with random windows, got selector.shift_decay = "
                f'"{self.shift_decay}"; set it to "none", or selector.window_order = "progressive"'
            )
        if self.shift_every_min > self.shift_every:
            raise ValueError(
                f"selector.shift_every_min must not exceed selector.shift_every, got {self.shift_every_min} and "
                f"{self.shift_every}; lower it"
            )
        return self


class FastWindow(_Windowed):
    """Flow-GRPO-Fast's window: a random place in each iteration."""

    implementation: ClassVar[str] = "adascope_fast.selectors.windows:FastWindow"

    name: Literal["fast_window"] = "fast_window"


class OwnSelector(Own):
    """One of your own: `name` is `module:object`, other keys are its arguments."""

    named_by: ClassVar[str] = "selector.name"


def refuse_empty(start: int | None, end: int | None) -> None:
    """ValueError unless `start` is below `end`, where both are given."""
    if start is not None and end is not None and start >= end:
        raise ValueError(
            f"selector.start must be below selector.end, got start = {or_none(start)} and end = {or_none(end)}; "
            f"set selector.end to {start + 1} or more"
        )
