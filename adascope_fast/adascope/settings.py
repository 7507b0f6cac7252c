"""Sections of AdaScope and its complement (`[selector]`) and of what they sense (`[sensing]`).

Steps are counted from noise (0) to image (T), `end` excluded. Nothing here imports torch.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from adascope_fast.selectors.settings import LastStep
from adascope_fast.settings import (
    Count,
    CountOrZero,
    Decay,
    Positive,
    Section,
    Share,
    ShareOrZero,
    Steps,
    Text,
    imported,
    only_with,
)

Rule = Literal["knee", "knee_causal", "literal", "fraction", "schedule", "fixed"]
KNEES = ["knee", "knee_causal"]
BOUNDED = [*KNEES, "fraction"]
PAPER = (0.106, 0.636)
"""The paper's mean interval, steps 5.3 to 31.8 of 50, as shares of T."""
MEAN_SHARE = 0.53
"""Its length, (31.8 - 5.3) of 50 steps."""
SATURATION = 0.2
"""A calibration aims at the end where this share of the reward's gain is still to come."""


class IntervalRule(Section):
    """How the curves of the samples that share a decision become an interval; shares are of T and round half up."""

    rule: Rule = "knee"
    """`knee`: from structure's knee to reward's saturation; `literal` is the paper's formula; docs/adascope.md has the
    rest."""
    kappa: Annotated[Positive, only_with(rule=KNEES)] = 0.25
    """The start: structural volatility has fallen to this share of its peak above the floor."""
    phi_end: Annotated[float, Field(gt=0, lt=1), only_with(rule=BOUNDED)] = 0.10
    """The end: this share of the gain since the start is still to come."""
    persistence: Annotated[Steps, only_with(rule=BOUNDED)] = 2
    """Steps in a row that must agree before a start or an end counts."""
    min_fraction: Annotated[Share, only_with(rule=BOUNDED)] = 0.20
    """Shortest interval, of T."""
    max_fraction: Annotated[Share, only_with(rule=BOUNDED)] = 0.80
    """Longest interval, of T."""
    formed: Annotated[Share, only_with(rule=["fraction"])] = 0.80
    """`fraction` starts where this share of the structure's change is done."""
    literal_epsilon: Annotated[Positive, only_with(rule=["literal"])] = 0.02
    """What `literal` takes for zero, as a share of a curve's range; the paper's value is unpublished."""
    fallback: Annotated[tuple[ShareOrZero, ShareOrZero] | None, Field(strict=False)] = None
    """Interval where no rule decides, of T, as [0.1, 0.64]; absent: log-SNR in [-4.05, 0.086), else [0.1, 0.64]."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.min_fraction > self.max_fraction:
            raise ValueError(
                "selector.min_fraction must not exceed selector.max_fraction, got "
                f"{self.min_fraction} and {self.max_fraction}; raise the latter"
            )
        if self.fallback is not None and self.fallback[0] >= self.fallback[1]:
            raise ValueError(
                f"selector.fallback is [start, end] with start below end, got {list(self.fallback)}; "
                f"set for example selector.fallback = [0.1, 0.64]"
            )
        return self

    @property
    def is_sensed(self) -> bool:
        """Whether the rule looks at curves at all."""
        return self.rule not in ("fixed", "schedule")


class AdaScope(IntervalRule):
    """The steps between structure and saturation, for each prompt and iteration (arXiv 2605.15855).

    A decision that falls back takes the prompt's moving average instead; one within a step of it does not move.
    """

    implementation: ClassVar[str] = "adascope_fast.adascope.selector:AdaScope"

    name: Literal["adascope"] = "adascope"
    pooling: Literal["prompt", "sample", "batch"] = "prompt"
    """Samples that share one interval."""
    mask_source: Literal["current", "previous"] = "current"
    """Whether this rollout decides or the ones before it. A mask that has not seen the rollout leaves the policy
    gradient unbiased, and lets the steps be trained while they are sampled (one-pass)."""
    memory_decay: Decay = 0.7
    """Weight of the past in the moving average of a prompt's interval; 0 remembers the last one alone."""

    def share(self, num_steps: int) -> float:
        """Share of the steps that are trained, for a plan: the paper's mean; what a run keeps is in its log."""
        return MEAN_SHARE


class Complement(AdaScope):
    """The steps that AdaScope leaves out: if it is right about where RL pays, these teach little. A control."""

    implementation: ClassVar[str] = "adascope_fast.selectors.simple:Complement"

    name: Literal["complement"] = "complement"  # pyright: ignore[reportIncompatibleVariableOverride]
    last_step: LastStep = "auto"
    """`auto` leaves out the last step of flow samplers; `train` keeps it, `skip` leaves it out of every sampler."""

    def share(self, num_steps: int) -> float:
        """Share of the steps that are trained, for a plan."""
        return 1 - MEAN_SHARE

    def build(self, **context: Any) -> Any:
        """The complement of an AdaScope with the same settings."""
        keys = self.keys()
        last_step = keys.pop("last_step")
        return imported(self.implementation)(AdaScope(**keys).build(**context), last_step=last_step)


class Latent(Section):
    """Structure and preference from correlations of the clean guesses: no decoder, no CLIP, no reward."""

    implementation: ClassVar[str] = "adascope_fast.adascope.sensing:LatentSensor"

    kind: Literal["latent"] = "latent"
    every: Count = 1
    """Iterations from one that is sensed to the next; those between use the memory."""

    @property
    def is_causal(self) -> bool:
        """Whether a state's values are known when the rollout reaches it; those compared with the last one are not."""
        return False


class RewardOnly(Section):
    """Preference from the reward of the decoded clean guesses, structure from their correlations."""

    kind: Literal["reward_only"] = "reward_only"
    every: Count = 2
    """Iterations from one that is sensed to the next; those between use the memory."""
    decoder: Literal["vae", "tiny", "linear"] = "vae"
    """What decodes the guesses: the model's VAE, a tiny autoencoder, or a linear map fitted to the first rollout."""
    tiny: Text | None = None
    """Folder or Hugging Face repository of the tiny autoencoder (diffusers' AutoencoderTiny); absent: none."""
    stride: Steps = 4
    """States from one that is decoded to the next; the last is always decoded, those between are interpolated."""
    num_samples: CountOrZero = 2
    """Images of each prompt that are decoded; 0: all."""

    @model_validator(mode="after")
    def _names_its_decoder(self) -> Self:
        if self.decoder == "tiny" and self.tiny is None:
            raise ValueError(
                'sensing.decoder = "tiny" needs sensing.tiny, got none; name the folder or repository of an '
                'AutoencoderTiny made for this model, or set sensing.decoder = "vae"'
            )
        if self.decoder != "tiny" and self.tiny is not None:
            raise ValueError(
                f'sensing.tiny is the decoder of sensing.decoder = "tiny", got "{self.decoder}"; set it to "tiny", or '
                "remove sensing.tiny"
            )
        return self

    @property
    def is_causal(self) -> bool:
        """Whether a state's values are known when the rollout reaches it; values between strides are not."""
        return self.stride == 1


class Semantic(RewardOnly):
    """The paper's: CLIP similarity and reward of the decoded clean guesses."""

    kind: Literal["semantic"] = "semantic"  # pyright: ignore[reportIncompatibleVariableOverride]
    clip: Text | None = None
    """CLIP as `reward.clip`; absent: `scenes-clip`, for the embedded models alone."""
