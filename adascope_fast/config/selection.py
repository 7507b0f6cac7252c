"""The sections of a configuration that say which steps are trained: the selector, and what AdaScope senses."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from adascope_fast.config.types import (
    Count,
    CountOrZero,
    Decay,
    Positive,
    PositiveOrZero,
    Section,
    Share,
    ShareOrZero,
    Text,
    or_none,
)


class SelectorChoice(Section):
    """Which denoising steps are trained; steps are counted from noise (0) to picture (T), `end` excluded."""

    name: Literal[
        "adascope",
        "complement",
        "every_step",
        "random_fraction",
        "static_range",
        "late_start",
        "threshold",
        "window",
        "fast_window",
    ] = "adascope"
    """`adascope` senses the steps worth training, `complement` trains all but those; the others are the field's."""
    pooling: Literal["prompt", "sample", "batch"] = "prompt"
    """Samples that share one interval (adascope)."""
    rule: Literal["knee", "knee_causal", "literal", "fraction", "schedule", "fixed"] = "knee"
    """How curves become an interval; `literal` is the paper's formula, README's "Finding the interval" has the rest."""
    kappa: Positive = 0.25
    """The start: structural volatility has fallen to this share of its peak above the floor (adascope)."""
    phi_end: Annotated[float, Field(gt=0, lt=1)] = 0.10
    """The end: this share of the gain is still to come (adascope)."""
    persistence: Count = 2
    """Steps in a row that must agree before a start or an end counts (adascope)."""
    min_fraction: Share = 0.20
    """Shortest interval of `knee`, `knee_causal` and `fraction`, of T (adascope)."""
    max_fraction: Share = 0.80
    """Longest interval of these rules, of T (adascope)."""
    formed: Share = 0.80
    """`fraction` starts where this share of the structure's change is done (adascope)."""
    literal_epsilon: Positive = 0.02
    """What `literal` takes for zero, as a share of a curve's range (adascope)."""
    fallback: Annotated[list[ShareOrZero], Field(min_length=2, max_length=2)] | None = None
    """Interval where no rule decides, of T, as [0.1, 0.64]; absent: by log-SNR (adascope)."""
    memory_decay: Decay = 0.7
    """Weight of the past in the moving average of a prompt's interval (adascope)."""
    mask_source: Literal["current", "previous"] = "current"
    """`previous`: a rollout's steps come from the rollouts before it, so they are known beforehand (adascope)."""
    fraction: Share | None = None
    """Share of the steps to train (random_fraction)."""
    start: CountOrZero | None = None
    """First trained step (static_range; late_start, absent: T / 5), or first of a window's range (absent: 0)."""
    end: Count | None = None
    """Step after the last trained one (static_range), or after the range a window moves in (absent: T)."""
    uncertainty_low: PositiveOrZero | None = None
    """Train the steps whose uncertainty by Theorem 2 is at least this (threshold)."""
    uncertainty_high: Positive | None = None
    """Train the steps whose uncertainty by Theorem 2 is below this (threshold)."""
    window_size: Count = 2
    """Steps in the window (window, fast_window)."""
    ode_outside: bool = True
    """Rollouts have noise in the window alone, as MixGRPO's and Flow-GRPO-Fast's (window, fast_window)."""
    shift_every: Count = 25
    """Iterations after which the window moves on (window)."""
    window_shift: Count = 1
    """Steps by which it moves; window_size for windows that do not overlap (window)."""
    window_order: Literal["progressive", "random"] = "progressive"
    """It moves towards the picture, or to a random place (window)."""
    at_limit: Literal["roll_back", "clamp"] = "roll_back"
    """At the end of its range it begins again, or stays (window)."""
    shift_decay: Literal["none", "linear", "exponential"] = "none"
    """How `shift_every` falls as the window moves on: linearly to shift_every_min, or exponentially (window)."""
    shift_every_min: Count = 1
    """`shift_every` at the end of the range, with linear decay (window)."""
    decay_rate: Positive = 0.1
    """Rate of the exponential decay for each step beyond `decay_from` (window)."""
    decay_from: CountOrZero = 13
    """Step from which the exponential decay sets in (window)."""

    def range_of(self, num_steps: int) -> tuple[int, int]:
        """`start` and `end`, or what stands for them in `num_steps` steps; SPO (2406.04314) starts at step 4 of 20."""
        first = (num_steps + 2) // 5 if self.name == "late_start" else 0
        return first if self.start is None else self.start, self.end or num_steps

    @model_validator(mode="after")
    def _has_its_parameters(self) -> Self:
        if self.name == "random_fraction" and self.fraction is None:
            raise ValueError(
                "random_fraction needs selector.fraction, got none; set for example selector.fraction = 0.5"
            )
        if self.name == "static_range" and (self.start is None or self.end is None):
            raise ValueError(
                f"static_range needs selector.start and selector.end, got start = {or_none(self.start)} and "
                f"end = {or_none(self.end)}; set for example selector.start = 2 and selector.end = 12"
            )
        if self.name == "threshold" and (self.uncertainty_low is None or self.uncertainty_high is None):
            raise ValueError(
                "threshold needs selector.uncertainty_low and selector.uncertainty_high, got "
                f"{or_none(self.uncertainty_low)} and {or_none(self.uncertainty_high)}; adascope-fast calibrate shows "
                f"the uncertainty of each step"
            )
        low, high = self.uncertainty_low, self.uncertainty_high
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"selector.uncertainty_low must be below selector.uncertainty_high, got {low} and {high}; swap them"
            )
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
        if self.start is not None and self.end is not None and self.start >= self.end:
            raise ValueError(
                f"selector.start must be below selector.end, got start = {self.start} and end = {self.end}; "
                f"set selector.end to {self.start + 1} or more"
            )
        return self


class Sensing(Section):
    """What AdaScope sees of a rollout, and what that may cost."""

    kind: Literal["latent", "semantic", "reward_only"] = "latent"
    """Correlations of the clean guesses, CLIP and reward of the decoded ones, or reward and correlations."""
    decoder: Literal["vae", "tiny", "linear"] = "vae"
    """What decodes the guesses: the model's VAE, a tiny autoencoder, or a linear map fitted to the first rollout."""
    tiny: Text | None = None
    """Folder or Hugging Face repository of the tiny autoencoder (diffusers' AutoencoderTiny)."""
    clip: Text | None = None
    """CLIP of `semantic`, as `reward.clip`; absent: `scenes-clip`, for the embedded models alone."""
    stride: Count = 4
    """States from one that is decoded to the next; the last is always decoded, those between are interpolated."""
    num_samples: CountOrZero = 2
    """Pictures of each prompt that are decoded; 0: all."""
    every: Count | None = None
    """Iterations from one that is sensed to the next; absent: 1 for `latent`, else 2. Those between use the memory."""

    @property
    def sense_every(self) -> int:
        """`every`, or what stands for it."""
        return self.every or (1 if self.kind == "latent" else 2)

    @model_validator(mode="after")
    def _names_its_decoder(self) -> Self:
        if self.decoder == "tiny" and self.tiny is None:
            raise ValueError(
                'sensing.decoder = "tiny" needs sensing.tiny, got none; name the folder or repository of an '
                'AutoencoderTiny made for this model, or set sensing.decoder = "vae"'
            )
        return self
