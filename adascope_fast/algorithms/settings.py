"""Sections of the algorithms: the keys of `[algorithm]`, by `algorithm.name`. Nothing here imports torch."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from adascope_fast.settings import (
    CountOrZero,
    Images,
    LearningRate,
    Own,
    Positive,
    PositiveOrZero,
    Section,
    Share,
    Steps,
    Text,
    Width,
    imported,
    only_with,
)

StepWeight = Literal["none", "balanced"]
KlForm = Literal["divergence", "flow_grpo", "output"]
Backfill = Literal["interval", "full", "sparse"]
AttributionName = Literal["uniform", "discount", "gain", "similarity"]


class _Algorithm(Section):
    def build(self, **context: Any) -> Any:
        """The algorithm that the section describes."""
        return imported(self.implementation)(self)


class Attribution(Section):
    """Which steps of a selector's choice a reward is credited to, and how much of it each gets."""

    backfill: Backfill = "interval"
    """Steps that are credited: the selector's (AdaScope), every step whatever it chose, or the last one alone."""
    attribution: AttributionName = "uniform"
    """Shares: alike (the paper), by `gamma`, by the sensed preference a step adds, or by what it adds to the cosine of
    guess and result (after CoCA, 2505.19196); a step where that falls gets nothing."""
    gamma: Annotated[Share, only_with(attribution=["discount"])] = 0.99
    """Discount of each step that follows."""


class _Credited(_Algorithm, Attribution):
    advantage_clip: Positive = 5.0
    """Largest absolute advantage."""


class _PolicyGradient(_Credited):
    """What every policy gradient has."""

    step_weight: StepWeight = "none"
    """`balanced`: each step's advantage is divided by the sensitivity of its log-probability, |b| / std."""
    kl_weight: PositiveOrZero = 0.0
    """Weight (beta) of the KL from the reference policy, the model without its adapter; 0 costs no reference pass."""
    kl_form: KlForm = "divergence"
    """`divergence`: KL(policy || reference) of a step; `flow_grpo`: that times -dt, as its code has it; `output`: mean
    squared difference of the model outputs, as DPOK's has it."""
    log_prob: Literal["auto", "gaussian", "squared_error"] = "auto"
    """A step's log-probability: of the Gaussian, or -(x - mean)^2 without constants, which Flow-CPS's code trains on;
    `auto`: squared_error for flow_cps, else gaussian."""

    @model_validator(mode="after")
    def _kl_is_weighed(self) -> Self:
        if self.kl_weight == 0 and self.kl_form != type(self).model_fields["kl_form"].default:
            raise ValueError(
                f'algorithm.kl_form = "{self.kl_form}" is the form of a KL, got algorithm.kl_weight = 0; '
                f"remove it, or set algorithm.kl_weight"
            )
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether the model without its adapter has to be there."""
        return self.kl_weight > 0


class _Clipped(_PolicyGradient):
    clip_range: Positive = 1e-4
    """Clip of the ratio; small because log-probabilities are means over the latent's elements."""
    clip_range_high: Positive | None = None
    """Upper clip where it differs from the lower one."""

    @model_validator(mode="after")
    def _clips_are_ordered(self) -> Self:
        if self.clip_range_high is not None and self.clip_range_high < self.clip_range:
            raise ValueError(
                "algorithm.clip_range_high must be at least algorithm.clip_range, got "
                f"{self.clip_range_high} and {self.clip_range}; raise it, or leave it out"
            )
        return self


class _Tracked(Section):
    advantage: Literal["per_prompt", "batch"] = "per_prompt"
    """`per_prompt`: against the running statistics of the prompt; `batch`: against the whole batch, TRL's default."""
    buffer_size: Annotated[Images, only_with(advantage=["per_prompt"])] = 32
    """Rewards remembered for each prompt."""
    min_count: Annotated[Images, only_with(advantage=["per_prompt"])] = 16
    """Remembered rewards from which a prompt's own statistics replace the batch's."""

    @model_validator(mode="after")
    def _buffer_can_fill(self) -> Self:
        if self.min_count > self.buffer_size:
            raise ValueError(
                "algorithm.min_count must not exceed algorithm.buffer_size, "
                f"got {self.min_count} with a buffer of {self.buffer_size}; raise the buffer or lower the count"
            )
        return self


class _Grouped(Section):
    advantage_scale: Literal["global", "group", "group_sample"] = "global"
    """Standard deviation that divides the advantages: the batch's, the group's, or the group's with n - 1."""

    @property
    def smallest_group(self) -> int:
        """Images of a prompt that can be compared."""
        return 2


class Ddpo(_Tracked, _Clipped):
    """DDPO with importance sampling (Black et al. 2023, 2305.13301): PPO on every step's likelihood.

    Differs from ddpo-pytorch: which steps are trained is the selector's business, and the loss is averaged over the
    trained pairs in one go, so that the microbatch does not matter. With `advantage = "batch"` it is TRL's default.
    """

    implementation: ClassVar[str] = "adascope_fast.algorithms.policy_gradient:ddpo_of"
    train_guidance: ClassVar[str] = "both"

    name: Literal["ddpo"] = "ddpo"


class Reinforce(_Tracked, _PolicyGradient):
    """DDPO's score-function estimator (DDPO-SF): the loss -A log_prob, right for one update after each rollout."""

    implementation: ClassVar[str] = "adascope_fast.algorithms.policy_gradient:reinforce_of"
    train_guidance: ClassVar[str] = "both"

    name: Literal["reinforce"] = "reinforce"


class Grpo(_Grouped, _Clipped):
    """GRPO for diffusion and flow models (Flow-GRPO, Liu et al. 2025, 2505.05470): advantages within a prompt's group.

    As in flow_grpo the unconditional output carries no gradient unless `sampler.train_guidance = "both"`. Differs from
    it: the KL is the divergence unless `kl_form = "flow_grpo"`, and selectors choose the steps.
    `advantage_scale = "group_sample"` is DanceGRPO's (2505.07818).
    """

    implementation: ClassVar[str] = "adascope_fast.algorithms.policy_gradient:grpo_of"
    train_guidance: ClassVar[str] = "conditional"

    name: Literal["grpo"] = "grpo"


class Dpok(_Clipped):
    """DPOK (Fan et al. 2023, 2305.16381): a two-sided clip, a value critic as baseline, and KL to the base model.

    The advantage of a step is r - V(x, prompt, step), where V is trained on the samples of `buffer_size` images by
    `value_steps` steps an iteration. Differs from google-research/dpok: the loss is averaged over the trained pairs,
    and the rewards are standardised over the batch before the critic sees them, so that `kl_weight` and
    `value_learning_rate` do not depend on the reward's scale.
    """

    implementation: ClassVar[str] = "adascope_fast.algorithms.critic:dpok_of"
    train_guidance: ClassVar[str] = "both"

    name: Literal["dpok"] = "dpok"
    kl_weight: PositiveOrZero = 0.01
    """Weight (beta) of the KL from the reference policy; 0 costs no reference pass."""
    kl_form: KlForm = "output"
    """`output`: mean squared difference of the model outputs, as DPOK's code has it; `divergence`, `flow_grpo`: as in
    the other algorithms."""
    value_steps: Images = 5
    """Steps of the critic's optimiser in each iteration, before the policy's."""
    value_learning_rate: LearningRate = 1e-4
    """Adam learning rate of the critic."""
    value_batch: Images = 256
    """(image, step) pairs in a step of the critic."""
    value_width: Width = 256
    """Units in each of the critic's two hidden layers."""
    buffer_size: Images = 1000
    """Newest images that the critic is trained on."""


class _Preference(_Algorithm):
    """Clipped log-ratios to the reference policy, of a better and a worse state."""

    clip_range: Positive = 0.1
    """Clip of the ratio to the reference policy."""
    log_prob: Literal["auto", "gaussian", "squared_error"] = "auto"
    """A step's log-probability, as in the policy gradients."""
    step_weight: StepWeight = "none"
    """`balanced`: each step's log-ratio is divided by the sensitivity of its log-probability, |b| / std."""

    @property
    def needs_reference(self) -> bool:
        """The model without its adapter has to be there."""
        return True


class D3po(_Preference):
    """D3PO (Yang et al. 2023, 2311.13231): preferences between two trajectories of a prompt, step by step.

    Of each prompt's images the one with the highest reward is paired with the one with the lowest, the second highest
    with the second lowest, and so on; ties teach nothing. The loss of a pair at a step is
    -log sigmoid(beta * sum_k h_k log clip(r_k)) with r_k the ratio to the reference policy and h = +1, -1. A pair is
    trained at the steps that the selector keeps of both. Differs from the original: the preference is a reward's.
    """

    implementation: ClassVar[str] = "adascope_fast.algorithms.preference:d3po_of"
    train_guidance: ClassVar[str] = "both"

    name: Literal["d3po"] = "d3po"
    beta: Positive = 0.1
    """Strength of the preference's link to the likelihood ratio."""

    @property
    def smallest_group(self) -> int:
        """Images of a prompt that can be compared."""
        return 2


class Spo(_Preference):
    """SPO (Liang et al. 2024, 2406.04314): preferences between next states that are drawn from one state.

    At each step from `branch_from` on, `num_candidates` next states are drawn from the Gaussian of that step and scored
    by a step-aware preference model. The best and the worst are a pair if they differ by `margin`; the rollout walks on
    from one of the candidates, whatever its score. The loss of a pair is D3PO's,
    -log sigmoid(beta * sum_k h_k log clip(r_k)) with r_k the ratio to the reference policy and h = +1, -1; as both
    states follow from one, it takes one forward of the policy and one of the reference. A live pair is trained at the
    steps that the selector keeps; the original trains all from `branch_from` on (`selector.name = "late_start"`).
    Differs from the original: without a folder of `adascope-fast train-preference-model` the reward of the decoded
    guess stands for the preference model, at a forward of each candidate; steps that the selector is known beforehand
    not to keep are not branched.
    """

    implementation: ClassVar[str] = "adascope_fast.algorithms.preference:spo_of"
    train_guidance: ClassVar[str] = "both"

    name: Literal["spo"] = "spo"
    beta: Positive = 10.0
    """Strength of the preference's link to the likelihood ratio."""
    num_candidates: Annotated[int, Field(ge=2, le=256)] = 4
    """Next states that are drawn at a step, k."""
    branch_from: CountOrZero | None = None
    """First step that is branched; absent: T / 5, step 4 of the paper's 20."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """What the probabilities of the better and the worse state (softmax of their scores) must differ by, more than."""
    preference_model: Text = "reward"
    """`reward`: the reward of the decoded guess from each candidate, at a forward each; or a folder that
    `adascope-fast train-preference-model` has made, which scores the noisy latents as they are."""
    temperature: Positive | None = None
    """Difference of scores that stands for odds of e to 1; absent: 0.1 of the reward's units, or 1 for the scores of a
    preference model, which are logits. For a reward of another scale, about what a prompt's images differ by."""

    def first_step(self, num_steps: int) -> int:
        """The first step that is branched, of `num_steps`."""
        return (num_steps + 2) // 5 if self.branch_from is None else self.branch_from


class Awm(_Grouped, _Algorithm):
    """AWM (Xue et al. 2025, 2509.25050): advantage-weighted matching of the model's own images, noised anew.

    log p := -w(t) E with E the mean squared error of the model's output at the noised image; the loss is PPO's on its
    ratio to the policy that drew the images. Nothing of the trajectory is trained, so a deterministic sampler will do
    (`sampler.eta = 0`, `sampler.kind = "flow_ode"`); the selector bounds where noise levels are drawn. Differs from the
    original: noise levels are those of the sampler's steps, and the image's guidance is the sampler's.
    """

    implementation: ClassVar[str] = "adascope_fast.algorithms.regression:awm_of"
    train_guidance: ClassVar[str] = "both"

    name: Literal["awm"] = "awm"
    advantage_clip: Positive = 5.0
    """Largest absolute advantage, before they are divided by it: advantages lie in [-1, 1]."""
    clip_range: Positive = 1.0
    """Clip of the ratio; 1 is off but for ratios above 2."""
    num_draws: Steps = 6
    """Noise levels drawn for each image in an iteration, each once, among the steps that the selector keeps."""
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "ghuber"
    """w(t) E: 1, t, t^2 times E, or the (generalised) Huber loss of E times t."""
    huber_power: Annotated[Share, only_with(weighting=["ghuber"])] = 0.25
    """Exponent of the generalised Huber loss."""
    kl_weight: PositiveOrZero = 1e-3
    """Weight of the mean squared difference from the reference policy's output; 0 costs no reference pass."""
    ema_kl_weight: PositiveOrZero = 1.0
    """Weight of the mean squared difference from the output of the policy's own moving average; 0 costs no pass."""

    @property
    def needs_reference(self) -> bool:
        """Whether the model without its adapter has to be there."""
        return self.kl_weight > 0


class OwnAlgorithm(Own):
    """One of your own: `name` is `module:object`, other keys are its arguments."""

    named_by: ClassVar[str] = "algorithm.name"
