# ruff: noqa: N803 -- compile-time constants are upper case, as Triton writes them
# pyright: reportGeneralTypeIssues=false
"""The loss of a whole training step of a row: guidance, log-probability, ratio, clip and KL; differentiable.

Bytes moved a row of d elements, e bytes an element: the loss reads 3 d e (4 d e with guidance), and d e more if a
reference output is given; the gradient reads the same and writes d e (2 d e with guidance). Nothing of size d is kept
between the two: the gradient needs one slope a row, dloss / dlog_prob. Launches: 2 forward, 1 backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .gaussian_kl import kl_of
from .library import launch, register
from .policy_loss import check_vectors, clip_bounds, clipped_loss_of, is_ppo
from .rows import BLOCK, aligned, cdiv, check, load, load_output, vector
from .transition import (
    FINISH_ROWS,
    gradients,
    is_gaussian,
    log_prob_of,
    residual_of,
    residual_square,
    residual_weight,
    store_gradients,
)

STATISTICS: tuple[str, ...] = ("log_prob", "ratio", "approx_kl", "clipfrac", "kl", "nonfinite")


@triton.jit
def weight_of(weight, weights_ptr, row, mask, HAS_WEIGHTS: tl.constexpr):
    """One weight for all rows, times each row's own if there is one."""
    if HAS_WEIGHTS:
        weight *= tl.load(weights_ptr + row, mask=mask, other=0.0)
    return weight


@triton.jit
def slope_of(
    loss_ptr, statistics_ptr, partial_ptr, kl_partial_ptr, coef_ptr, old_log_prob_ptr, advantage_ptr, row, mask,
    is_first, n, d, low, high, kl_weight, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_PENALTY: tl.constexpr,
    IS_PPO: tl.constexpr, IS_GAUSSIAN: tl.constexpr, NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    """dloss / dlog_prob of rows from their partial sums; stores their loss and the rows of STATISTICS, [6, n]."""
    log_prob = log_prob_of(partial_ptr, coef_ptr, row, mask, d, IS_GAUSSIAN, NUM_SPLITS)
    old_log_prob = log_prob
    if HAS_OLD:
        old_log_prob = tl.load(old_log_prob_ptr + row, mask=mask, other=0.0)
    advantage = tl.load(advantage_ptr + row, mask=mask, other=0.0)
    loss, ratio, slope = clipped_loss_of(log_prob, old_log_prob, advantage, low, high, IS_PPO)
    kl = tl.zeros_like(log_prob)
    if HAS_REF:
        kl = kl_of(kl_partial_ptr, coef_ptr, row, mask, d, NUM_SPLITS)
    if HAS_PENALTY:
        loss += kl_weight * kl
    log_ratio = log_prob - old_log_prob
    is_finite = (tl.abs(log_prob) < float("inf")) & (tl.abs(ratio) < float("inf"))
    stride = tl.cast(n, tl.int64)
    mask = mask & is_first
    tl.store(loss_ptr + row, loss, mask=mask)
    tl.store(statistics_ptr + row, log_prob, mask=mask)
    tl.store(statistics_ptr + stride + row, ratio, mask=mask)
    tl.store(statistics_ptr + 2 * stride + row, 0.5 * log_ratio * log_ratio, mask=mask)
    tl.store(statistics_ptr + 3 * stride + row, ((ratio < low) | (ratio > high)).to(tl.float32), mask=mask)
    tl.store(statistics_ptr + 4 * stride + row, kl, mask=mask)
    tl.store(statistics_ptr + 5 * stride + row, 1.0 - is_finite.to(tl.float32), mask=mask)
    return slope


@triton.jit
def policy_loss_kernel(
    loss_ptr, statistics_ptr, slope_ptr, partial_ptr, kl_partial_ptr, coef_ptr, old_log_prob_ptr, advantage_ptr,
    kl_weights_ptr, n, d, low, high, kl_weight, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_PENALTY: tl.constexpr, HAS_KL_WEIGHTS: tl.constexpr, IS_PPO: tl.constexpr, IS_GAUSSIAN: tl.constexpr,
    NUM_SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Finish: loss, statistics and slope of each row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < n
    slope = slope_of(
        loss_ptr, statistics_ptr, partial_ptr, kl_partial_ptr, coef_ptr, old_log_prob_ptr, advantage_ptr, row, mask,
        True, n, d, low, high, weight_of(kl_weight, kl_weights_ptr, row, mask, HAS_KL_WEIGHTS),
        HAS_OLD, HAS_REF, HAS_PENALTY, IS_PPO, IS_GAUSSIAN, NUM_SPLITS,
    )  # fmt: skip
    tl.store(slope_ptr + row, slope, mask=mask)


@triton.jit
def store_policy_gradients(
    grad_output_ptr, grad_uncond_ptr, scale, slope, kl_weight, sample_ptr, output_ptr, uncond_ptr, prev_ptr, ref_ptr,
    coef_ptr, d, sample_stride, output_stride, uncond_stride, prev_stride, ref_stride, guidance_scale,
    IS_GUIDED: tl.constexpr, NEEDS_UNCOND: tl.constexpr, HAS_PENALTY: tl.constexpr, IS_GAUSSIAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """scale * (slope * dlog_prob + kl_weight * dkl), one block of a row."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < d
    output = load_output(
        output_ptr + row * output_stride, uncond_ptr + row * uncond_stride, guidance_scale, index, mask, IS_GUIDED
    )
    sample = load(sample_ptr + row * sample_stride, index, mask)
    prev = load(prev_ptr + row * prev_stride, index, mask)
    residual = residual_of(prev, sample, output, tl.load(coef_ptr + row * 3), tl.load(coef_ptr + row * 3 + 1))
    grad = scale * slope * residual_weight(coef_ptr + row * 3, d, IS_GAUSSIAN) * residual
    if HAS_PENALTY:
        ratio = tl.load(coef_ptr + row * 3 + 1) / tl.load(coef_ptr + row * 3 + 2)
        shift = output - load(ref_ptr + row * ref_stride, index, mask)
        grad += scale * kl_weight * ratio * ratio / d * shift
    store_gradients(
        grad_output_ptr, grad_uncond_ptr, row * d + index, grad, guidance_scale, mask, IS_GUIDED, NEEDS_UNCOND
    )


@triton.jit
def policy_backward_kernel(
    grad_output_ptr, grad_uncond_ptr, grad_ptr, slope_ptr, kl_weights_ptr, sample_ptr, output_ptr, uncond_ptr,
    prev_ptr, ref_ptr, coef_ptr, n, d, sample_stride, output_stride, uncond_stride, prev_stride, ref_stride,
    guidance_scale, kl_weight, IS_GUIDED: tl.constexpr, NEEDS_UNCOND: tl.constexpr, HAS_PENALTY: tl.constexpr,
    HAS_KL_WEIGHTS: tl.constexpr, IS_GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient, given each row's slope and the gradient of its loss."""
    row = tl.program_id(0).to(tl.int64)
    store_policy_gradients(
        grad_output_ptr, grad_uncond_ptr, tl.load(grad_ptr + row), tl.load(slope_ptr + row),
        weight_of(kl_weight, kl_weights_ptr, row, row < n, HAS_KL_WEIGHTS), sample_ptr, output_ptr, uncond_ptr,
        prev_ptr, ref_ptr, coef_ptr, d, sample_stride, output_stride, uncond_stride, prev_stride, ref_stride,
        guidance_scale, IS_GUIDED, NEEDS_UNCOND, HAS_PENALTY, IS_GAUSSIAN, BLOCK,
    )  # fmt: skip


def _policy_loss(
    sample: Tensor, output: Tensor, output_uncond: Tensor | None, guidance_scale: float, prev_sample: Tensor,
    ref_output: Tensor | None, kl_weight: float, kl_weights: Tensor | None, coef: Tensor, old_log_prob: Tensor | None,
    advantage: Tensor, low: float, high: float, is_ppo: bool, is_gaussian: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    coef = vector(coef)
    partials = residual_square(sample, output, output_uncond, guidance_scale, prev_sample, ref_output, coef)
    (n, num_splits), d = partials[0].shape, sample.shape[1:].numel()
    old, advantage = old_vector(coef, old_log_prob, advantage), vector(advantage)
    loss, statistics, slope = coef.new_empty(n), coef.new_empty(len(STATISTICS), n), coef.new_empty(n)
    launch(
        policy_loss_kernel, (cdiv(n, FINISH_ROWS),), loss, statistics, slope, *partials, coef, old, advantage,
        row_weights(kl_weights, coef), n, d, low, high, kl_weight, HAS_OLD=old_log_prob is not None,
        HAS_REF=ref_output is not None, HAS_PENALTY=kl_weight != 0, HAS_KL_WEIGHTS=kl_weights is not None,
        IS_PPO=is_ppo, IS_GAUSSIAN=is_gaussian, NUM_SPLITS=num_splits, ROWS=FINISH_ROWS,
    )  # fmt: skip
    return loss, statistics, slope


def _policy_loss_backward(
    grad: Tensor, slope: Tensor, sample: Tensor, output: Tensor, output_uncond: Tensor | None, guidance_scale: float,
    prev_sample: Tensor, ref_output: Tensor | None, kl_weight: float, kl_weights: Tensor | None, coef: Tensor,
    is_gaussian: bool, needs_uncond: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    uncond = output if output_uncond is None else output_uncond
    ref = output if ref_output is None else ref_output
    n, d = check(coef, sample=sample, output=output, output_uncond=uncond, prev_sample=prev_sample, ref_output=ref)
    coef = vector(coef)
    grad_output, grad_uncond = gradients(output, output_uncond, needs_uncond)
    latents, strides = zip(*(aligned(x) for x in (sample, output, uncond, prev_sample, ref)), strict=True)
    launch(
        policy_backward_kernel, (n, cdiv(d, BLOCK)), grad_output, grad_uncond, vector(grad), vector(slope),
        row_weights(kl_weights, coef), *latents, coef, n, d, *strides, guidance_scale, kl_weight,
        IS_GUIDED=output_uncond is not None, NEEDS_UNCOND=needs_uncond, HAS_PENALTY=kl_weight != 0,
        HAS_KL_WEIGHTS=kl_weights is not None, IS_GAUSSIAN=is_gaussian, BLOCK=BLOCK,
    )  # fmt: skip
    return grad_output, grad_uncond


def old_vector(coef: Tensor, old_log_prob: Tensor | None, advantage: Tensor) -> Tensor:
    """The old log-probabilities; without them, memory that the kernel does not read. Checks shapes."""
    given = {} if old_log_prob is None else {"old_log_prob": old_log_prob}
    check_vectors(log_prob=coef[:, 0], **given, advantage=advantage)
    return row_weights(old_log_prob, coef)


def row_weights(weights: Tensor | None, coef: Tensor) -> Tensor:
    """A weight a row; without one, memory that the kernel does not read."""
    return coef if weights is None else vector(weights)


def split_weight(name: str, weight: float | Tensor, n: int) -> tuple[float, Tensor | None]:
    """The two factors of a weight: one number, and one for each row."""
    if not isinstance(weight, Tensor):
        return weight, None
    if weight.shape != (n,):
        raise ValueError(f"{name} must be a number or [{n}], one for each row, not {list(weight.shape)}")
    return 1.0, weight


def new_losses(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the loss and the statistics."""
    n = len(sample)
    return sample.new_empty(n, dtype=torch.float32), sample.new_empty(len(STATISTICS), n, dtype=torch.float32)


policy_loss_op = register(
    "transition_policy_loss(Tensor sample, Tensor output, Tensor? output_uncond, float guidance_scale, "
    "Tensor prev_sample, Tensor? ref_output, float kl_weight, Tensor? kl_weights, Tensor coef, Tensor? old_log_prob, "
    "Tensor advantage, float low, float high, bool is_ppo, bool is_gaussian) -> (Tensor, Tensor, Tensor)",
    _policy_loss,
    lambda sample, *_: (*new_losses(sample), sample.new_empty(len(sample), dtype=torch.float32)),
)
policy_loss_backward_op = register(
    "transition_policy_loss_backward(Tensor grad, Tensor slope, Tensor sample, Tensor output, Tensor? output_uncond, "
    "float guidance_scale, Tensor prev_sample, Tensor? ref_output, float kl_weight, Tensor? kl_weights, Tensor coef, "
    "bool is_gaussian, bool needs_uncond) -> (Tensor, Tensor)",
    _policy_loss_backward,
    lambda grad, slope, sample, output, output_uncond, *rest: gradients(output, output_uncond, needs_uncond=rest[-1]),
)


class _PolicyLoss(Function):
    @staticmethod
    def forward(*inputs):  # pyright: ignore
        return policy_loss_op(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):  # pyright: ignore
        sample, model_output, output_uncond, ctx.guidance_scale, prev_sample, *rest = inputs
        ref_output, ctx.kl_weight, kl_weights, coef, *_, ctx.is_gaussian = rest
        _, statistics, slope = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics, slope)
        ref_output = ref_output if ctx.kl_weight != 0 else None
        ctx.save_for_backward(slope, sample, model_output, output_uncond, prev_sample, ref_output, kl_weights, coef)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):  # pyright: ignore
        slope, sample, output, output_uncond, prev_sample, ref_output, kl_weights, coef = ctx.saved_tensors
        needs_uncond = output_uncond is not None and ctx.needs_input_grad[2]
        grad_output, grad_uncond = policy_loss_backward_op(
            grad, slope, sample, output, output_uncond, ctx.guidance_scale, prev_sample, ref_output, ctx.kl_weight,
            kl_weights, coef, ctx.is_gaussian, needs_uncond,
        )  # fmt: skip
        return None, grad_output, grad_uncond if needs_uncond else None, *(None,) * 12


def transition_policy_loss(
    sample: Tensor,
    output: Tensor,
    prev_sample: Tensor,
    coef: Tensor,
    old_log_prob: Tensor | None,
    advantage: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    output_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    ref_output: Tensor | None = None,
    kl_weight: float | Tensor = 0.0,
    clip: str = "ppo",
    kind: str = "gaussian",
) -> tuple[Tensor, dict[str, Tensor]]:
    """`reference.transition_policy_loss`."""
    loss, statistics, _ = _PolicyLoss.apply(  # pyright: ignore
        sample, output, output_uncond, guidance_scale, prev_sample, ref_output,
        *penalty(kl_weight, ref_output, len(sample)), coef, old_log_prob, advantage,
        *clip_bounds(clip_range, clip_range_high), is_ppo(clip), is_gaussian(kind),
    )  # fmt: skip
    return loss, dict(zip(STATISTICS, statistics, strict=True))


def penalty(kl_weight: float | Tensor, ref_output: Tensor | None, n: int) -> tuple[float, Tensor | None]:
    """The two factors of the KL's weight; a ValueError if there is a weight and nothing to weigh."""
    if ref_output is None and (isinstance(kl_weight, Tensor) or kl_weight != 0):
        raise ValueError(
            f"kl_weight = {kl_weight} needs ref_output, the reference policy's output; pass it or set kl_weight = 0"
        )
    return split_weight("kl_weight", kl_weight, n)
