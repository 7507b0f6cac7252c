"""The losses of a policy step: what knows ratios, advantages and clip ranges.

Axes: `n` pairs of a sample and a step.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Clip = Literal["ppo", "dpok"]


def clipped_policy_loss(
    log_prob: Float[Tensor, " n"],
    old_log_prob: Float[Tensor, " n"],
    advantage: Float[Tensor, " n"],
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """max(-A r, -A clip(r)) with r = exp(log_prob - old_log_prob), unreduced; and r, without gradient.

    Args:
        log_prob: of the policy being trained; the gradient flows here.
        old_log_prob: of the policy that drew the rollout.
        advantage: A, already clipped if it is to be.
        clip_range, clip_range_high: r is clipped to [1 - clip_range, 1 + clip_range_high]; None means clip_range.
    """
    log_prob, old_log_prob, advantage = _policy_vectors(log_prob, old_log_prob, advantage)
    low, high = clip_bounds(clip_range, clip_range_high)
    ratio = (log_prob - old_log_prob).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))
    return loss, ratio.detach()


def dpok_policy_loss(
    log_prob: Float[Tensor, " n"],
    old_log_prob: Float[Tensor, " n"],
    advantage: Float[Tensor, " n"],
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """-A clip(r) with r = exp(log_prob - old_log_prob), unreduced; and r, without gradient.

    DPOK's loss (google-research/dpok). PPO's takes the larger of this and -A r, so that a ratio on the wrong side of
    the range is pulled back; here a ratio outside the range has no gradient, whatever the sign of A.

    Args:
        log_prob, old_log_prob, advantage, clip_range, clip_range_high: as in `clipped_policy_loss`.
    """
    log_prob, old_log_prob, advantage = _policy_vectors(log_prob, old_log_prob, advantage)
    ratio = (log_prob - old_log_prob).exp()
    return -advantage * ratio.clamp(*clip_bounds(clip_range, clip_range_high)), ratio.detach()


def clip_bounds(clip_range: float, clip_range_high: float | None) -> tuple[float, float]:
    """Lowest and highest ratio that is not clipped."""
    return 1.0 - clip_range, 1.0 + (clip_range if clip_range_high is None else clip_range_high)


def _policy_vectors(*vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log_prob, old_log_prob, advantage) in float32 or above, the last two without gradient."""
    if len({x.shape for x in vectors}) > 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in vectors)
        raise ValueError(f"log_prob, old_log_prob and advantage must have one shape, not {shapes}")
    log_prob, old_log_prob, advantage = vectors
    dtype = torch.promote_types(log_prob.dtype, torch.float32)
    return log_prob.to(dtype), old_log_prob.detach().to(dtype), advantage.detach().to(dtype)
