# ruff: noqa: N803 -- compile-time constants are upper case, as Triton writes them
# pyright: reportGeneralTypeIssues=false
"""The clipped policy loss of each row, PPO's or DPOK's, from its log-probability.

Bytes moved: 12 read and 12 written a row, whatever d is. Launches: 1 forward, 1 backward (PyTorch's product).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .library import launch, register
from .rows import cdiv, is_first, vector

FINISH_ROWS = 128


@triton.jit
def clipped_loss_of(log_prob, old_log_prob, advantage, low, high, IS_PPO: tl.constexpr):
    """Loss, ratio r, and the slope dloss / dlog_prob: max(-A r, -A clip(r)), or -A clip(r) alone.

    Decided by the sign of A, not by which product is larger: 0 * inf is neither, and tl.maximum would drop a NaN.
    """
    ratio = tl.exp(log_prob - old_log_prob)
    is_below, is_above = ratio < low, ratio > high
    if IS_PPO:
        is_clipped = ((advantage >= 0) & is_above) | ((advantage <= 0) & is_below)
    else:
        is_clipped = (is_above | is_below) & (advantage == advantage)
    loss = -advantage * tl.where(is_clipped, tl.where(is_below, low, high), ratio)
    return loss, ratio, tl.where(is_clipped, 0.0, loss)


@triton.jit
def clipped_policy_loss_kernel(
    loss_ptr, ratio_ptr, slope_ptr, log_prob_ptr, old_log_prob_ptr, advantage_ptr, n, low, high,
    IS_PPO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Elementwise in [n]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < n
    log_prob = tl.load(log_prob_ptr + row, mask=mask, other=0.0)
    old_log_prob = tl.load(old_log_prob_ptr + row, mask=mask, other=0.0)
    advantage = tl.load(advantage_ptr + row, mask=mask, other=0.0)
    loss, ratio, slope = clipped_loss_of(log_prob, old_log_prob, advantage, low, high, IS_PPO)
    tl.store(loss_ptr + row, loss, mask=mask)
    tl.store(ratio_ptr + row, ratio, mask=mask)
    tl.store(slope_ptr + row, slope, mask=mask)


def check_vectors(**vectors: Tensor) -> None:
    """A ValueError unless all have one shape."""
    if len({x.shape for x in vectors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in vectors.items())
        raise ValueError(f"log_prob, old_log_prob and advantage must have one shape, not {shapes}")


def clip_bounds(clip_range: float, clip_range_high: float | None) -> tuple[float, float]:
    """`reference.policy_loss.clip_bounds`."""
    high = clip_range if clip_range_high is None else clip_range_high
    for name, value in (("clip_range", clip_range), ("clip_range_high", high)):
        if not 0 < value <= 1e12:
            raise ValueError(
                f"{name} must be above 0 and at most 1e12, got {value}; pass a distance of the ratio from 1, such as "
                f"1e-4, and 1e12 to clip nothing"
            )
    return 1.0 - clip_range, 1.0 + high


def is_ppo(clip: str) -> bool:
    """Whether the clip is PPO's; a ValueError if it is neither that nor DPOK's."""
    return is_first("clip", clip, ("ppo", "dpok"))


def _clipped(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, low: float, high: float, is_ppo: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_vectors(log_prob=log_prob, old_log_prob=old_log_prob, advantage=advantage)
    log_prob, n = vector(log_prob), log_prob.numel()
    loss, ratio, slope = (torch.empty_like(log_prob) for _ in range(3))
    arguments = (loss, ratio, slope, log_prob, vector(old_log_prob), vector(advantage), n, low, high)
    launch(clipped_policy_loss_kernel, (cdiv(n, FINISH_ROWS),), *arguments, IS_PPO=is_ppo, ROWS=FINISH_ROWS)
    return loss, ratio, slope


clipped_op = register(
    "clipped_policy_loss(Tensor log_prob, Tensor old_log_prob, Tensor advantage, float low, float high, bool is_ppo) "
    "-> (Tensor, Tensor, Tensor)",
    _clipped,
    lambda log_prob, *_: tuple(log_prob.new_empty(log_prob.shape, dtype=torch.float32) for _ in range(3)),
)


class _Clipped(Function):
    @staticmethod
    def forward(log_prob, old_log_prob, advantage, low, high, is_ppo):  # pyright: ignore
        return clipped_op(log_prob, old_log_prob, advantage, low, high, is_ppo)

    @staticmethod
    def setup_context(ctx, inputs, output):  # pyright: ignore
        _, ratio, slope = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(ratio, slope)
        ctx.save_for_backward(slope)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):  # pyright: ignore
        (slope,) = ctx.saved_tensors
        return grad * slope, *(None,) * 5


def clipped_policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.clipped_policy_loss`."""
    bounds = clip_bounds(clip_range, clip_range_high)
    loss, ratio, _ = _Clipped.apply(log_prob, old_log_prob, advantage, *bounds, True)  # pyright: ignore
    return loss, ratio


def dpok_policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.dpok_policy_loss`."""
    bounds = clip_bounds(clip_range, clip_range_high)
    loss, ratio, _ = _Clipped.apply(log_prob, old_log_prob, advantage, *bounds, False)  # pyright: ignore
    return loss, ratio
