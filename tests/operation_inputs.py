"""Small arguments of every operation, by name: `n` = 3 rows of [2, 4], all float32 on the CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

N = 3
CONVERTED = {"coef", "x0_coef", "old_log_prob", "advantage", "weight", "kl_weight", "scale", "state"}
"""A few numbers a row, not latents."""


def arguments(row: tuple[int, ...] = (2, 4)) -> dict[str, dict[str, Any]]:
    """The keyword arguments of each operation."""
    generator = torch.Generator().manual_seed(0)

    def latents(*names: str) -> dict[str, Tensor]:
        return {name: torch.randn(N, *row, generator=generator) for name in names}

    def numbers(**widths: int) -> dict[str, Tensor]:
        return {
            name: 0.5 + torch.rand(N, *([width] if width else []), generator=generator)
            for name, width in widths.items()
        }

    guidance: dict[str, Any] = {"guidance_scale": 2.0}
    step = {**latents("sample", "output", "noise"), **numbers(coef=3)}
    log_prob = {**latents("sample", "output", "prev_sample"), **numbers(coef=3)}
    clipped = {**numbers(log_prob=0, old_log_prob=0, advantage=0), "clip_range": 0.1}
    policy = {
        **log_prob,
        **latents("output_uncond", "ref_output"),
        **numbers(old_log_prob=0, advantage=0, kl_weight=0),
        **guidance,
        "clip_range": 0.1,
    }
    return {
        "transition_log_prob": log_prob,
        "guided_transition_log_prob": {
            **latents("sample", "output_cond", "output_uncond", "prev_sample"),
            **numbers(coef=3),
            **guidance,
        },
        "transition_log_prob_grad": {**log_prob, **latents("output_uncond"), **numbers(weight=0), **guidance},
        "transition_step": {**step, **latents("output_uncond"), **guidance},
        "transition_step_with_x0": {**step, **latents("output_uncond", "prev_x0"), **numbers(x0_coef=2), **guidance},
        "clipped_policy_loss": clipped,
        "dpok_policy_loss": clipped,
        "transition_policy_loss": policy,
        "transition_policy_grad": {**policy, **numbers(scale=0)},
        "gaussian_kl": {**latents("output", "ref_output"), **numbers(coef=3)},
        "correlation": latents("x", "y"),
        "correlations": {"x": torch.randn(N, 2, *row, generator=generator), **latents("y")},
        "correlation_update": {**latents("x", "y"), **numbers(state=6)},
    }


def tensors_of(found: Any) -> list[Tensor]:
    """The tensors in an operation's result, in order."""
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
