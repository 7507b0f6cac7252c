"""Sections of the algorithms: the keys of `[algorithm]`, by `algorithm.name`. Nothing here imports torch."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import model_validator

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
LogProb = Literal["auto", "gaussian", "squared_error"]
AdvantageScale = Literal["global", "group", "group_sample"]
InitialNoise = Literal["own", "group"]
Mixing = Literal["rewards", "advantages", "gdpo"]
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
    log_prob: LogProb = "auto"
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
    advantage_scale: AdvantageScale = "global"
    """Standard deviation that divides the advantages: the batch's, the group's, or the group's with n - 1."""

    @property
    def smallest_group(self) -> int:
        """Images of a prompt that can be compared."""
        return 2


class _GroupedPolicyGradient(_Grouped, _Clipped):
    initial_noise: InitialNoise = "own"
    """`own`: each image starts from a latent of its own; `group`: the images of a prompt start from one, and steps
    without noise before the first noisy one are computed once a prompt."""
    mixing: Mixing = "rewards"
    """Of several rewards (`reward.name = "mixed"`): `rewards`: advantages of their weighted sum; `advantages`: the
    weighted sum of the advantages that each has alone (MixGRPO); `gdpo`: that, divided by its standard deviation over
    the batch (GDPO, 2601.05242)."""


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


class Grpo(_GroupedPolicyGradient):
    """GRPO for diffusion and flow models (Flow-GRPO, Liu et al. 2025, 2505.05470): advantages within a prompt's group.

    As in flow_grpo the unconditional output carries no gradient unless `sampler.train_guidance = "both"`. Differs from
    it: the KL is the divergence unless `kl_form = "flow_grpo"`, and selectors choose the steps.
    `advantage_scale = "group_sample"` is DanceGRPO's (2505.07818).
    """

    implementation: ClassVar[str] = "adascope_fast.algorithms.policy_gradient:grpo_of"
    train_guidance: ClassVar[str] = "conditional"

    name: Literal["grpo"] = "grpo"


class FlowGrpoFast(_GroupedPolicyGradient):
    """Flow-GRPO-Fast (flow_grpo's README, 2025): Flow-GRPO on one or two noisy steps at a place drawn each iteration.

    The images of a prompt share the ODE up to there and part with the noise, so only what was trained tells them apart;
    few steps move the policy far, hence the small clip range. The original is with `selector.name = "fast_window"`
    (`selector.window_size`, `selector.start` and `selector.end` are its sde_window_size and sde_window_range).
    With AdaScope, whose rollouts have noise at every step, images share the initial latent alone.
    """

    implementation: ClassVar[str] = "adascope_fast.algorithms.policy_gradient:grpo_of"
    train_guidance: ClassVar[str] = "conditional"

    name: Literal["flow_grpo_fast"] = "flow_grpo_fast"
    clip_range: Positive = 1e-5
    """Clip of the ratio; smaller than Flow-GRPO's, as the original has it."""
    initial_noise: InitialNoise = "group"
    """`own`: each image starts from a latent of its own; `group`: the images of a prompt start from one, and steps
    without noise before the first noisy one are computed once a prompt."""


class DanceGrpo(_GroupedPolicyGradient):
    """DanceGRPO (Xue et al. 2025, 2505.07818): GRPO whose images of a prompt start from one latent.

    Advantages are divided by the group's sample standard deviation + 1e-8. What else is the paper's is said in other
    sections: 60 % of the steps at random (`selector.name = "random_fraction"`, `selector.fraction = 0.6`), of a flow
    without the last; on FLUX `sampler.kind = "dance_sde"` with `sampler.shift = 3`, on SD 1.4 `ddim`; a learning rate
    of 1e-5. Differs from the original: the loss is averaged over the trained pairs of an update in one go.
    """

    implementation: ClassVar[str] = "adascope_fast.algorithms.policy_gradient:grpo_of"
    train_guidance: ClassVar[str] = "both"

    name: Literal["dance_grpo"] = "dance_grpo"
    advantage_scale: AdvantageScale = "group_sample"
    """Standard deviation that divides the advantages: the batch's, the group's, or the group's with n - 1."""
    initial_noise: InitialNoise = "group"
    """`own`: each image starts from a latent of its own; `group`: the images of a prompt start from one, and steps
    without noise before the first noisy one are computed once a prompt."""


class MixGrpo(_GroupedPolicyGradient):
    """MixGRPO (Li et al. 2025, 2507.21802): GRPO on a window of noisy steps that moves on, with the ODE around it.

    Advantages are divided by the group's sample standard deviation + 1e-8; of several rewards each has advantages of
    its own, which are added up. The original is with `selector.name = "window"` (`selector.window_size = 4`,
    `selector.shift_every = 25`) and `sampler.shift = 3`; MixGRPO-Flash has `sampler.tail_share = 0.4` besides. Its loss
    is divided by the window's steps, which is the mean over the trained pairs here. With AdaScope, whose rollouts have
    noise at every step, images share the initial latent alone.
    """

    implementation: ClassVar[str] = "adascope_fast.algorithms.policy_gradient:grpo_of"
    train_guidance: ClassVar[str] = "both"

    name: Literal["mix_grpo"] = "mix_grpo"
    advantage_scale: AdvantageScale = "group_sample"
    """Standard deviation that divides the advantages: the batch's, the group's, or the group's with n - 1."""
    initial_noise: InitialNoise = "group"
    """`own`: each image starts from a latent of its own; `group`: the images of a prompt start from one, and steps
    without noise before the first noisy one are computed once a prompt."""
    mixing: Mixing = "advantages"
    """Of several rewards (`reward.name = "mixed"`): `rewards`: advantages of their weighted sum; `advantages`: the
    weighted sum of the advantages that each has alone (MixGRPO); `gdpo`: that, divided by its standard deviation over
    the batch (GDPO, 2601.05242)."""


class GrpoGuard(_GroupedPolicyGradient):
    """GRPO-Guard (Wang et al. 2025, 2510.22319): Flow-GRPO with a ratio whose mean and spread are alike at all steps.

    With s the standard deviation of a step, mu and mu_old the means of the policy and of the one that drew the rollout:
    bias = mean (mu - mu_old)^2 / (2 s^2), ratio = exp((log p - log p_old + bias) s), which PPO clips; the loss of a
    step is divided by its -dt. Flow samplers alone. mu_old is what the rollout's guess of the image says. Differs from
    the released code: means are those of each image's latent, whatever else is in the batch, as its authors corrected
    it; the KL is the divergence unless `kl_form = "flow_grpo"`.
    """

    implementation: ClassVar[str] = "adascope_fast.algorithms.policy_gradient:grpo_guard_of"
    train_guidance: ClassVar[str] = "conditional"

    name: Literal["grpo_guard"] = "grpo_guard"
    clip_range: Positive = 2e-6
    """Clip of the ratio; its code has 2e-6 for OCR and GenEval and 4e-6 for PickScore."""
    advantage_scale: AdvantageScale = "group"
    """Standard deviation that divides the advantages: the batch's, the group's, or the group's with n - 1."""
    log_prob: Literal["auto", "gaussian"] = "auto"
    """A step's log-probability: of the Gaussian, whose ratio it is that is corrected."""


class Dpok(_Clipped):
    """DPOK (Fan et al. 2023, 2305.16381): a two-sided clip, a value critic as baseline, and KL to the base model.

    The advantage of a step is r - V(x, prompt, step), where V is trained on the samples of `buffer_size` images by
    `value_steps` steps an iteration. Differs from google-research/dpok: the loss is averaged over the trained pairs,
    and the rewards are standardised over the batch before the critic sees them, so that `kl_weight` and
    `value_learning_rate` do not depend on the reward's scale. Its script multiplies the reward's part of the loss by
    100, which is left out here: its ratio of the two parts is `kl_weight = 1e-4`. It makes five updates of the policy
    for each rollout (`train.updates_per_iteration = 5`), at a learning rate of 1e-5 and a gradient norm of 0.1.
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


class Tdpo(_Tracked, _Clipped):
    """TDPO-R (Zhang et al. 2024, 2402.08552): PPO on temporal rewards of steps, with a critic that is reset in part.

    With r the reward against its prompt's running statistics and V a critic of the state that enters a step, a step's
    temporal reward is gamma^(T - 1 - i) r - V, standardised over the trained steps. The critic is trained on the same
    steps by half of max((V - G)^2, (clip(V, V_old +- value_clip) - G)^2), G the return. Every `reset_every` iterations
    its neurons with any positive activation are drawn anew: by the paper these carry the primacy bias, and the dormant
    ones guard against overoptimisation. `reset_every = 0` is TDPO. Differs from the code: the critic's steps go through
    the trained pairs in an order of their own, and it sees latents, prompt and time unless `critic_features` says
    otherwise.
    """

    implementation: ClassVar[str] = "adascope_fast.algorithms.critic:tdpo_of"
    train_guidance: ClassVar[str] = "both"

    name: Literal["tdpo"] = "tdpo"
    advantage_clip: Positive = 1e12
    """Largest absolute advantage; the original clips none."""
    gamma: Share = 1.0
    """Discount of each step that follows, in returns, and with `attribution = "discount"` in the shares of steps."""
    reset_every: CountOrZero = 10
    """Iterations between resets of the critic's neurons; 0: never (TDPO)."""
    reset_neurons: Literal["active", "dormant"] = "active"
    """Neurons that a reset draws anew: those with any positive activation (the paper's), or those without."""
    critic_features: Literal["latents", "images"] = "latents"
    """What the critic sees of a state: the latent, prompt and timestep, as DPOK's, or the picture that the noisy latent
    decodes to, through `critic_clip`, as the original."""
    critic_clip: Annotated[Text, only_with(critic_features=["images"])] = "scenes-clip"
    """`scenes-clip` (embedded), the folder of a CLIPModel, or a Hugging Face repository; the original has its reward's
    encoder."""
    value_learning_rate: LearningRate = 1e-4
    """AdamW learning rate of the critic."""
    value_clip: Positive = 0.2
    """Most that a step's estimate moves in an iteration, as far as the critic's loss goes."""
    value_steps: Images = 100
    """Steps of the critic's optimiser in each iteration, which go once through the trained pairs; the original has one
    with each of the policy's updates, 100 for 50 denoising steps."""


class D3po(_Algorithm):
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
    clip_range: Positive = 0.1
    """Clip of the ratio to the reference policy."""
    log_prob: LogProb = "auto"
    """A step's log-probability, as in the policy gradients."""
    step_weight: StepWeight = "none"
    """`balanced`: each step's log-ratio is divided by the sensitivity of its log-probability, |b| / std."""

    @property
    def needs_reference(self) -> bool:
        """The model without its adapter has to be there."""
        return True

    @property
    def smallest_group(self) -> int:
        """Images of a prompt that can be compared."""
        return 2


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
