# ruff: noqa: N803 -- compile-time constants are upper case, as Triton writes them
# pyright: reportGeneralTypeIssues=false
"""Log-probability of a Gaussian step x_next ~ N(a * sample + b * output, std^2 I), with or without guidance.

Bytes moved a row of d elements, e bytes an element: the log-probability reads 3 d e (4 d e with guidance), its gradient
reads the same and writes d e (2 d e). No mean, residual or guided output is written to memory.
Launches: 2 forward, 1 backward.

The rollout (`step.py`) and the update (`training_step.py`) take the same sum of the same expression in the same order,
so their log-probabilities are the same bits and their ratio is 1 exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .library import launch, register
from .rows import (
    BLOCK,
    NUM_STAGES,
    aligned,
    cdiv,
    check,
    is_first,
    load,
    load_output,
    load_sum,
    ordered_sum,
    split,
    vector,
)

HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)
FINISH_ROWS = 128


@triton.jit
def residual_of(prev, sample, output, weight_sample, weight_output):
    """prev_sample - mean; 0 beyond the end of the row."""
    return prev - weight_sample * sample - weight_output * output


@triton.jit
def residual_weight(coef_row_ptr, d, IS_GAUSSIAN: tl.constexpr):
    """dlog_prob / doutput over the residual."""
    weight_output = tl.load(coef_row_ptr + 1)
    std = tl.load(coef_row_ptr + 2)
    return weight_output / (std * std) / d if IS_GAUSSIAN else 2 * weight_output / d


@triton.jit
def store_gradients(
    grad_output_ptr, grad_uncond_ptr, at, grad, guidance_scale, mask,
    IS_GUIDED: tl.constexpr, NEEDS_UNCOND: tl.constexpr,
):  # fmt: skip
    """The gradient of the guided output, shared between the two outputs it was made of."""
    if IS_GUIDED:
        tl.store(grad_output_ptr + at, (guidance_scale * grad).to(grad_output_ptr.dtype.element_ty), mask=mask)
        if NEEDS_UNCOND:
            rest = (1 - guidance_scale) * grad
            tl.store(grad_uncond_ptr + at, rest.to(grad_uncond_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(grad_output_ptr + at, grad.to(grad_output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def residual_square_kernel(
    partial_ptr, kl_partial_ptr, sample_ptr, output_ptr, uncond_ptr, prev_ptr, ref_ptr, coef_ptr, d, chunk,
    sample_stride, output_stride, uncond_stride, prev_stride, ref_stride, guidance_scale,
    IS_GUIDED: tl.constexpr, HAS_REF: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of (prev_sample - mean)^2 over each chunk of each row; with a reference, of (output - ref_output)^2 too."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    weight_sample, weight_output = tl.load(coef_ptr + row * 3), tl.load(coef_ptr + row * 3 + 1)
    total = tl.zeros([BLOCK], tl.float32)
    kl_total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, chunk, BLOCK, num_stages=NUM_STAGES):
        index = part * chunk + start + tl.arange(0, BLOCK)
        mask = index < d
        output = load_output(
            output_ptr + row * output_stride, uncond_ptr + row * uncond_stride, guidance_scale, index, mask, IS_GUIDED
        )
        sample = load(sample_ptr + row * sample_stride, index, mask)
        prev = load(prev_ptr + row * prev_stride, index, mask)
        residual = residual_of(prev, sample, output, weight_sample, weight_output)
        total += residual * residual
        if HAS_REF:
            shift = output - load(ref_ptr + row * ref_stride, index, mask)
            kl_total += shift * shift
    tl.store(partial_ptr + row * NUM_SPLITS + part, ordered_sum(total))
    if HAS_REF:
        tl.store(kl_partial_ptr + row * NUM_SPLITS + part, ordered_sum(kl_total))


@triton.jit
def log_prob_of(partial_ptr, coef_ptr, row, mask, d, IS_GAUSSIAN: tl.constexpr, NUM_SPLITS: tl.constexpr):
    """Log-probability of each row from its partial sums of squares; if Gaussian, NaN unless std > 0."""
    mean_square = load_sum(partial_ptr, row, mask, NUM_SPLITS) / d
    if IS_GAUSSIAN:
        std = tl.load(coef_ptr + row * 3 + 2, mask=mask, other=1.0)
        is_random = std > 0
        std = tl.where(is_random, std, 1.0)
        log_prob = -0.5 * mean_square / (std * std) - tl.log(std) - HALF_LOG_TWO_PI
        log_prob = tl.where(is_random, log_prob, float("nan"))
    else:
        log_prob = -mean_square
    return log_prob


@triton.jit
def log_prob_kernel(
    log_prob_ptr, partial_ptr, coef_ptr, n, d,
    IS_GAUSSIAN: tl.constexpr, NUM_SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Finish: one number a row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < n
    log_prob = log_prob_of(partial_ptr, coef_ptr, row, mask, d, IS_GAUSSIAN, NUM_SPLITS)
    tl.store(log_prob_ptr + row, log_prob, mask=mask)


@triton.jit
def log_prob_grad_kernel(
    grad_output_ptr, grad_uncond_ptr, grad_ptr, sample_ptr, output_ptr, uncond_ptr, prev_ptr, coef_ptr, d,
    sample_stride, output_stride, uncond_stride, prev_stride, guidance_scale,
    IS_GUIDED: tl.constexpr, NEEDS_UNCOND: tl.constexpr, IS_GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad * residual_weight * (prev_sample - mean)."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < d
    output = load_output(
        output_ptr + row * output_stride, uncond_ptr + row * uncond_stride, guidance_scale, index, mask, IS_GUIDED
    )
    sample = load(sample_ptr + row * sample_stride, index, mask)
    prev = load(prev_ptr + row * prev_stride, index, mask)
    residual = residual_of(prev, sample, output, tl.load(coef_ptr + row * 3), tl.load(coef_ptr + row * 3 + 1))
    grad = tl.load(grad_ptr + row) * residual_weight(coef_ptr + row * 3, d, IS_GAUSSIAN) * residual
    store_gradients(
        grad_output_ptr, grad_uncond_ptr, row * d + index, grad, guidance_scale, mask, IS_GUIDED, NEEDS_UNCOND
    )


def residual_square(
    sample: Tensor,
    output: Tensor,
    output_uncond: Tensor | None,
    guidance_scale: float,
    prev_sample: Tensor,
    ref_output: Tensor | None,
    coef: Tensor,
) -> tuple[Tensor, Tensor]:
    """Partial sums [n, splits] of the squared residual, and of (output - ref_output)^2 if there is a ref_output."""
    uncond = output if output_uncond is None else output_uncond
    ref = output if ref_output is None else ref_output
    n, d = check(coef, sample=sample, output=output, output_uncond=uncond, prev_sample=prev_sample, ref_output=ref)
    num_splits, chunk = split(d)
    partial = torch.empty(n, num_splits, device=sample.device, dtype=torch.float32)
    kl_partial = partial if ref_output is None else torch.empty_like(partial)
    latents, strides = zip(*(aligned(x) for x in (sample, output, uncond, prev_sample, ref)), strict=True)
    launch(
        residual_square_kernel, (n, num_splits), partial, kl_partial, *latents, coef, d, chunk, *strides,
        guidance_scale, IS_GUIDED=output_uncond is not None, HAS_REF=ref_output is not None, NUM_SPLITS=num_splits,
        BLOCK=BLOCK,
    )  # fmt: skip
    return partial, kl_partial


def _log_prob(
    sample: Tensor,
    output: Tensor,
    output_uncond: Tensor | None,
    guidance_scale: float,
    prev_sample: Tensor,
    coef: Tensor,
    is_gaussian: bool,
) -> Tensor:
    coef = vector(coef)
    partial, _ = residual_square(sample, output, output_uncond, guidance_scale, prev_sample, None, coef)
    (n, num_splits), d = partial.shape, sample.shape[1:].numel()
    log_prob = torch.empty(n, device=sample.device, dtype=torch.float32)
    launch(
        log_prob_kernel, (cdiv(n, FINISH_ROWS),), log_prob, partial, coef, n, d,
        IS_GAUSSIAN=is_gaussian, NUM_SPLITS=num_splits, ROWS=FINISH_ROWS,
    )  # fmt: skip
    return log_prob


def _log_prob_backward(
    grad: Tensor, sample: Tensor, output: Tensor, output_uncond: Tensor | None, guidance_scale: float,
    prev_sample: Tensor, coef: Tensor, is_gaussian: bool, needs_uncond: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    uncond = output if output_uncond is None else output_uncond
    n, d = check(coef, sample=sample, output=output, output_uncond=uncond, prev_sample=prev_sample)
    grad_output, grad_uncond = gradients(output, output_uncond, needs_uncond)
    latents, strides = zip(*(aligned(x) for x in (sample, output, uncond, prev_sample)), strict=True)
    launch(
        log_prob_grad_kernel, (n, cdiv(d, BLOCK)), grad_output, grad_uncond, vector(grad), *latents,
        vector(coef), d, *strides, guidance_scale, IS_GUIDED=output_uncond is not None, NEEDS_UNCOND=needs_uncond,
        IS_GAUSSIAN=is_gaussian, BLOCK=BLOCK,
    )  # fmt: skip
    return grad_output, grad_uncond


def gradients(output: Tensor, output_uncond: Tensor | None, needs_uncond: bool) -> tuple[Tensor, Tensor]:
    """Memory for the gradients of the two outputs; the second is empty unless it is needed."""
    like = output_uncond if output_uncond is not None and needs_uncond else output.new_empty(0)
    contiguous = torch.contiguous_format
    return torch.empty_like(output, memory_format=contiguous), torch.empty_like(like, memory_format=contiguous)


log_prob_op = register(
    "transition_log_prob(Tensor sample, Tensor output, Tensor? output_uncond, float guidance_scale, "
    "Tensor prev_sample, Tensor coef, bool is_gaussian) -> Tensor",
    _log_prob,
    lambda sample, *_: sample.new_empty(sample.shape[0], dtype=torch.float32),
)
log_prob_backward_op = register(
    "transition_log_prob_backward(Tensor grad, Tensor sample, Tensor output, Tensor? output_uncond, "
    "float guidance_scale, Tensor prev_sample, Tensor coef, bool is_gaussian, bool needs_uncond) -> (Tensor, Tensor)",
    _log_prob_backward,
    lambda grad, sample, output, output_uncond, *rest: gradients(output, output_uncond, needs_uncond=rest[-1]),
)


class _LogProb(Function):
    @staticmethod
    def forward(sample, output, output_uncond, guidance_scale, prev_sample, coef, is_gaussian):  # pyright: ignore
        return log_prob_op(sample, output, output_uncond, guidance_scale, prev_sample, coef, is_gaussian)

    @staticmethod
    def setup_context(ctx, inputs, output):  # pyright: ignore
        sample, model_output, output_uncond, ctx.guidance_scale, prev_sample, coef, ctx.is_gaussian = inputs
        ctx.save_for_backward(sample, model_output, output_uncond, prev_sample, coef)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore
        sample, output, output_uncond, prev_sample, coef = ctx.saved_tensors
        needs_uncond = output_uncond is not None and ctx.needs_input_grad[2]
        grad_output, grad_uncond = log_prob_backward_op(
            grad, sample, output, output_uncond, ctx.guidance_scale, prev_sample, coef, ctx.is_gaussian, needs_uncond
        )
        return None, grad_output, grad_uncond if needs_uncond else None, *(None,) * 4


def transition_log_prob(
    sample: Tensor, output: Tensor, prev_sample: Tensor, coef: Tensor, *, kind: str = "gaussian"
) -> Tensor:
    """`reference.transition_log_prob`."""
    return guided_transition_log_prob(sample, output, None, 1.0, prev_sample, coef, kind=kind)


def guided_transition_log_prob(
    sample: Tensor,
    output_cond: Tensor,
    output_uncond: Tensor | None,
    guidance_scale: float,
    prev_sample: Tensor,
    coef: Tensor,
    *,
    kind: str = "gaussian",
) -> Tensor:
    """`reference.guided_transition_log_prob`."""
    return _LogProb.apply(  # pyright: ignore
        sample, output_cond, output_uncond, guidance_scale, prev_sample, coef, is_gaussian(kind)
    )


def is_gaussian(kind: str) -> bool:
    """Whether the log-probability is the density; a ValueError if it is neither that nor the squared error."""
    return is_first("kind", kind, ("gaussian", "squared_error"))
