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
LogProb = Literal["auto", "gaussian", "squared_error"]
AdvantageScale = Literal["global", "group", "group_sample"]
InitialNoise = Literal["own", "group"]
Mixing = Literal["rewards", "advantages", "gdpo", "normalized"]
Backfill = Literal["interval", "full", "sparse"]
AttributionName = Literal["uniform", "discount", "gain", "similarity"]


class _Algorithm(Section):
    needs_log_prob: ClassVar[bool] = True
    weighs_whole_samples: ClassVar[bool] = False
    """Whether one advantage holds for all steps of a sample, as `one_pass` needs it."""
    """Whether steps are trained by their log-probability, which a sampler without noise has not."""

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

    weighs_whole_samples: ClassVar[bool] = True

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
    """Upper clip where it differs from the lower one; absent: `clip_range`."""

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
    the batch (GDPO, 2601.05242); `normalized`: advantages of the weighted sum of each less its mean, divided by its
    standard deviation, over all images of the iteration (AdaScope's accumulated rewards)."""


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
    the batch (GDPO, 2601.05242); `normalized`: advantages of the weighted sum of each less its mean, divided by its
    standard deviation, over all images of the iteration (AdaScope's accumulated rewards)."""


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
    weighs_whole_samples: ClassVar[bool] = False
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
    weighs_whole_samples: ClassVar[bool] = False
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


class _Preference(_Algorithm):
    """Clipped log-ratios to the reference policy, of a better and a worse state."""

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


class _Offline(_Algorithm):
    """What algorithms that learn from a set of pictures have: no rollout, no reward, no guidance in training."""

    is_offline: ClassVar[bool] = True
    needs_log_prob: ClassVar[bool] = False
    images_of_a_record: ClassVar[int] = 1
    train_guidance: ClassVar[str] = "conditional"

    preferences: Text | None = None
    """Folder with the set, see docs/preferences.md; absent: there is nothing to train on, and `adascope-fast
    make-preferences` makes one."""
    num_draws: Steps = 1
    """Noise levels drawn for each record in an iteration, each once, among the steps that the selector keeps."""
    prompt_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the records that are trained without their prompt, as for guidance."""

    @property
    def needs_reference(self) -> bool:
        """The model without its adapter has to be there."""
        return True


class DiffusionDpo(_Offline):
    """Diffusion-DPO (Wallace et al. 2023, 2311.12908): DPO on pairs of finished pictures, noised anew.

    Both pictures of a pair are noised to one level with one noise; e is the mean squared error of the model's output,
    e_ref that of the model as it was before. The loss is -log sigmoid(-beta / 2 * ((e_w - e_l) - (e_ref_w - e_ref_l))).
    An iteration draws `train.prompts_per_iteration` pairs. Differs from the original: noise levels are those of the
    sampler's steps that the selector keeps; latents are the VAE's mean, not a sample; pictures are not mirrored.
    `beta` is the released code's, also for SD1.5.
    """

    implementation: ClassVar[str] = "adascope_fast.algorithms.preference:diffusion_dpo_of"
    images_of_a_record: ClassVar[int] = 2

    name: Literal["diffusion_dpo"] = "diffusion_dpo"
    beta: Positive = 5000.0
    """Strength of the tie to the model as it was before; large because errors are means over the latent's elements."""


class DiffusionKto(_Offline):
    """Diffusion-KTO (Li et al. 2024, 2404.04465): Kahneman-Tversky's utility of liked and disliked pictures.

    With g = e_ref - e, as in Diffusion-DPO, and k = max(0, mean of g), the loss is w * (1 - sigmoid(+-beta * (g - k))),
    + for a liked picture. An iteration draws `train.prompts_per_iteration` pictures with repetition. Differs from the
    original: k is a number over all rows of the iteration, with the weights of its start, where the original takes
    that of the devices' present batches, so that the microbatch does not matter; it costs one more forward. Noise
    levels, latents and mirroring as in `diffusion_dpo`. `beta` is the released code's default.
    """

    implementation: ClassVar[str] = "adascope_fast.algorithms.preference:diffusion_kto_of"

    name: Literal["diffusion_kto"] = "diffusion_kto"
    beta: Positive = 1000.0
    """Steepness of the utility; large because errors are means over the latent's elements."""
    liked_weight: Positive = 1.0
    """Weight of a liked picture's loss."""
    disliked_weight: Positive = 1.0
    """Weight of a disliked picture's loss."""
    positive_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Share of liked pictures among those that are drawn, whatever their share of the set."""


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


class Noised(_Grouped, _Algorithm):
    """What regressions on noised images share: nothing of the trajectory is trained, so any sampler will do."""

    train_guidance: ClassVar[str] = "both"
    needs_log_prob: ClassVar[bool] = False

    advantage_clip: Positive = 5.0
    """Largest absolute advantage, before they are divided by it: advantages lie in [-1, 1]."""
    kl_weight: PositiveOrZero = 0.0
    """Weight of the mean squared difference from the reference policy's output; 0 costs no reference pass."""

    @property
    def needs_reference(self) -> bool:
        """Whether the model without its adapter has to be there."""
        return self.kl_weight > 0


class Awm(Noised):
    """AWM (Xue et al. 2025, 2509.25050): advantage-weighted matching of the model's own images, noised anew.

    log p := -w(t) E with E the mean squared error of the model's output at the noised image; the loss is PPO's on its
    ratio to the policy that drew the images. Nothing of the trajectory is trained, so a deterministic sampler will do
    (`sampler.kind = "dpm_solver"`, `"flow_ode"`, `sampler.eta = 0`). Noise levels are those of the sampler's steps
    that the selector keeps, one from each of `num_draws` parts of them: the original's `discrete_wo_init` with fraction
    0.9 of 14 steps is `selector.name = "static_range"` from 1 to 12. Differs from the original: each image has its own
    draws, the image's guidance is the sampler's, and epsilon and v models are trained on their own outputs.
    """

    implementation: ClassVar[str] = "adascope_fast.algorithms.regression:awm_of"

    name: Literal["awm"] = "awm"
    clip_range: Positive = 1.0
    """Clip of the ratio; 1 is off but for ratios above 2."""
    num_draws: Steps = 6
    """Noise levels of each image in an iteration: one from each of so many parts of the steps that are kept; all kept
    steps where those are fewer."""
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "ghuber"
    """w(t) E: 1, t, t^2 times E, or the (generalised) Huber loss of E times t."""
    huber_power: Annotated[Share, only_with(weighting=["ghuber"])] = 0.25
    """Exponent of the generalised Huber loss."""
    kl_weight: PositiveOrZero = 1e-3
    """Weight of the mean squared difference from the reference policy's output; 0 costs no reference pass."""
    ema_kl_weight: PositiveOrZero = 1.0
    """Weight of the mean squared difference from the output of the policy's own moving average, whose decay is
    min(0.3, 0.001 n) after n updates; 0 costs no pass."""

    @property
    def has_average(self) -> bool:
        """Whether a moving average of the policy is kept, and asked for its output at each row."""
        return self.ema_kl_weight > 0


class DiffusionNft(Noised):
    """DiffusionNFT (Zheng et al. 2025, 2509.16117): the policy is pulled to good images and its mirror image to bad.

    With v_old the output of the moving average of the policy, which also draws the images, v+ = beta v + (1 - beta)
    v_old and v- = (1 + beta) v_old - beta v; x0+ and x0- are the clean images that they guess at an image x0 that was
    noised anew. An image's loss is `advantage_clip` / beta times r D(x0+) + (1 - r) D(x0-), with r = (A + 1) / 2 for
    its advantage A in [-1, 1], and D(x) = mean (x - x0)^2 / max(mean |x - x0|, 1e-5), whose divisor has no gradient.
    Guesses are the same whatever the model says of them, so epsilon and v models are trained on the same loss as flows.
    Nothing of the trajectory is trained, so a deterministic sampler will do; the original's is `sampler.kind =
    "dpm_solver"`. Differs from the original: every step that the selector keeps is trained, where it draws 99 % of the
    steps (9 of 10), and the image's guidance is the sampler's.
    """

    implementation: ClassVar[str] = "adascope_fast.algorithms.regression:diffusion_nft_of"
    has_average: ClassVar[bool] = True

    name: Literal["diffusion_nft"] = "diffusion_nft"
    beta: Positive = 1.0
    """How far v+ and v- lie on either side of v_old; the original takes 0.1 for OCR and for several rewards."""
    ema_decay_type: Literal["none", "type_1", "type_2"] = "type_1"
    """Decay of the moving average after n updates. `type_1`: min(0.5, 0.001 n); `type_2`, for OCR: min(0.999, 0.0075
    (n - 75)), not below 0; `none`: 0, so that v_old is the policy as the iteration found it."""
    num_draws: Steps | None = None
    """Noise levels of each image in an iteration, one from each of so many parts of the steps that are kept; absent:
    every kept step once."""
    kl_weight: PositiveOrZero = 1e-4
    """Weight of the mean squared difference from the reference policy's output; 0 costs no reference pass."""


class OwnAlgorithm(Own):
    """One of your own: `name` is `module:object`, other keys are its arguments."""

    named_by: ClassVar[str] = "algorithm.name"
