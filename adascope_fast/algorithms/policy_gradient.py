"""Policy gradients over denoising steps: an advantage for each step, and an objective of its log-probability.

DDPO, REINFORCE, GRPO and DPOK are compositions of these two; the fused operation is inside the loss, and serves an
objective that has one. `b` samples, `t` steps, `n` (sample, step) pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from adascope_fast import ops
from adascope_fast.algorithms import settings
from adascope_fast.algorithms.advantages import Advantage, GroupRelative, added, decoupled, standardized, tracked
from adascope_fast.algorithms.algorithm import Algorithm, Context, Loss, Policy, Samples
from adascope_fast.algorithms.attribution import Attribution, similarity_gains
from adascope_fast.algorithms.objectives import Clipped, Objective, score_function
from adascope_fast.reference import Kind
from adascope_fast.reference.rows import per_row
from adascope_fast.rollout import StepBatch, Trajectory
from adascope_fast.schedules import Schedule


@dataclass(frozen=True)
class Pairs:
    """`n` (sample, step) pairs and their advantages, of which a few at a time are gathered from the trajectory."""

    needs_guesses: ClassVar[bool] = False
    """Whether a loss is given what the rollout guessed at the pairs."""

    trajectory: Trajectory
    pairs: Int64[Tensor, "n 2"]
    advantage: Float[Tensor, " n"]
    is_live: Bool[Tensor, " n"] | None
    num_forwards: int = 1

    @property
    def sample_index(self) -> Int64[Tensor, " n"]:
        """The sample of each pair."""
        return self.pairs[:, 0]

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def steps(self) -> StepBatch:
        """The pairs' steps."""
        return self.trajectory.gather(self.pairs)

    def ordered(self, rows: Int64[Tensor, " m"]) -> Self:
        """These pairs, in their order."""
        return replace(self, pairs=self.pairs[rows], advantage=self.advantage[rows], is_live=None)

    def held(self, shares: Sequence[Int64[Tensor, " m"]], rank: int) -> Self:
        """These pairs with their states."""
        trajectory: Any = self.trajectory
        wanted = [self.pairs[share] for share in shares]
        return replace(self.ordered(shares[rank]), trajectory=trajectory.brought(wanted, guesses=self.needs_guesses))

    def take(self, rows: Int64[Tensor, " m"] | slice) -> Any:
        """Steps and advantages of some pairs."""
        return self.steps[rows], self.advantage[rows]


@dataclass(kw_only=True)
class PolicyGradient(Algorithm):
    """`advantage` turns rewards [b] into [b, t], `objective` turns log-probabilities into an unreduced loss [n].

    The objective alone says how a ratio is clipped: one with a fused operation (`Clipped`) is served by it, any other
    callable is differentiated as it stands, in replay and in one pass.
    """

    advantage: Advantage
    objective: Objective
    step_weight: Callable[[Schedule], Float32[Tensor, " t"]] | None = None
    """Weights [t] that multiply the advantages; None leaves every step its own."""
    kl_weight: float = 0.0
    """Weight (beta) of the KL from the reference policy; 0 costs no reference pass."""
    kl_form: settings.KlForm = "divergence"
    log_prob: str = "auto"
    initial_noise: settings.InitialNoise = "own"
    """Whether each sample starts from a latent of its own, or those of a prompt (a group) from one."""
    mixing: settings.Mixing = "rewards"
    """Of a reward with parts: what is mixed, for grouped advantages."""
    attribution: Attribution = field(default_factory=Attribution)
    """Which steps the reward is credited to, and how much of it each gets."""

    def __post_init__(self) -> None:
        self.needs_reference = self.kl_weight > 0

    def log_prob_kind(self, schedule: Schedule) -> Kind:
        """See `log_prob_kind_of`."""
        return log_prob_kind_of(self.log_prob, schedule)

    def steps(self, chosen: Bool[Tensor, "b t"], trainable: Bool[Tensor, " t"]) -> Bool[Tensor, "b t"]:
        """The steps that the reward is credited to."""
        return self.attribution.steps(chosen, trainable)

    @property
    def shares_noise(self) -> bool:
        """Where `initial_noise` says so."""
        return self.initial_noise == "group"

    @property
    def is_repeatable(self) -> bool:
        """Of the losses and objectives here it is known; one of your own says so itself."""
        is_known = isinstance(self.objective, Clipped) or self.objective is score_function
        return is_known and type(self).loss is PolicyGradient.loss

    @property
    def is_known_ahead(self) -> bool:
        """Whether the attribution's shares follow from the chosen steps alone."""
        return self.attribution.is_known_ahead

    def advantages(self, samples: Samples, context: Context) -> Float[Tensor, "b t"]:
        """Of each step of each sample, before step weights and attribution."""
        num_steps = samples.trajectory.num_steps
        if self.mixing == "rewards" or (self.mixing == "advantages" and not samples.parts):
            return self.advantage(samples.rewards, samples.prompts, num_steps)
        if not samples.parts or not isinstance(self.advantage, GroupRelative):
            raise ValueError(
                f'mixing = "{self.mixing}" is of several rewards with grouped advantages, got {len(samples.parts)} '
                f'parts and {type(self.advantage).__name__}; give a reward with parts, or set it to "rewards"'
            )
        mix = {"advantages": added, "gdpo": decoupled, "normalized": standardized}[self.mixing]
        return mix(self.advantage, samples.parts, samples.weights, samples.prompts, num_steps)

    def batch(self, samples: Samples, context: Context) -> Pairs:
        """The kept pairs; those without advantage have no effect, unless a KL is asked for."""
        trajectory, advantages = samples.trajectory, self.advantages(samples, context)
        weights = self.weights(context.keep, trajectory.schedule, trajectory, context.gains)
        pairs = trajectory.pairs(context.keep)
        advantage = (advantages * weights.to(advantages.device))[pairs[:, 0], pairs[:, 1]]
        return Pairs(trajectory, pairs, advantage, None if self.kl_weight else advantage != 0)

    def loss(
        self, policy: Policy, rows: tuple[StepBatch, Float[Tensor, " n"]], *, is_on_policy: bool, scale: float
    ) -> Loss:
        """The objective of each pair and its KL."""
        pairs, advantage = rows
        where = pairs.sample, pairs.timestep, pairs.prompt_index
        output, without = policy.outputs(*where)
        old_log_prob = None if is_on_policy else pairs.old_log_prob
        transition = pairs.transition
        inputs = transition["sample"], output, transition["prev_sample"], pairs.coef, old_log_prob
        shared: dict[str, Any] = {
            "rows": pairs.rows,
            "output_uncond": without,
            "guidance_scale": policy.guidance_scale,
            "ref_output": policy.reference(*where) if self.kl_weight else None,
            "kl_weight": self._kl_weights(policy.schedule, pairs.step_index),
            "kind": self.log_prob_kind(policy.schedule),
        }
        gradients = None
        if isinstance(self.objective, Clipped):
            bounds = {"clip_range": self.objective.clip_range, "clip_range_high": self.objective.clip_range_high}
            values, stats, *found = ops.transition_policy_grad(
                *inputs,
                advantage,
                **bounds,
                **shared,
                clip=self.objective.form,
                scale=scale.expand(len(pairs)) if isinstance(scale, Tensor) else scale,
                needs_uncond=policy.train_guidance != "conditional",
            )
            gradients = [gradient for gradient in found if gradient is not None]
        else:
            values, stats = self._plain(inputs, advantage, shared)
        return Loss(values, stats | {"rollout_log_prob": pairs.old_log_prob, "step": pairs.step_index}, gradients)

    def _plain(
        self, inputs: tuple[Any, ...], advantage: Tensor, shared: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """An objective of one's own, differentiated as it stands."""
        sample, output, prev_sample, coef, old_log_prob = inputs
        penalty, stats = ops.transition_policy_loss(
            sample, output, prev_sample, coef, old_log_prob, torch.zeros_like(advantage), **shared, clip_range=1.0
        )
        log_prob = ops.guided_transition_log_prob(
            sample,
            output,
            shared["output_uncond"],
            shared["guidance_scale"],
            prev_sample,
            coef,
            kind=shared["kind"],
            rows=shared["rows"],
        )
        old_log_prob = log_prob.detach() if old_log_prob is None else old_log_prob
        loss, _ = self.objective(log_prob, old_log_prob, advantage)
        unknown = ("clipfrac", "output_gradient")  # of an objective that is differentiated as it stands
        return loss + penalty, {name: value for name, value in stats.items() if name not in unknown}

    def weights(
        self,
        keep: Bool[Tensor, "b t"],
        schedule: Schedule,
        trajectory: Trajectory | None = None,
        gains: Callable[[], Tensor | None] = lambda: None,
    ) -> Float32[Tensor, "b t"]:
        """What multiplies the advantages: the attribution, and the weight of each step; on the schedule's device."""
        found = None
        if trajectory is not None and not self.attribution.is_known_ahead:
            found = similarity_gains(trajectory) if self.attribution.attribution == "similarity" else gains()
        weights = self.attribution.credit(keep.to(schedule.coef.device), found)
        return weights if self.step_weight is None else weights * self.step_weight(schedule)

    def slopes(self, samples: Samples, context: Context) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """(loss, d loss / d log_prob) of each sample where no parameter has moved: what a one-pass update needs."""
        advantage = self.advantages(samples, context)[:, 0]
        log_prob = torch.zeros(len(advantage), device=advantage.device, requires_grad=True)
        with torch.enable_grad():
            loss, _ = self.objective(log_prob, log_prob.detach(), advantage)
            (slope,) = torch.autograd.grad(loss.sum(), log_prob)
        return loss.detach(), slope

    def state_dict(self) -> dict[str, Any]:
        """That of the advantage."""
        return self.advantage.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.advantage.load_state_dict(state)

    def _kl_weights(self, schedule: Schedule, step: Int64[Tensor, " n"]) -> float | Float32[Tensor, " n"]:
        if not self.kl_weight or self.kl_form == "divergence":
            return self.kl_weight
        return self.kl_weight * kl_factor(self.kl_form, schedule)[step]


@dataclass(frozen=True)
class GuardedPairs(Pairs):
    """Pairs whose loss compares with the outputs of the rollout, which its guesses of the image tell."""

    needs_guesses = True

    def take(self, rows: Int64[Tensor, " m"] | slice) -> Any:
        """Steps and advantages of some pairs, and the rollout's guesses there."""
        sample, step = self.pairs[rows].unbind(1)
        return *super().take(rows), self.trajectory.guess(sample, step)


@dataclass(kw_only=True)
class GrpoGuard(PolicyGradient):
    """See `settings.GrpoGuard`."""

    def schedule(self, schedule: Schedule) -> Schedule:
        """The flow's sampler as it is; ValueError for others, which have no dt."""
        if not schedule.is_flow or schedule.ode_coef is None:
            raise ValueError(
                f"{self.name} divides by the dt of a flow sampler's steps, got the sampler {schedule.kind!r}; "
                f'train a flow model, or set algorithm.name = "grpo"'
            )
        return schedule

    def log_prob_kind(self, schedule: Schedule) -> Kind:
        """The Gaussian's, of whose ratio the bias is."""
        return "gaussian"

    @property
    def is_repeatable(self) -> bool:
        """Always: its loss is made of operations alone."""
        return True

    @property
    def needs_x0(self) -> bool:
        """Always: they tell the output that the rollout had."""
        return True

    def batch(self, samples: Samples, context: Context) -> Pairs:
        """The pairs of a policy gradient with what the rollout guessed there."""
        return GuardedPairs(**vars(super().batch(samples, context)))

    def weights(self, keep: Bool[Tensor, "b t"], schedule: Schedule, *told: Any) -> Float32[Tensor, "b t"]:
        """What multiplies the advantages, divided by the -dt of each step."""
        assert schedule.ode_coef is not None
        return super().weights(keep, schedule, *told) / -schedule.ode_coef[:, 1]

    def loss(
        self,
        policy: Policy,
        rows: tuple[StepBatch, Float[Tensor, " n"], Float[Tensor, "n *latent"]],
        *,
        is_on_policy: bool,
        scale: float,
    ) -> Loss:
        """The clipped loss of each pair's corrected ratio, and its KL."""
        assert isinstance(self.objective, Clipped)
        pairs, advantage, guess = rows
        sample, coef = pairs.sample, pairs.coef
        where = sample, pairs.timestep, pairs.prompt_index
        output = ops.guide(*policy.outputs(*where), policy.guidance_scale)
        log_prob = ops.transition_log_prob(sample, output, pairs.prev_sample, coef)
        old_log_prob, old_output = log_prob.detach(), output.detach()
        if not is_on_policy:
            x0_coef = policy.schedule.x0_coef[pairs.step_index]
            of_x, of_output = (per_row(part, sample) for part in x0_coef.unbind(1))
            old_log_prob, old_output = pairs.old_log_prob, (guess - of_x * sample) / of_output
        bias = ops.gaussian_kl(output, old_output, coef)
        log_ratio = (log_prob - old_log_prob + bias) * coef[:, 2]
        values, ratio = self.objective(log_ratio, torch.zeros_like(log_ratio), advantage)
        kl = torch.zeros_like(ratio)
        if self.kl_weight:
            divergence = ops.gaussian_kl(output, policy.reference(*where), coef)
            values = values + self._kl_weights(policy.schedule, pairs.step_index) * divergence
            kl = divergence.detach()
        low, high = self.objective.bounds
        log_prob = log_prob.detach()
        statistics = {
            "log_prob": log_prob * coef[:, 2],  # as the ratio has them, whose clip range their drift is compared with
            "rollout_log_prob": pairs.old_log_prob * coef[:, 2],
            "step": pairs.step_index,
            "ratio": ratio,
            "approx_kl": 0.5 * (log_prob - old_log_prob).square(),
            "clipfrac": ((ratio < low) | (ratio > high)).to(ratio.dtype),
            "kl": kl,
            "nonfinite": (~(log_prob.isfinite() & ratio.isfinite())).to(ratio.dtype),
        }
        return Loss(values, statistics)


def kl_factor(form: settings.KlForm, schedule: Schedule) -> Float32[Tensor, " t"]:
    """What each step's divergence b^2 (output - ref_output)^2 / (2 std^2) is multiplied by, to be another KL.

    "flow_grpo": -dt, which its code leaves out of std^2; "output": 2 std^2 / b^2, DPOK's mean squared difference.
    """
    _, weight_output, std = schedule.coef.unbind(1)
    if form == "divergence":
        return torch.ones_like(std)
    if form == "output":
        return 2 * (std / weight_output).square()
    if not schedule.is_flow or schedule.ode_coef is None:
        raise ValueError(
            f'algorithm.kl_form = "flow_grpo" is that of flow samplers, got {schedule.kind!r}; '
            f'set algorithm.kl_form = "divergence"'
        )
    return -schedule.ode_coef[:, 1]  # Euler's step of the flow: x + (t_next - t) * output


def log_prob_kind_of(choice: str, schedule: Schedule) -> Kind:
    """The kind of log-probability that `algorithm.log_prob` names; "auto": Flow-CPS's code has no std^2 in it."""
    if choice == "auto":
        return "squared_error" if schedule.kind == "flow_cps" else "gaussian"
    return choice  # type: ignore[return-value]


def balanced(schedule: Schedule) -> Float32[Tensor, " t"]:
    """Weights proportional to std / |b|, of mean 1 over the trainable steps and 0 elsewhere.

    The gradient of a step's log-probability with respect to the model output has norm |b| / std (times noise), which
    grows steeply towards the image: without weights the last few steps make up nearly all of the gradient's variance.
    """
    _, weight_output, std = schedule.coef.unbind(1)
    weight = torch.where(std > 0, std / weight_output.abs(), 0.0)
    return weight * (std > 0).sum() / weight.sum()


STEP_WEIGHTS: dict[str, Callable[[Schedule], Float32[Tensor, " t"]] | None] = {"none": None, "balanced": balanced}


def ddpo(**keys: Any) -> PolicyGradient:
    """DDPO with the keys of `settings.Ddpo`."""
    return settings.Ddpo(**keys).build()


def reinforce(**keys: Any) -> PolicyGradient:
    """DDPO's score-function estimator with the keys of `settings.Reinforce`."""
    return settings.Reinforce(**keys).build()


def grpo(**keys: Any) -> PolicyGradient:
    """GRPO with the keys of `settings.Grpo`."""
    return settings.Grpo(**keys).build()


def flow_grpo_fast(**keys: Any) -> PolicyGradient:
    """Flow-GRPO-Fast with the keys of `settings.FlowGrpoFast`."""
    return settings.FlowGrpoFast(**keys).build()


def dance_grpo(**keys: Any) -> PolicyGradient:
    """DanceGRPO with the keys of `settings.DanceGrpo`."""
    return settings.DanceGrpo(**keys).build()


def mix_grpo(**keys: Any) -> PolicyGradient:
    """MixGRPO with the keys of `settings.MixGrpo`."""
    return settings.MixGrpo(**keys).build()


def grpo_guard(**keys: Any) -> GrpoGuard:
    """GRPO-Guard with the keys of `settings.GrpoGuard`."""
    return settings.GrpoGuard(**keys).build()


def ddpo_of(section: settings.Ddpo) -> PolicyGradient:
    """The algorithm that its section describes."""
    return PolicyGradient(
        **shared_by(section), advantage=tracked(section, section.advantage_clip), objective=clipped(section)
    )


def reinforce_of(section: settings.Reinforce) -> PolicyGradient:
    """The algorithm that its section describes."""
    return PolicyGradient(
        **shared_by(section), advantage=tracked(section, section.advantage_clip), objective=score_function
    )


def grpo_of(section: Any) -> PolicyGradient:
    """The algorithm that a section of grouped advantages and clip ranges describes."""
    return PolicyGradient(**_grouped(section))


def grpo_guard_of(section: settings.GrpoGuard) -> GrpoGuard:
    """The algorithm that its section describes."""
    return GrpoGuard(**_grouped(section))


def shared_by(section: Any) -> dict[str, Any]:
    """What every policy gradient takes from its section."""
    credit = {"backfill": section.backfill, "attribution": section.attribution}
    credit |= {"gamma": section.gamma} if section.attribution == "discount" else {}
    return {
        "name": section.name,
        "train_guidance": section.train_guidance,
        "step_weight": STEP_WEIGHTS[section.step_weight],
        "kl_weight": section.kl_weight,
        "kl_form": section.kl_form,
        "log_prob": section.log_prob,
        "attribution": Attribution(**credit),
    }


def clipped(section: Any) -> Clipped:
    """The objective of a section with clip ranges."""
    return Clipped(section.clip_range, section.clip_range_high)


def _grouped(section: Any) -> dict[str, Any]:
    advantage = GroupRelative(section.advantage_scale, section.advantage_clip)
    own = {"advantage": advantage, "objective": clipped(section), "initial_noise": section.initial_noise}
    own |= {"mixing": section.mixing}
    return shared_by(section) | own
