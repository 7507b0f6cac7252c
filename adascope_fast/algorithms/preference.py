"""Preferences, step by step: between trajectories of one prompt, D3PO (Yang et al. 2023, 2311.13231), and between next
states that are drawn from one state, SPO (Liang et al. 2024, 2406.04314).

And those of a set of pictures: Diffusion-DPO (Wallace et al. 2023, 2311.12908) and Diffusion-KTO (Li et al. 2024,
2404.04465), which noise them anew.

`b` samples, `t` steps. D3PO and Diffusion-DPO have `n` rows (pair, step) of two denoiser rows, the better image's and
the worse one's; SPO (sample, step) and Diffusion-KTO (image, step) have `n` rows of one denoiser row each.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from adascope_fast import ops
from adascope_fast.algorithms import settings
from adascope_fast.algorithms.algorithm import Algorithm, Collector, Context, Loss, Policy, Preferences, Samples
from adascope_fast.algorithms.policy_gradient import STEP_WEIGHTS, log_prob_kind_of
from adascope_fast.algorithms.regression import Noised, NoisedBatch, mean_square, noise_levels
from adascope_fast.backbone import Backbone
from adascope_fast.preferences import StepAwareModel
from adascope_fast.preferences.files import Judged, Pair, PreferenceSet, read_judged, read_pairs
from adascope_fast.reference import Kind
from adascope_fast.rollout import Branches, StepBatch, Stills, Trajectory
from adascope_fast.schedules import Schedule

REWARD_TEMPERATURE = 0.1
"""Of rewards as scores of candidates, where none is given."""


@dataclass(frozen=True)
class PairedSteps:
    """`n` rows (better sample, worse sample, step)."""

    trajectory: Trajectory
    rows: Int64[Tensor, "n 3"]
    weight: Float32[Tensor, " t"]
    is_live: Bool[Tensor, " n"] | None = None
    num_forwards: int = 2

    @property
    def sample_index(self) -> Int64[Tensor, " n"]:
        """The better sample of each row: it tells the pair."""
        return self.rows[:, 0]

    def __len__(self) -> int:
        return len(self.rows)

    def ordered(self, rows: Int64[Tensor, " m"]) -> "PairedSteps":
        """These rows, in their order."""
        return PairedSteps(self.trajectory, self.rows[rows], self.weight)

    def held(self, shares: Sequence[Int64[Tensor, " m"]], rank: int) -> "PairedSteps":
        """These rows with the states of both samples."""
        trajectory: Any = self.trajectory
        rows = [self.rows[share] for share in shares]
        wanted = [torch.cat([part[:, [0, 2]], part[:, [1, 2]]]) for part in rows]
        return replace(self.ordered(shares[rank]), trajectory=trajectory.brought(wanted))

    def take(self, rows: Int64[Tensor, " m"] | slice) -> tuple[StepBatch, Float32[Tensor, " m"]]:
        """The steps of the better samples, then those of the worse ones; and the weight of each row."""
        better, worse, step = self.rows[rows].unbind(1)
        pairs = torch.stack([torch.cat([better, worse]), torch.cat([step, step])], 1)
        return self.trajectory.gather(pairs), self.weight[step]


@dataclass(kw_only=True)
class D3po(Algorithm):
    """See `settings.D3po`."""

    settings: settings.D3po

    def log_prob_kind(self, schedule: Schedule) -> Kind:
        """See `log_prob_kind_of`."""
        return log_prob_kind_of(self.settings.log_prob, schedule)

    @property
    def is_repeatable(self) -> bool:
        """See `Algorithm`."""
        return True

    def batch(self, samples: Samples, context: Context) -> PairedSteps:
        """The steps of each pair that are kept of both its samples, else of either."""
        trajectory = samples.trajectory
        pairs = paired(samples.rewards, samples.prompts).to(context.keep.device)
        better, worse = context.keep[pairs].unbind(1)  # [pairs, t] each
        both = better & worse
        steps = torch.where(both.any(1, keepdim=True), both, better | worse)
        trajectory.pairs(steps)  # refuses steps without log_prob
        pair, step = steps.nonzero().unbind(1)
        weight = _weights(self.settings.step_weight, trajectory.schedule)
        return PairedSteps(trajectory, torch.cat([pairs[pair], step[:, None]], 1), weight)

    def loss(
        self, policy: Policy, rows: tuple[StepBatch, Float32[Tensor, " n"]], *, is_on_policy: bool, scale: float
    ) -> Loss:
        """-log sigmoid of the weighed difference of the pair's clipped log-ratios to the reference policy."""
        pairs, weight = rows
        where = pairs.sample, pairs.timestep, pairs.prompt_index
        output, without = policy.outputs(*where)
        kind, tables = self.log_prob_kind(policy.schedule), pairs.transition
        log_prob = ops.guided_transition_log_prob(
            tables["sample"],
            output,
            without,
            policy.guidance_scale,
            tables["prev_sample"],
            pairs.coef,
            kind=kind,
            rows=pairs.rows,
        )
        reference = policy.reference(*where)
        ref_log_prob = ops.transition_log_prob(output=reference, coef=pairs.coef, kind=kind, **tables)
        log_probs = (x.view(2, -1) for x in (log_prob, ref_log_prob, pairs.old_log_prob))
        return _loss_of(self.settings, *log_probs, weight=weight, step=pairs.step_index[: len(weight)])


@dataclass(frozen=True)
class BranchedSteps:
    """`n` rows (sample, step) whose step leads to a better and to a worse state."""

    trajectory: Trajectory
    branches: Branches
    rows: Int64[Tensor, "n 2"]
    weight: Float32[Tensor, " t"]
    is_live: Bool[Tensor, " n"] | None = None
    num_forwards: int = 1

    @property
    def sample_index(self) -> Int64[Tensor, " n"]:
        """The sample of each row."""
        return self.rows[:, 0]

    def __len__(self) -> int:
        return len(self.rows)

    def ordered(self, rows: Int64[Tensor, " m"]) -> "BranchedSteps":
        """These rows, in their order."""
        return replace(self, rows=self.rows[rows])

    def held(self, shares: Sequence[Int64[Tensor, " m"]], rank: int) -> "BranchedSteps":
        """These rows with their states."""
        trajectory: Any = self.trajectory
        wanted = [self.rows[share] for share in shares]
        branches: Any = self.branches
        branches = branches.brought(wanted)
        return replace(self.ordered(shares[rank]), trajectory=trajectory.brought(wanted), branches=branches)

    def take(self, rows: Int64[Tensor, " m"] | slice) -> tuple[StepBatch, Tensor, Tensor, Tensor, Tensor]:
        """The steps, the better and the worse states, their log-probabilities [2, m], and the weight of each row."""
        sample, step = self.rows[rows].unbind(1)
        branches, column = self.branches, self.branches.column[step]
        recorded = branches.log_prob[sample, column].T
        states = branches.states(sample, column)
        return self.trajectory.gather(self.rows[rows]), *states, recorded, self.weight[step]


@dataclass(kw_only=True)
class Spo(Algorithm):
    """See `settings.Spo`."""

    settings: settings.Spo
    preference: StepAwareModel | None = None
    """What scores the candidates; None: the reward."""

    @property
    def branches(self) -> bool:
        """Always."""
        return True

    def suit(self, backbone: Backbone) -> None:
        """The preference model must be one of this model's latents and prompts."""
        if self.preference is not None:
            self.preference.suit(backbone)

    def log_prob_kind(self, schedule: Schedule) -> Kind:
        """See `log_prob_kind_of`."""
        return log_prob_kind_of(self.settings.log_prob, schedule)

    @property
    def is_repeatable(self) -> bool:
        """See `Algorithm`."""
        return True

    def collect(self, collector: Collector) -> Samples:
        """A rollout that is branched at every step with noise from the first on."""
        schedule, keys = collector.schedule, self.settings
        first = keys.first_step(schedule.num_steps)
        where = schedule.trainable & self._from(first, schedule.num_steps, schedule.trainable.device)
        if not bool(where.any()):
            raise ValueError(
                f"spo draws its candidates by the noise of a step, and {schedule.kind} has none from step {first} on; "
                f"choose a sampler with noise there, or lower algorithm.branch_from"
            )
        temperature = keys.temperature or (REWARD_TEMPERATURE if self.preference is None else 1.0)
        return collector.branched(
            where,
            num_candidates=keys.num_candidates,
            margin=keys.margin,
            temperature=temperature,
            preference=self.preference,
        )

    def steps(self, chosen: Bool[Tensor, "b t"], trainable: Bool[Tensor, " t"]) -> Bool[Tensor, "b t"]:
        """Those that are branched; ValueError where none is."""
        num_steps = chosen.shape[1]
        first = self.settings.first_step(num_steps)
        kept = chosen & self._from(first, num_steps, chosen.device)
        if not bool(kept.any()) and bool(chosen.any()):
            raise ValueError(
                f"spo trains steps from algorithm.branch_from = {first} on, and the selector kept "
                f"{int(chosen.any(0).nonzero()[-1])} as the last one; lower algorithm.branch_from, or keep later steps"
            )
        return kept

    @staticmethod
    def _from(first: int, num_steps: int, device: torch.device) -> Bool[Tensor, " t"]:
        return torch.arange(num_steps, device=device) >= first

    def batch(self, samples: Samples, context: Context) -> BranchedSteps:
        """The kept steps whose pair is live."""
        trajectory, branches = samples.trajectory, samples.branches
        assert branches is not None
        rows = trajectory.pairs(context.keep)  # refuses steps without log_prob
        rows = rows[branches.is_live[rows[:, 0], rows[:, 1]]]
        return BranchedSteps(trajectory, branches, rows, _weights(self.settings.step_weight, trajectory.schedule))

    def loss(
        self,
        policy: Policy,
        rows: tuple[StepBatch, Tensor, Tensor, Tensor, Tensor],
        *,
        is_on_policy: bool,
        scale: float,
    ) -> Loss:
        """D3PO's, of two states that follow from one forward."""
        steps, better, worse, recorded, weight = rows
        sample, kind = steps.sample, self.log_prob_kind(policy.schedule)
        where = sample, steps.timestep, steps.prompt_index
        output, without = policy.outputs(*where)
        reference, guidance = policy.reference(*where), policy.guidance_scale
        log_prob, ref_log_prob = (
            torch.stack([density(state) for state in (better, worse)])
            for density in (
                lambda state: ops.guided_transition_log_prob(
                    sample, output, without, guidance, state, steps.coef, kind=kind
                ),
                lambda state: ops.transition_log_prob(sample, reference, state, steps.coef, kind=kind),
            )
        )
        return _loss_of(self.settings, log_prob, ref_log_prob, recorded, weight=weight, step=steps.step_index)


def _loss_of(
    keys: settings.D3po | settings.Spo,
    log_prob: Float[Tensor, "2 n"],
    ref_log_prob: Float[Tensor, "2 n"],
    recorded: Float32[Tensor, "2 n"],
    *,
    weight: Float32[Tensor, " n"],
    step: Int64[Tensor, " n"],
) -> Loss:
    log_ratio = log_prob - ref_log_prob
    values = preference_loss(log_ratio, weight, beta=keys.beta, clip=keys.clip_range)
    ratio = log_ratio.detach().exp()
    told = {
        "ratio": ratio,
        "approx_kl": 0.5 * log_ratio.detach().square(),
        "clipfrac": ((ratio - 1).abs() > keys.clip_range).float(),
        "nonfinite": (~log_ratio.detach().isfinite()).float(),
        "log_prob": log_prob.detach(),
        "rollout_log_prob": recorded,
    }
    return Loss(values, {name: value.mean(0) for name, value in told.items()} | {"step": step})


def _weights(step_weight: settings.StepWeight, schedule: Schedule) -> Float32[Tensor, " t"]:
    make = STEP_WEIGHTS[step_weight]
    return torch.ones_like(schedule.coef[:, 2]) if make is None else make(schedule)


def preference_loss(
    log_ratio: Float[Tensor, "2 n"], weight: Float[Tensor, " n"], *, beta: float, clip: float
) -> Float[Tensor, " n"]:
    """-log sigmoid(beta * weight * (clipped better - clipped worse)); no gradient where a ratio is beyond 1 +- clip."""
    low = math.log1p(-clip) if clip < 1 else -math.inf
    better, worse = log_ratio.clamp(low, math.log1p(clip)).unbind(0)
    return F.softplus(-beta * weight * (better - worse))


def paired(rewards: Float[Tensor, " b"], prompts: list[str]) -> Int64[Tensor, "p 2"]:
    """(better, worse) samples: of each prompt the highest reward with the lowest, and so inward; ties are left out."""
    values = rewards.detach().cpu().double().tolist()
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    found = []
    for rows in groups.values():
        ranked = sorted(rows, key=lambda row: -values[row])
        inward = zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False)
        found += [[better, worse] for better, worse in inward if values[better] > values[worse]]
    return torch.tensor(found, dtype=torch.int64).view(-1, 2)


def d3po(**keys: Any) -> D3po:
    """D3PO with the keys of `settings.D3po`."""
    return settings.D3po(**keys).build()


def d3po_of(section: settings.D3po) -> D3po:
    """The algorithm that its section describes."""
    return D3po(name=section.name, settings=section, train_guidance=section.train_guidance, needs_reference=True)


def spo(**keys: Any) -> Spo:
    """SPO with the keys of `settings.Spo`."""
    return settings.Spo(**keys).build()


def spo_of(section: settings.Spo) -> Spo:
    """The algorithm that its section describes."""
    named = section.preference_model
    return Spo(
        name=section.name,
        settings=section,
        train_guidance=section.train_guidance,
        needs_reference=True,
        preference=None if named == "reward" else StepAwareModel.load(Path(named)),
    )


@dataclass(frozen=True)
class NoisedPairs:
    """`n` rows of a pair at a noise level, with one noise for both of its pictures."""

    better: Noised
    worse: Noised
    is_live: Bool[Tensor, " n"] | None = None
    num_forwards: int = 2

    @property
    def sample_index(self) -> Int64[Tensor, " n"]:
        """The better picture of each row: it tells the pair."""
        return self.better.sample_index

    def __len__(self) -> int:
        return len(self.better)

    def ordered(self, rows: Int64[Tensor, " m"]) -> "NoisedPairs":
        """These rows, in their order."""
        return NoisedPairs(self.better.ordered(rows), self.worse.ordered(rows))

    def held(self, shares: Sequence[Int64[Tensor, " m"]], rank: int) -> "NoisedPairs":
        """These rows with both pictures."""
        return NoisedPairs(self.better.held(shares, rank), self.worse.held(shares, rank))

    def take(self, rows: Int64[Tensor, " m"] | slice) -> NoisedBatch:
        """The better pictures of the rows, then the worse ones."""
        both = [self.better.take(rows), self.worse.take(rows)]
        names = [one.name for one in fields(NoisedBatch) if one.name != "old_log_prob"]
        columns: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in both]) for name in names}
        return NoisedBatch(**columns, old_log_prob=None)


@dataclass(frozen=True)
class NoisedJudged:
    """`n` pictures at a noise level each; liked ones have advantage +1 there, the others -1."""

    noised: Noised
    ref_error: Float32[Tensor, " n"]
    divergence: Float32[Tensor, ""]
    """k, of all rows of the iteration."""
    is_live: Bool[Tensor, " n"] | None = None
    num_forwards: int = 1

    @property
    def sample_index(self) -> Int64[Tensor, " n"]:
        """The picture of each row."""
        return self.noised.sample_index

    def __len__(self) -> int:
        return len(self.noised)

    def ordered(self, rows: Int64[Tensor, " m"]) -> "NoisedJudged":
        """These rows, in their order."""
        return NoisedJudged(self.noised.ordered(rows), self.ref_error[rows], self.divergence)

    def held(self, shares: Sequence[Int64[Tensor, " m"]], rank: int) -> "NoisedJudged":
        """These rows with their pictures."""
        return NoisedJudged(self.noised.held(shares, rank), self.ref_error[shares[rank]], self.divergence)

    def take(
        self, rows: Int64[Tensor, " m"] | slice
    ) -> tuple[NoisedBatch, Float32[Tensor, " m"], Float32[Tensor, " m"]]:
        """The noised pictures, the reference's error of each, and k for each."""
        ref_error = self.ref_error[rows]
        return self.noised.take(rows), ref_error, self.divergence.expand(len(ref_error))


@dataclass(kw_only=True)
class _Offline(Algorithm):
    """What learns from a set: `draw` chooses records, `collect` asks for their pictures in place of a rollout."""

    _records: list[int] = field(default_factory=list, init=False, repr=False)
    _told: list[str] = field(default_factory=list, init=False, repr=False)

    def schedule(self, schedule: Schedule) -> Schedule:
        """The sampler as it is; all its steps have noise levels to train at, deterministic ones too."""
        return replace(schedule, is_noised=True)

    @property
    def is_repeatable(self) -> bool:
        """See `Algorithm`."""
        return True

    def _drawn(self, records: list[int], prompts: list[str], rng: random.Random, dropout: float) -> list[str]:
        """Remember the records, and which of them are told no prompt; all that has to be encoded.

        Args:
            prompts: of the records.
        """
        self._records, self._told = records, ["" if rng.random() < dropout else prompt for prompt in prompts]
        return prompts + self._told

    def _noised(self, stills: Stills, keep: Bool[Tensor, "r t"], count: int, context: Context) -> Noised:
        """`count` noise levels of each of the first `r` pictures among its kept steps, and noise for each."""
        sample, step = noise_levels(keep, count, context.generator)
        ones = torch.ones(len(step), device=step.device)
        return Noised.of(stills.latents, context.noise, sample, step, stills.prompt_index, stills.schedule, ones)


@dataclass(kw_only=True)
class DiffusionDpo(_Offline):
    """See `settings.DiffusionDpo`."""

    settings: settings.DiffusionDpo
    pairs: PreferenceSet[Pair]

    @property
    def preferences(self) -> Preferences:
        """The pairs."""
        return self.pairs

    def draw(self, seed: int, count: int) -> list[str]:
        """`count` pairs, none twice before all were drawn; and which of them are told no prompt."""
        rng, numbers = random.Random(seed), list(range(len(self.pairs.records)))
        chosen = rng.sample(numbers * -(-count // len(numbers)), count)
        prompts = [self.pairs.records[number].prompt for number in chosen]
        return self._drawn(chosen, prompts, rng, self.settings.prompt_dropout)

    def collect(self, collector: Collector) -> Stills:
        """The chosen pictures of the drawn pairs, then the rejected ones."""
        pairs = [self.pairs.records[number] for number in self._records]
        images = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        return collector.stills(images, [pair.prompt for pair in pairs] * 2, self._told * 2)

    def batch(self, samples: Stills, context: Context) -> NoisedPairs:
        """`num_draws` noise levels of each pair, among the steps that are kept of its chosen picture."""
        count = len(samples.prompts) // 2
        better = self._noised(samples, context.keep[:count], self.settings.num_draws, context)
        worse = replace(better, sample_index=better.sample_index + count, advantage=-better.advantage)
        return NoisedPairs(better, worse)

    def loss(self, policy: Policy, rows: NoisedBatch, *, is_on_policy: bool, scale: float) -> Loss:
        """-log sigmoid of half of beta times how much more of the better picture's error is gone."""
        where = rows.sample, rows.timestep, rows.prompt_index
        ref_error = mean_square(policy.reference(*where, is_guided=False) - rows.target)
        error = mean_square(policy.output(*where) - rows.target)
        beta = self.settings.beta
        margin = pair_margin(error.view(2, -1), ref_error.view(2, -1), beta=beta)
        gain = (ref_error - error.detach()).view(2, -1)
        told = {
            "step": rows.step[: len(margin)],
            "approx_kl": 0.5 * gain.square().mean(0),
            "nonfinite": (~margin.detach().isfinite()).float(),
            "accuracy": (margin.detach() > 0).float(),
            "margin": margin.detach(),
        }
        return Loss(F.softplus(-margin), told)


@dataclass(kw_only=True)
class DiffusionKto(_Offline):
    """See `settings.DiffusionKto`."""

    settings: settings.DiffusionKto
    judged: PreferenceSet[Judged]

    def __post_init__(self) -> None:
        self._by_label = [
            [number for number, one in enumerate(self.judged.records) if one.is_liked == is_liked]
            for is_liked in (False, True)
        ]
        if not all(self._by_label):
            which = "liked" if self._by_label[True] else "disliked"
            raise ValueError(
                f"diffusion_kto learns from liked and disliked pictures, got {len(self.judged.records)} in "
                f"{str(self.judged.folder)!r} that are all {which}; add the others"
            )

    @property
    def preferences(self) -> Preferences:
        """The labelled pictures."""
        return self.judged

    def draw(self, seed: int, count: int) -> list[str]:
        """`count` pictures, each liked with a chance of `positive_ratio`; and which of them are told no prompt."""
        rng = random.Random(seed)
        chosen = [rng.choice(self._by_label[rng.random() < self.settings.positive_ratio]) for _ in range(count)]
        prompts = [self.judged.records[number].prompt for number in chosen]
        return self._drawn(chosen, prompts, rng, self.settings.prompt_dropout)

    def collect(self, collector: Collector) -> Stills:
        """The drawn pictures."""
        records = [self.judged.records[number] for number in self._records]
        return collector.stills([one.image for one in records], [one.prompt for one in records], self._told)

    def batch(self, samples: Stills, context: Context) -> NoisedJudged:
        """`num_draws` noise levels of each picture among its kept steps; its error before training, and k."""
        policy = context.policy
        noised = self._noised(samples, context.keep, self.settings.num_draws, context)
        labels = [1.0 if self.judged.records[number].is_liked else -1.0 for number in self._records]
        sign = torch.tensor(labels, device=noised.step.device)[noised.sample_index]
        noised = replace(noised, advantage=sign)

        def errors(batch: NoisedBatch) -> Float32[Tensor, "2 m"]:
            outputs = policy.reference(*batch.where, is_guided=False), policy.frozen(*batch.where)
            return torch.stack([mean_square(output - batch.target) for output in outputs])

        ref_error, error = context.of_all(noised, errors)
        return NoisedJudged(noised, ref_error, divergence_of(error, ref_error))

    def loss(
        self,
        policy: Policy,
        rows: tuple[NoisedBatch, Float32[Tensor, " n"], Float32[Tensor, " n"]],
        *,
        is_on_policy: bool,
        scale: float,
    ) -> Loss:
        """One minus the utility of what a picture's error has lost, times the weight of its label."""
        batch, ref_error, divergence = rows
        output = policy.output(batch.sample, batch.timestep, batch.prompt_index)
        error, given = mean_square(output - batch.target), self.settings
        margin = judged_margin(error, ref_error, divergence, batch.advantage, beta=given.beta)
        weight = torch.where(batch.advantage > 0, given.liked_weight, given.disliked_weight)
        told = {
            "step": batch.step,
            "kl": divergence,
            "approx_kl": 0.5 * (ref_error - error.detach()).square(),
            "nonfinite": (~margin.detach().isfinite()).float(),
            "accuracy": (margin.detach() > 0).float(),
            "margin": margin.detach(),
        }
        return Loss(weight * torch.sigmoid(-margin), told)


def pair_margin(error: Float[Tensor, "2 n"], ref_error: Float[Tensor, "2 n"], *, beta: float) -> Float[Tensor, " n"]:
    """-beta / 2 * ((e_w - e_l) - (e_ref_w - e_ref_l)), above 0 where the pair is told right; -log sigmoid of it is DPO.

    Args:
        error: of the better pictures, then of the worse ones.
    """
    better, worse = (ref_error - error).unbind(0)
    return beta / 2 * (better - worse)


def judged_margin(
    error: Float[Tensor, " n"],
    ref_error: Float[Tensor, " n"],
    divergence: Float[Tensor, " n"],
    sign: Float[Tensor, " n"],
    *,
    beta: float,
) -> Float[Tensor, " n"]:
    """+-beta * (e_ref - e - k), above 0 where a picture is told right; KTO's utility is its sigmoid.

    Args:
        divergence: k.
        sign: 1 of a liked picture, -1 of another.
    """
    return sign * beta * (ref_error - error - divergence)


def divergence_of(error: Float[Tensor, " n"], ref_error: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """max(0, mean of e_ref - e), without gradient."""
    return (ref_error - error).detach().mean().clamp(min=0)


def diffusion_dpo(**keys: Any) -> DiffusionDpo:
    """Diffusion-DPO with the keys of `settings.DiffusionDpo`."""
    return settings.DiffusionDpo(**keys).build()


def diffusion_dpo_of(section: settings.DiffusionDpo) -> DiffusionDpo:
    """The algorithm that its section describes, with its set."""
    pairs = read_pairs(section.preferences)
    return DiffusionDpo(
        name=section.name, settings=section, pairs=pairs, train_guidance=section.train_guidance, needs_reference=True
    )


def diffusion_kto(**keys: Any) -> DiffusionKto:
    """Diffusion-KTO with the keys of `settings.DiffusionKto`."""
    return settings.DiffusionKto(**keys).build()


def diffusion_kto_of(section: settings.DiffusionKto) -> DiffusionKto:
    """The algorithm that its section describes, with its set."""
    judged = read_judged(section.preferences)
    return DiffusionKto(
        name=section.name, settings=section, judged=judged, train_guidance=section.train_guidance, needs_reference=True
    )
