"""Reinforcement-learning algorithms as compositions of an advantage and an objective.

The engine knows neither: a new algorithm is a new function here, made of parts that exist or of one new part.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from adascope_fast.advantages import Advantage, GroupRelative, PerPromptTracker
from adascope_fast.objectives import ppo_clip

Objective = Callable[
    [Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]], tuple[Float[Tensor, " n"], Float[Tensor, " n"]]
]
"""(log_prob, old_log_prob, advantage) -> (loss, ratio), all [n]; the engine averages."""


@dataclass(frozen=True)
class Algorithm:
    """`advantage` turns rewards [b] into [b, t], `objective` turns log-probabilities into an unreduced loss [n]."""

    name: str
    advantage: Advantage
    objective: Objective
    clip_range: float
    clip_range_high: float | None = None


def ddpo(
    *,
    clip_range: float = 1e-4,
    clip_range_high: float | None = None,
    advantage_clip: float = 5.0,
    buffer_size: int = 32,
    min_count: int = 16,
) -> Algorithm:
    """DDPO with importance sampling (Black et al. 2023): PPO on every step's likelihood, statistics per prompt.

    Differs from ddpo-pytorch: which steps are trained is the selector's business, and the loss is averaged over the
    trained pairs in one go, so that the microbatch does not matter.
    """
    advantage = PerPromptTracker(buffer_size=buffer_size, min_count=min_count, clip=advantage_clip)
    return _clipped("ddpo", advantage, clip_range, clip_range_high)


def grpo(
    *,
    clip_range: float = 1e-4,
    clip_range_high: float | None = None,
    advantage_clip: float = 5.0,
    scale: str = "global",
) -> Algorithm:
    """GRPO for diffusion and flow models (Flow-GRPO, Liu et al. 2025): advantages relative to the prompt's group.

    Differs from flow_grpo: no KL term at this stage, and the same selectors as everywhere.
    `scale` is the standard deviation that divides: "global" (flow_grpo), "group", or "group_sample" (DanceGRPO).
    """
    advantage = GroupRelative(scale=scale, clip=advantage_clip)  # type: ignore[arg-type]
    return _clipped("grpo", advantage, clip_range, clip_range_high)


def _clipped(name: str, advantage: Advantage, clip_range: float, clip_range_high: float | None) -> Algorithm:
    def objective(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        return ppo_clip(log_prob, old_log_prob, advantage, clip_range=clip_range, clip_range_high=clip_range_high)

    return Algorithm(name, advantage, objective, clip_range, clip_range_high)
