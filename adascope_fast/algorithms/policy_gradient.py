"""Reinforcement-learning algorithms as compositions of an advantage and an objective.

The engine knows neither: a new algorithm is a new function here, made of parts that exist or of one new part.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from adascope_fast import ops
from adascope_fast.algorithms.advantages import Advantage, GroupRelative, PerPromptTracker
from adascope_fast.algorithms.attribution import Attribution
from adascope_fast.algorithms.objectives import ppo_clip
from adascope_fast.schedules import Schedule

Objective = Callable[
    [Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]], tuple[Float[Tensor, " n"], Float[Tensor, " n"]]
]
"""(log_prob, old_log_prob, advantage) -> (loss, ratio), all [n]; the engine averages."""


@dataclass(frozen=True)
class Algorithm:
    """`advantage` turns rewards [b] into [b, t], `objective` turns log-probabilities into an unreduced loss [n].

    `step_weight` turns a schedule into weights [t] that multiply the advantages; None leaves every step its own.
    `kl_weight` (beta) adds that many times the KL of each step from the reference policy; 0 costs no reference pass.
    `clip` names the fused operation that computes this objective, "ppo" or "dpok"; None: there is none, and the
    objective is differentiated as it stands.
    `attribution` says which steps the reward is credited to and how much of it each gets.
    """

    name: str
    advantage: Advantage
    objective: Objective
    clip_range: float
    clip_range_high: float | None = None
    step_weight: Callable[[Schedule], Float32[Tensor, " t"]] | None = None
    kl_weight: float = 0.0
    clip: Literal["ppo", "dpok"] | None = None
    attribution: Attribution = field(default_factory=Attribution)

    def training_step(
        self,
        sample: Float[Tensor, "n *latent"],
        output: Float[Tensor, "n *latent"],
        prev_sample: Float[Tensor, "n *latent"],
        coef: Float32[Tensor, "n 3"],
        old_log_prob: Float32[Tensor, " n"] | None,
        advantage: Float[Tensor, " n"],
        *,
        output_uncond: Float[Tensor, "n *latent"] | None,
        guidance_scale: float,
        ref_output: Float[Tensor, "n *latent"] | None,
        scale: float,
    ) -> tuple[Float[Tensor, " n"], dict[str, Tensor], Tensor, Tensor | None]:
        """Loss, statistics and gradients in the model outputs, as `ops.transition_policy_grad`."""
        shared: dict[str, Any] = {"clip_range": self.clip_range, "clip_range_high": self.clip_range_high}
        shared |= {"output_uncond": output_uncond, "guidance_scale": guidance_scale, "ref_output": ref_output}
        rows = (sample, output, prev_sample, coef, old_log_prob, advantage)
        if self.clip is not None:
            return ops.transition_policy_grad(
                *rows,
                **shared,
                kl_weight=self.kl_weight,
                clip=self.clip,
                scale=scale,
            )
        outputs = [value.detach().requires_grad_() for value in (output, output_uncond) if value is not None]
        with torch.enable_grad():
            shared["output_uncond"] = outputs[1] if len(outputs) == 2 else None
            rows = (sample, outputs[0], prev_sample, coef, old_log_prob, torch.zeros_like(advantage))
            penalty, stats = ops.transition_policy_loss(*rows, **shared, kl_weight=self.kl_weight)
            log_prob = ops.guided_transition_log_prob(
                sample, outputs[0], shared["output_uncond"], guidance_scale, prev_sample, coef
            )
            old_log_prob = log_prob.detach() if old_log_prob is None else old_log_prob
            loss = self.objective(log_prob, old_log_prob, advantage)[0] + penalty
            gradients = torch.autograd.grad(loss.sum() * scale, outputs)
        return loss.detach(), stats, gradients[0], gradients[1] if len(gradients) == 2 else None


def balanced(schedule: Schedule) -> Float32[Tensor, " t"]:
    """Weights proportional to std / |b|, of mean 1 over the trainable steps and 0 elsewhere.

    The gradient of a step's log-probability with respect to the model output has norm |b| / std (times noise), which
    grows steeply towards the picture: without weights the last few steps make up nearly all of the gradient's variance.
    """
    _, weight_output, std = schedule.coef.unbind(1)
    weight = torch.where(std > 0, std / weight_output.abs(), 0.0)
    return weight * (std > 0).sum() / weight.sum()


STEP_WEIGHTS: dict[str, Callable[[Schedule], Float32[Tensor, " t"]] | None] = {"none": None, "balanced": balanced}


def ddpo(
    *,
    clip_range: float = 1e-4,
    clip_range_high: float | None = None,
    advantage_clip: float = 5.0,
    buffer_size: int = 32,
    min_count: int = 16,
    step_weight: str = "none",
    kl_weight: float = 0.0,
) -> Algorithm:
    """DDPO with importance sampling (Black et al. 2023): PPO on every step's likelihood, statistics per prompt.

    Differs from ddpo-pytorch: which steps are trained is the selector's business, and the loss is averaged over the
    trained pairs in one go, so that the microbatch does not matter.
    """
    advantage = PerPromptTracker(buffer_size=buffer_size, min_count=min_count, clip=advantage_clip)
    return _clipped("ddpo", advantage, clip_range, clip_range_high, step_weight, kl_weight)


def grpo(
    *,
    clip_range: float = 1e-4,
    clip_range_high: float | None = None,
    advantage_clip: float = 5.0,
    scale: str = "global",
    step_weight: str = "none",
    kl_weight: float = 0.0,
) -> Algorithm:
    """GRPO for diffusion and flow models (Flow-GRPO, Liu et al. 2025): advantages relative to the prompt's group.

    Differs from flow_grpo: its KL leaves out a factor -dt, ours is the divergence; selectors choose the steps.
    `scale` is the standard deviation that divides: "global" (flow_grpo), "group", or "group_sample" (DanceGRPO).
    """
    advantage = GroupRelative(scale=scale, clip=advantage_clip)  # type: ignore[arg-type]
    return _clipped("grpo", advantage, clip_range, clip_range_high, step_weight, kl_weight)


def _clipped(
    name: str,
    advantage: Advantage,
    clip_range: float,
    clip_range_high: float | None,
    step_weight: str,
    kl_weight: float,
) -> Algorithm:
    if step_weight not in STEP_WEIGHTS:
        raise ValueError(f"step_weight is one of {', '.join(STEP_WEIGHTS)}, got {step_weight!r}; choose one of them")

    def objective(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        return ppo_clip(log_prob, old_log_prob, advantage, clip_range=clip_range, clip_range_high=clip_range_high)

    return Algorithm(
        name, advantage, objective, clip_range, clip_range_high, STEP_WEIGHTS[step_weight], kl_weight, "ppo"
    )
