# ruff: noqa: N803 -- compile-time constants are upper case, as Triton writes them
# pyright: reportGeneralTypeIssues=false
"""The clipped policy loss of one row, alone and fused with guidance, log-probability and KL into a whole training step.

Bytes moved a row of d elements, e bytes an element, in the fused step: forward reads 3 d e, or 4 d e with guidance, and
another 2 d e or 3 d e if a reference output is given; the gradient reads each input once and writes d e, or 2 d e with
guidance. Between them nothing of size d is kept: the backward pass needs one slope a row, dloss / dlog_prob.
Launches: 2 forward (3 with a reference), 1 to count the rows that are not finite, 1 backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .gaussian_kl import kl_of, output_square
from .library import launch, register
from .rows import BLOCK, aligned, cdiv, check, load, load_output, vector
from .transition import FINISH_ROWS, gradients, log_prob_of, residual_of, residual_square, store_gradients

STATISTICS = ("log_prob", "ratio", "approx_kl", "clipfrac", "kl", "nonfinite")


@triton.jit
def clipped_loss_of(log_prob, old_log_prob, advantage, low, high):
    """max(-A r, -A clip(r)), r, and the slope dloss / dlog_prob. A NaN passes: tl.maximum would drop it."""
    ratio = tl.exp(log_prob - old_log_prob)
    clipped_ratio = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    plain, clipped = -advantage * ratio, -advantage * clipped_ratio
    is_clipped = clipped > plain
    return tl.where(is_clipped, clipped, plain), ratio, tl.where(is_clipped, 0.0, plain)


@triton.jit
def clipped_policy_loss_kernel(
    loss_ptr, ratio_ptr, slope_ptr, log_prob_ptr, old_log_prob_ptr, advantage_ptr, n, low, high, ROWS: tl.constexpr
):
    """Elementwise in [n]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < n
    log_prob = tl.load(log_prob_ptr + row, mask=mask, other=0.0)
    old_log_prob = tl.load(old_log_prob_ptr + row, mask=mask, other=0.0)
    advantage = tl.load(advantage_ptr + row, mask=mask, other=0.0)
    loss, ratio, slope = clipped_loss_of(log_prob, old_log_prob, advantage, low, high)
    tl.store(loss_ptr + row, loss, mask=mask)
    tl.store(ratio_ptr + row, ratio, mask=mask)
    tl.store(slope_ptr + row, slope, mask=mask)


@triton.jit
def finish_kernel(
    loss_ptr, statistics_ptr, slope_ptr, partial_ptr, kl_partial_ptr, coef_ptr, old_log_prob_ptr, advantage_ptr,
    n, d, low, high, kl_weight, HAS_REF: tl.constexpr, HAS_PENALTY: tl.constexpr, NUM_SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Finish: loss, slope and the rows of STATISTICS, [6, n], from the partial sums."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < n
    log_prob = log_prob_of(partial_ptr, coef_ptr, row, mask, d, NUM_SPLITS)
    old_log_prob = tl.load(old_log_prob_ptr + row, mask=mask, other=0.0)
    advantage = tl.load(advantage_ptr + row, mask=mask, other=0.0)
    loss, ratio, slope = clipped_loss_of(log_prob, old_log_prob, advantage, low, high)
    kl = tl.zeros([ROWS], tl.float32)
    if HAS_REF:
        kl = kl_of(kl_partial_ptr, coef_ptr, row, mask, d, NUM_SPLITS)
    if HAS_PENALTY:
        loss += kl_weight * kl
    log_ratio = log_prob - old_log_prob
    is_finite = (tl.abs(log_prob) < float("inf")) & (tl.abs(ratio) < float("inf"))
    stride = tl.cast(n, tl.int64)
    tl.store(loss_ptr + row, loss, mask=mask)
    tl.store(slope_ptr + row, slope, mask=mask)
    tl.store(statistics_ptr + row, log_prob, mask=mask)
    tl.store(statistics_ptr + stride + row, ratio, mask=mask)
    tl.store(statistics_ptr + 2 * stride + row, 0.5 * log_ratio * log_ratio, mask=mask)
    tl.store(statistics_ptr + 3 * stride + row, ((ratio < low) | (ratio > high)).to(tl.float32), mask=mask)
    tl.store(statistics_ptr + 4 * stride + row, kl, mask=mask)
    tl.store(statistics_ptr + 5 * stride + row, 1.0 - is_finite.to(tl.float32), mask=mask)


@triton.jit
def policy_grad_kernel(
    grad_output_ptr, grad_uncond_ptr, grad_ptr, slope_ptr, sample_ptr, output_ptr, uncond_ptr, prev_ptr, ref_ptr,
    coef_ptr, d, sample_stride, output_stride, uncond_stride, prev_stride, ref_stride, guidance_scale, kl_weight,
    IS_GUIDED: tl.constexpr, NEEDS_UNCOND: tl.constexpr, HAS_PENALTY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad * (slope * dlog_prob + kl_weight * dkl)."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < d
    output = load_output(
        output_ptr + row * output_stride, uncond_ptr + row * uncond_stride, guidance_scale, index, mask, IS_GUIDED
    )
    residual = residual_of(
        prev_ptr + row * prev_stride, sample_ptr + row * sample_stride, coef_ptr + row * 3, output, index, mask
    )
    weight_output = tl.load(coef_ptr + row * 3 + 1)
    std = tl.load(coef_ptr + row * 3 + 2)
    scale = tl.load(grad_ptr + row) * weight_output / (std * std) / d
    grad = scale * tl.load(slope_ptr + row) * residual
    if HAS_PENALTY:
        grad += scale * weight_output * kl_weight * (output - load(ref_ptr + row * ref_stride, index, mask))
    store_gradients(
        grad_output_ptr, grad_uncond_ptr, row * d + index, grad, guidance_scale, mask, IS_GUIDED, NEEDS_UNCOND
    )


def _clipped(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_vectors(log_prob=log_prob, old_log_prob=old_log_prob, advantage=advantage)
    log_prob, n = vector(log_prob), log_prob.numel()
    loss, ratio, slope = (torch.empty_like(log_prob) for _ in range(3))
    arguments = (loss, ratio, slope, log_prob, vector(old_log_prob), vector(advantage), n, low, high)
    launch(clipped_policy_loss_kernel, (cdiv(n, FINISH_ROWS),), *arguments, ROWS=FINISH_ROWS)
    return loss, ratio, slope


def _policy_loss(
    sample: Tensor, output: Tensor, output_uncond: Tensor | None, guidance_scale: float, prev_sample: Tensor,
    ref_output: Tensor | None, kl_weight: float, coef: Tensor, old_log_prob: Tensor, advantage: Tensor,
    low: float, high: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    coef = vector(coef)
    partial = residual_square(sample, output, output_uncond, guidance_scale, prev_sample, coef)
    has_ref = ref_output is not None
    kl_partial = partial if ref_output is None else output_square(output, output_uncond, guidance_scale, ref_output)
    (n, num_splits), d = partial.shape, sample.shape[1:].numel()
    _check_vectors(log_prob=coef[:, 0], old_log_prob=old_log_prob, advantage=advantage)
    loss, slope = coef.new_empty(n), coef.new_empty(n)
    statistics = coef.new_empty(len(STATISTICS), n)
    arguments = (loss, statistics, slope, partial, kl_partial, coef, vector(old_log_prob), vector(advantage))
    launch(
        finish_kernel, (cdiv(n, FINISH_ROWS),), *arguments, n, d, low, high, kl_weight,
        HAS_REF=has_ref, HAS_PENALTY=kl_weight != 0, NUM_SPLITS=num_splits, ROWS=FINISH_ROWS,
    )  # fmt: skip
    return loss, statistics, slope


def _policy_loss_backward(
    grad: Tensor, slope: Tensor, sample: Tensor, output: Tensor, output_uncond: Tensor | None, guidance_scale: float,
    prev_sample: Tensor, ref_output: Tensor | None, kl_weight: float, coef: Tensor, needs_uncond: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    uncond = output if output_uncond is None else output_uncond
    ref = output if ref_output is None else ref_output
    n, d = check(coef, sample=sample, output=output, output_uncond=uncond, prev_sample=prev_sample, ref_output=ref)
    grad_output, grad_uncond = gradients(output, output_uncond, needs_uncond)
    latents, strides = zip(*(aligned(x) for x in (sample, output, uncond, prev_sample, ref)), strict=True)
    launch(
        policy_grad_kernel, (n, cdiv(d, BLOCK)), grad_output, grad_uncond, vector(grad), vector(slope), *latents,
        vector(coef), d, *strides, guidance_scale, kl_weight, IS_GUIDED=output_uncond is not None,
        NEEDS_UNCOND=needs_uncond, HAS_PENALTY=kl_weight != 0, BLOCK=BLOCK,
    )  # fmt: skip
    return grad_output, grad_uncond


def _check_vectors(**vectors: Tensor) -> None:
    if len({x.shape for x in vectors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in vectors.items())
        raise ValueError(f"log_prob, old_log_prob and advantage must have one shape, not {shapes}")


def _clip_bounds(clip_range: float, clip_range_high: float | None) -> tuple[float, float]:
    return 1.0 - clip_range, 1.0 + (clip_range if clip_range_high is None else clip_range_high)


def _new_rows(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


clipped_op = register(
    "clipped_policy_loss(Tensor log_prob, Tensor old_log_prob, Tensor advantage, float low, float high) "
    "-> (Tensor, Tensor, Tensor)",
    _clipped,
    lambda log_prob, *_: tuple(_new_rows(log_prob, *log_prob.shape) for _ in range(3)),
)
policy_loss_op = register(
    "transition_policy_loss(Tensor sample, Tensor output, Tensor? output_uncond, float guidance_scale, "
    "Tensor prev_sample, Tensor? ref_output, float kl_weight, Tensor coef, Tensor old_log_prob, Tensor advantage, "
    "float low, float high) -> (Tensor, Tensor, Tensor)",
    _policy_loss,
    lambda sample, *_: (
        _new_rows(sample, sample.shape[0]),
        _new_rows(sample, len(STATISTICS), sample.shape[0]),
        _new_rows(sample, sample.shape[0]),
    ),
)
policy_loss_backward_op = register(
    "transition_policy_loss_backward(Tensor grad, Tensor slope, Tensor sample, Tensor output, Tensor? output_uncond, "
    "float guidance_scale, Tensor prev_sample, Tensor? ref_output, float kl_weight, Tensor coef, bool needs_uncond) "
    "-> (Tensor, Tensor)",
    _policy_loss_backward,
    lambda grad, slope, sample, output, output_uncond, *rest: gradients(output, output_uncond, needs_uncond=rest[-1]),
)


class _Clipped(Function):
    @staticmethod
    def forward(log_prob, old_log_prob, advantage, low, high):  # pyright: ignore
        return clipped_op(log_prob, old_log_prob, advantage, low, high)

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
        return grad * slope, None, None, None, None


class _PolicyLoss(Function):
    @staticmethod
    def forward(sample, output, output_uncond, guidance_scale, prev_sample, *rest):  # pyright: ignore
        return policy_loss_op(sample, output, output_uncond, guidance_scale, prev_sample, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):  # pyright: ignore
        sample, model_output, output_uncond, ctx.guidance_scale, prev_sample, *rest = inputs
        ref_output, ctx.kl_weight, coef, *_ = rest
        _, statistics, slope = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics, slope)
        ref_output = ref_output if ctx.kl_weight != 0 else None
        ctx.save_for_backward(slope, sample, model_output, output_uncond, prev_sample, ref_output, coef)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):  # pyright: ignore
        slope, sample, output, output_uncond, prev_sample, ref_output, coef = ctx.saved_tensors
        needs_uncond = output_uncond is not None and ctx.needs_input_grad[2]
        grad_output, grad_uncond = policy_loss_backward_op(
            grad, slope, sample, output, output_uncond, ctx.guidance_scale, prev_sample, ref_output, ctx.kl_weight,
            coef, needs_uncond,
        )  # fmt: skip
        return None, grad_output, grad_uncond if needs_uncond else None, *(None,) * 9


def clipped_policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.clipped_policy_loss`."""
    bounds = _clip_bounds(clip_range, clip_range_high)
    loss, ratio, _ = _Clipped.apply(log_prob, old_log_prob, advantage, *bounds)  # pyright: ignore
    return loss, ratio


def transition_policy_loss(
    sample: Tensor,
    output: Tensor,
    prev_sample: Tensor,
    coef: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    output_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    ref_output: Tensor | None = None,
    kl_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`reference.transition_policy_loss`."""
    if ref_output is None and kl_weight != 0:
        raise ValueError(
            f"kl_weight = {kl_weight} needs ref_output, the reference policy's output; pass it or set kl_weight = 0"
        )
    bounds = _clip_bounds(clip_range, clip_range_high)
    loss, statistics, _ = _PolicyLoss.apply(  # pyright: ignore
        sample, output, output_uncond, guidance_scale, prev_sample, ref_output, kl_weight,
        coef, old_log_prob, advantage, *bounds,
    )  # fmt: skip
    stats: dict[str, Tensor] = dict(zip(STATISTICS, statistics, strict=True))
    stats["num_nonfinite"] = stats.pop("nonfinite").sum(dtype=torch.int64)
    return loss, stats
