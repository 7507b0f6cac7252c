"""Preferences between trajectories of one prompt, step by step: D3PO (Yang et al. 2023, 2311.13231).

`b` samples, `t` steps, `n` (pair, step) rows; a row is two denoiser rows, the better image's and the worse one's.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from adascope_fast import ops
from adascope_fast.algorithms import settings
from adascope_fast.algorithms.algorithm import Algorithm, Context, Loss, Policy, Samples
from adascope_fast.algorithms.policy_gradient import STEP_WEIGHTS, log_prob_kind_of
from adascope_fast.reference import Kind
from adascope_fast.rollout import StepBatch, Trajectory
from adascope_fast.schedules import Schedule


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
        make = STEP_WEIGHTS[self.settings.step_weight]
        schedule = trajectory.schedule
        weight = torch.ones_like(schedule.coef[:, 2]) if make is None else make(schedule)
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
        log_ratio = log_prob - ref_log_prob
        values = preference_loss(log_ratio.view(2, -1), weight, beta=self.settings.beta, clip=self.settings.clip_range)
        ratio, clip = log_ratio.detach().exp(), self.settings.clip_range
        told = {
            "ratio": ratio,
            "approx_kl": 0.5 * log_ratio.detach().square(),
            "clipfrac": ((ratio - 1).abs() > clip).float(),
            "nonfinite": (~log_ratio.detach().isfinite()).float(),
            "log_prob": log_prob.detach(),
            "rollout_log_prob": pairs.old_log_prob,
        }
        by_row = {name: value.view(2, -1).mean(0) for name, value in told.items()}
        return Loss(values, by_row | {"step": pairs.step_index[: len(values)]})


def preference_loss(
    log_ratio: Float[Tensor, "2 n"], weight: Float[Tensor, " n"], *, beta: float, clip: float
) -> Float[Tensor, " n"]:
    """-log sigmoid(beta * weight * (clipped better - clipped worse)); no gradient where a ratio is beyond 1 +- clip."""
    low = math.log1p(-clip) if clip < 1 else -math.inf
    better, worse = log_ratio.clamp(low, math.log1p(clip)).unbind(0)
    return F.softplus(-beta * weight * (better - worse))


def paired(rewards: Float[Tensor, " b"], prompts: list[str]) -> Int64[Tensor, "p 2"]:
    """(better, worse) samples: of each prompt the highest reward with the lowest, and so inward; ties are left out."""
    values = rewards.detach().double().cpu().tolist()
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
