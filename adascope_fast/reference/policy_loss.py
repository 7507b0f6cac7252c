"""The losses of a policy step: what knows ratios, advantages and clip ranges.

Axes: `n` pairs of a sample and a step.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
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

    At the edges, with a slope of the loss in log_prob that is 0 where it is clipped and -A r where it is not:

        r is not a number, or A is not     loss and slope are NaN
        A = 0                              both are 0, whatever r is
        r is on a bound                    it is not clipped
        r is infinite                      it is clipped if A > 0; if A < 0, loss and slope are infinite

    An infinite log-probability is one of these: r is infinite or 0, and NaN where both are infinite alike.

    Args:
        log_prob: of the policy being trained; the gradient flows here.
        old_log_prob: of the policy that drew the rollout.
        advantage: A, already clipped if it is to be.
        clip_range, clip_range_high: r is clipped to [1 - clip_range, 1 + clip_range_high]; None means clip_range.
    """
    log_prob, old_log_prob, advantage = _policy_vectors(log_prob, old_log_prob, advantage)
    low, high = clip_bounds(clip_range, clip_range_high)
    return _loss(log_prob - old_log_prob, advantage, low, high, "ppo")


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
    the range is pulled back; here a ratio outside the range has no gradient, whatever the sign of A. At the edges it
    is as that, but for an infinite ratio, which is clipped with A < 0 too.

    Args:
        log_prob, old_log_prob, advantage, clip_range, clip_range_high: as in `clipped_policy_loss`.
    """
    log_prob, old_log_prob, advantage = _policy_vectors(log_prob, old_log_prob, advantage)
    low, high = clip_bounds(clip_range, clip_range_high)
    return _loss(log_prob - old_log_prob, advantage, low, high, "dpok")


def clip_bounds(clip_range: float, clip_range_high: float | None) -> tuple[float, float]:
    """Lowest and highest ratio that is not clipped; a ValueError unless both ranges are what a configuration takes."""
    high = clip_range if clip_range_high is None else clip_range_high
    for name, value in (("clip_range", clip_range), ("clip_range_high", high)):
        if not 0 < value <= 1e12:
            raise ValueError(
                f"{name} must be above 0 and at most 1e12, got {value}; pass a distance of the ratio from 1, such as "
                f"1e-4, and 1e12 to clip nothing"
            )
    return 1.0 - clip_range, 1.0 + high


def is_clipped(ratio: Tensor, advantage: Tensor, low: float, high: float, clip: Clip) -> Bool[Tensor, " n"]:
    """Where the clipped ratio decides, so that the loss has no slope; decided by the sign of A, as 0 * inf is none."""
    if clip == "ppo":
        return ((advantage >= 0) & (ratio > high)) | ((advantage <= 0) & (ratio < low))
    return ((ratio > high) | (ratio < low)) & ~advantage.isnan()


def _loss(log_ratio: Tensor, advantage: Tensor, low: float, high: float, clip: Clip) -> tuple[Tensor, Tensor]:
    """(loss, ratio). Where it is clipped exp is of 0, or its gradient would be inf * 0."""
    ratio = log_ratio.detach().exp()
    is_flat = is_clipped(ratio, advantage, low, high, clip)
    taken = torch.where(is_flat, ratio.clamp(low, high), torch.where(is_flat, 0.0, log_ratio).exp())
    return -advantage * taken, ratio


def _policy_vectors(*vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log_prob, old_log_prob, advantage) in float32 or above, the last two without gradient."""
    if len({x.shape for x in vectors}) > 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in vectors)
        raise ValueError(f"log_prob, old_log_prob and advantage must have one shape, not {shapes}")
    log_prob, old_log_prob, advantage = vectors
    dtype = torch.promote_types(log_prob.dtype, torch.float32)
    return log_prob.to(dtype), old_log_prob.detach().to(dtype), advantage.detach().to(dtype)
