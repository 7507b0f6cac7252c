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

from .library import WAVE, launch, register
from .rows import (
    BLOCK,
    FOLDED,
    arranged,
    coefficients,
    fills,
    fold,
    is_first,
    load,
    load_output,
    load_sum,
    new_like,
    ordered_sum,
    row_of,
    split,
    vector,
)

HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)


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
def shift_weight(coef_row_ptr, d):
    """dKL / doutput over output - ref_output."""
    scale = tl.load(coef_row_ptr + 1) / tl.load(coef_row_ptr + 2)
    return scale * scale / d


@triton.jit
def weight_of(weight, weights_ptr, row, HAS_WEIGHTS: tl.constexpr):
    """One weight for all rows, times the row's own if there is one."""
    if HAS_WEIGHTS:
        weight *= tl.load(weights_ptr + row)
    return weight


@triton.jit
def store_gradients(
    grad_output_ptr, grad_uncond_ptr, index, grad, guidance_scale, mask,
    IS_GUIDED: tl.constexpr, NEEDS_UNCOND: tl.constexpr,
):  # fmt: skip
    """The gradient of the guided output, shared between the two outputs it was made of."""
    if IS_GUIDED:
        tl.store(grad_output_ptr + index, (guidance_scale * grad).to(grad_output_ptr.dtype.element_ty), mask=mask)
        if NEEDS_UNCOND:
            rest = (1 - guidance_scale) * grad
            tl.store(grad_uncond_ptr + index, rest.to(grad_uncond_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(grad_output_ptr + index, grad.to(grad_output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def residual_square_kernel(
    partial_ptr, grad_output_ptr, grad_uncond_ptr, sample_ptr, output_ptr, uncond_ptr, prev_ptr, ref_ptr, rows_ptr,
    coef_ptr, advantage_ptr, kl_weights_ptr, scales_ptr, d, chunk, num_chunks, sample_stride, output_stride,
    uncond_stride, prev_stride, ref_stride, grad_stride, coef_stride, guidance_scale, kl_weight, scale,
    IS_GUIDED: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_REF: tl.constexpr, HAS_PENALTY: tl.constexpr,
    HAS_KL_WEIGHTS: tl.constexpr, HAS_SCALES: tl.constexpr, IS_ON_POLICY: tl.constexpr, NEEDS_UNCOND: tl.constexpr,
    IS_GAUSSIAN: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of a chunk: residual^2; with a reference, shift^2 of shift = output - ref_output; with its KL in the loss,
    residual * shift. On policy, where dloss / dlog_prob = -advantage is known, the gradient is written as well.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = row_of(rows_ptr, row, HAS_ROWS)
    sample_ptr += at * sample_stride
    prev_ptr += at * prev_stride
    output_ptr += row * output_stride
    uncond_ptr += row * uncond_stride
    ref_ptr += row * ref_stride
    grad_output_ptr += row * grad_stride
    grad_uncond_ptr += row * grad_stride
    coef_ptr += row * coef_stride
    weight_sample, weight_output = tl.load(coef_ptr), tl.load(coef_ptr + 1)
    if IS_ON_POLICY:
        scale = weight_of(scale, scales_ptr, row, HAS_SCALES)
        of_residual = scale * -tl.load(advantage_ptr + row) * residual_weight(coef_ptr, d, IS_GAUSSIAN)
        of_shift = scale
        if HAS_PENALTY:
            of_shift = scale * weight_of(kl_weight, kl_weights_ptr, row, HAS_KL_WEIGHTS) * shift_weight(coef_ptr, d)
    total = tl.zeros([BLOCK // FOLDED], tl.float32)
    shift_total, product_total = total, total
    for start in range(0, chunk, BLOCK):
        index = part * chunk + start + tl.arange(0, BLOCK)
        mask = index < d
        sample, prev = load(sample_ptr, index, mask), load(prev_ptr, index, mask)
        output = load_output(output_ptr, uncond_ptr, guidance_scale, index, mask, IS_GUIDED)
        residual = residual_of(prev, sample, output, weight_sample, weight_output)
        if HAS_REF:
            shift = tl.where(mask, output - load(ref_ptr, index, mask), 0.0)
            shift_total += fold(shift * shift)
            if HAS_PENALTY:
                product_total += fold(residual * shift)
        total += fold(residual * residual)
        if IS_ON_POLICY:
            grad = of_residual * residual
            if HAS_PENALTY:
                grad += of_shift * shift  # pyright: ignore
            store_gradients(
                grad_output_ptr, grad_uncond_ptr, index, grad, guidance_scale, mask, IS_GUIDED, NEEDS_UNCOND
            )
    chunk_ptr = partial_ptr + row * SUMS * num_chunks + part
    tl.store(chunk_ptr, ordered_sum(total))
    if HAS_REF:
        tl.store(chunk_ptr + num_chunks, ordered_sum(shift_total))
        if HAS_PENALTY:
            tl.store(chunk_ptr + 2 * num_chunks, ordered_sum(product_total))


@triton.jit
def log_prob_of(mean_square, coef_row_ptr, IS_GAUSSIAN: tl.constexpr):
    """Log-probability of a row from the mean of its squared residual; if Gaussian, NaN unless std > 0."""
    if IS_GAUSSIAN:
        std = tl.load(coef_row_ptr + 2)
        is_random = std > 0
        std = tl.where(is_random, std, 1.0)
        log_prob = -0.5 * mean_square / (std * std) - tl.log(std) - HALF_LOG_TWO_PI
        log_prob = tl.where(is_random, log_prob, float("nan"))
    else:
        log_prob = -mean_square
    return log_prob


@triton.jit
def log_prob_kernel(
    log_prob_ptr, partial_ptr, coef_ptr, d, num_chunks, coef_stride, IS_GAUSSIAN: tl.constexpr, WIDTH: tl.constexpr
):
    """Finish: one number a row."""
    row = tl.program_id(0).to(tl.int64)
    mean_square = load_sum(partial_ptr + row * num_chunks, num_chunks, WIDTH) / d
    tl.store(log_prob_ptr + row, log_prob_of(mean_square, coef_ptr + row * coef_stride, IS_GAUSSIAN))


@triton.jit
def terms_of(
    output, sample_ptr, prev_ptr, ref_ptr, weight_sample, weight_output, index, mask, HAS_PENALTY: tl.constexpr
):
    """(residual, output - ref_output) of one block of a row; without a penalty, the residual twice."""
    prev, sample = load(prev_ptr, index, mask), load(sample_ptr, index, mask)
    residual = residual_of(prev, sample, output, weight_sample, weight_output)
    shift = residual
    if HAS_PENALTY:
        shift = output - load(ref_ptr, index, mask)
    return residual, shift


@triton.jit
def gradient_of(residual, shift, of_residual, of_shift, HAS_PENALTY: tl.constexpr):
    """of_residual * residual + of_shift * shift."""
    grad = of_residual * residual
    if HAS_PENALTY:
        grad += of_shift * shift
    return grad


@triton.jit
def gradient_kernel(
    grad_output_ptr, grad_uncond_ptr, grad_ptr, slope_ptr, sample_ptr, output_ptr, uncond_ptr, prev_ptr, ref_ptr,
    rows_ptr, coef_ptr, kl_weights_ptr, d, chunk, sample_stride, output_stride, uncond_stride, prev_stride, ref_stride,
    grad_stride, coef_stride, guidance_scale, kl_weight, IS_GUIDED: tl.constexpr, HAS_ROWS: tl.constexpr,
    HAS_SLOPE: tl.constexpr, HAS_PENALTY: tl.constexpr, HAS_KL_WEIGHTS: tl.constexpr, NEEDS_UNCOND: tl.constexpr,
    IS_GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad * (slope * dlog_prob + kl_weight * dKL), a chunk of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = row_of(rows_ptr, row, HAS_ROWS)
    coef_ptr += row * coef_stride
    grad = tl.load(grad_ptr + row)
    of_residual, of_shift = grad * residual_weight(coef_ptr, d, IS_GAUSSIAN), grad
    if HAS_SLOPE:
        of_residual = grad * tl.load(slope_ptr + row) * residual_weight(coef_ptr, d, IS_GAUSSIAN)
    if HAS_PENALTY:
        of_shift = grad * weight_of(kl_weight, kl_weights_ptr, row, HAS_KL_WEIGHTS) * shift_weight(coef_ptr, d)
    sample_ptr += at * sample_stride
    prev_ptr += at * prev_stride
    output_ptr += row * output_stride
    uncond_ptr += row * uncond_stride
    ref_ptr += row * ref_stride
    grad_output_ptr += row * grad_stride
    grad_uncond_ptr += row * grad_stride
    weight_sample, weight_output = tl.load(coef_ptr), tl.load(coef_ptr + 1)
    for start in range(0, chunk, BLOCK):
        index = tl.program_id(1) * chunk + start + tl.arange(0, BLOCK)
        mask = index < d
        output = load_output(output_ptr, uncond_ptr, guidance_scale, index, mask, IS_GUIDED)
        residual, shift = terms_of(
            output, sample_ptr, prev_ptr, ref_ptr, weight_sample, weight_output, index, mask, HAS_PENALTY
        )
        gradient = gradient_of(residual, shift, of_residual, of_shift, HAS_PENALTY)
        store_gradients(
            grad_output_ptr, grad_uncond_ptr, index, gradient, guidance_scale, mask, IS_GUIDED, NEEDS_UNCOND
        )


def new_gradients(
    like: Tensor, output: Tensor, output_uncond: Tensor | None, needs_uncond: bool
) -> tuple[Tensor, Tensor]:
    """Memory for the gradients of the outputs, rows laid out as those of `like`.

    Of two outputs of one type in one piece, as a denoiser's call with and without prompts made them: [2 n, *latent] and
    nothing; else a tensor for each that is needed.
    """
    n, nothing = len(output), output.new_empty(0)
    if not needs_uncond or output_uncond is None:
        return new_like(like, n, output.dtype), nothing
    if output.dtype != output_uncond.dtype:
        return new_like(like, n, output.dtype), new_like(like, n, output_uncond.dtype)
    return new_like(like, 2 * n, output.dtype), nothing


def each_gradient(gradients: tuple[Tensor, Tensor], n: int) -> tuple[Tensor, Tensor]:
    """The gradient of each output, from what `new_gradients` made."""
    first, second = gradients
    if n == 0:
        return first, first
    return (first[:n], first[n:]) if len(first) > n else (first, second)


def _log_prob(
    sample: Tensor,
    output: Tensor,
    output_uncond: Tensor | None,
    guidance_scale: float,
    prev_sample: Tensor,
    coef: Tensor,
    rows: Tensor | None,
    is_gaussian: bool,
) -> Tensor:
    n, d, latents = _arranged(sample, output, output_uncond, prev_sample, rows)
    coef = coefficients("coef", coef, n, 3)
    num_chunks, chunk, width = split(d)
    partial = torch.empty((n, num_chunks), device=sample.device, dtype=torch.float32)
    log_prob = torch.empty(n, device=sample.device, dtype=torch.float32)
    sample, output, uncond, prev_sample = latents
    launch(
        residual_square_kernel, (n, num_chunks), partial, output, output, sample, output, uncond, prev_sample, output,
        coef if rows is None else rows, coef, coef, coef, coef, d, chunk, num_chunks, *(x.stride(0) for x in latents),
        0, 0, coef.stride(0), guidance_scale, 0.0, 1.0, IS_GUIDED=output_uncond is not None, HAS_ROWS=rows is not None,
        HAS_REF=False, HAS_PENALTY=False, HAS_KL_WEIGHTS=False, HAS_SCALES=False, IS_ON_POLICY=False,
        NEEDS_UNCOND=False, IS_GAUSSIAN=is_gaussian, SUMS=1, BLOCK=BLOCK,
    )  # fmt: skip
    launch(
        log_prob_kernel, (n,), log_prob, partial, coef, d, num_chunks, coef.stride(0), IS_GAUSSIAN=is_gaussian,
        WIDTH=width, num_threads=WAVE,
    )  # fmt: skip
    return log_prob


def _arranged(
    sample: Tensor, output: Tensor, output_uncond: Tensor | None, prev_sample: Tensor, rows: Tensor | None
) -> tuple[int, int, list[Tensor]]:
    uncond = output if output_uncond is None else output_uncond
    return arranged("sample output output_uncond prev_sample", sample, output, uncond, prev_sample, rows=rows)


def _log_prob_backward(
    grad: Tensor, sample: Tensor, output: Tensor, output_uncond: Tensor | None, guidance_scale: float,
    prev_sample: Tensor, coef: Tensor, rows: Tensor | None, is_gaussian: bool, needs_uncond: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, d, latents = _arranged(sample, output, output_uncond, prev_sample, rows)
    gradients = new_gradients(latents[0], output, output_uncond, needs_uncond)
    launch_gradient(
        each_gradient(gradients, n), vector(grad), None, d, latents, None, rows, coefficients("coef", coef, n, 3),
        guidance_scale, 0.0,
        None, is_guided=output_uncond is not None, needs_uncond=needs_uncond, is_gaussian=is_gaussian,
    )  # fmt: skip
    return gradients


def launch_gradient(
    gradients: tuple[Tensor, Tensor], grad: Tensor, slope: Tensor | None, d: int, latents: list[Tensor],
    ref: Tensor | None, rows: Tensor | None, coef: Tensor, guidance_scale: float, kl_weight: float,
    kl_weights: Tensor | None, *, is_guided: bool, needs_uncond: bool, is_gaussian: bool,
) -> None:  # fmt: skip
    """Write the gradients of the outputs; `latents` are sample, output, output_uncond and prev_sample, arranged."""
    sample, output, uncond, prev_sample = latents
    num_chunks, chunk, _ = split(d)
    launch(
        gradient_kernel, (len(grad), num_chunks), *gradients, grad, grad if slope is None else slope, sample, output,
        uncond, prev_sample, output if ref is None else ref, coef if rows is None else rows, coef,
        coef if kl_weights is None else kl_weights, d, chunk, *(x.stride(0) for x in latents),
        0 if ref is None else ref.stride(0), d, coef.stride(0), guidance_scale, kl_weight, IS_GUIDED=is_guided,
        HAS_ROWS=rows is not None, HAS_SLOPE=slope is not None, HAS_PENALTY=ref is not None,
        HAS_KL_WEIGHTS=kl_weights is not None, NEEDS_UNCOND=needs_uncond, IS_GAUSSIAN=is_gaussian, BLOCK=BLOCK,
    )  # fmt: skip


def fake_gradients(
    sample: Tensor, output: Tensor, output_uncond: Tensor | None, needs_uncond: bool
) -> tuple[Tensor, Tensor]:
    """Shapes and layouts of the gradients, without values."""
    like = sample if fills(sample.shape[1:], sample.stride()[1:]) else sample.contiguous()
    return new_gradients(like, output, output_uncond, needs_uncond)


log_prob_op = register(
    "transition_log_prob(Tensor sample, Tensor output, Tensor? output_uncond, float guidance_scale, "
    "Tensor prev_sample, Tensor coef, Tensor? rows, bool is_gaussian) -> Tensor",
    _log_prob,
    lambda sample, output, *_: output.new_empty(output.shape[0], dtype=torch.float32),
)
log_prob_backward_op = register(
    "transition_log_prob_backward(Tensor grad, Tensor sample, Tensor output, Tensor? output_uncond, "
    "float guidance_scale, Tensor prev_sample, Tensor coef, Tensor? rows, bool is_gaussian, bool needs_uncond) "
    "-> (Tensor, Tensor)",
    _log_prob_backward,
    lambda grad, sample, output, output_uncond, *rest: fake_gradients(sample, output, output_uncond, rest[-1]),
)


class _LogProb(Function):
    @staticmethod
    def forward(sample, output, output_uncond, guidance_scale, prev_sample, coef, rows, is_gaussian):  # pyright: ignore
        return log_prob_op(sample, output, output_uncond, guidance_scale, prev_sample, coef, rows, is_gaussian)

    @staticmethod
    def setup_context(ctx, inputs, output):  # pyright: ignore
        sample, model_output, output_uncond, ctx.guidance_scale, prev_sample, coef, rows, ctx.is_gaussian = inputs
        ctx.save_for_backward(sample, model_output, output_uncond, prev_sample, coef, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore
        sample, output, output_uncond, prev_sample, coef, rows = ctx.saved_tensors
        needs_uncond = output_uncond is not None and ctx.needs_input_grad[2]
        where = sample, output, output_uncond, ctx.guidance_scale, prev_sample, coef, rows
        gradients = log_prob_backward_op(grad, *where, ctx.is_gaussian, needs_uncond)
        grad_output, grad_uncond = each_gradient(gradients, len(output))
        return None, grad_output, grad_uncond if needs_uncond else None, *(None,) * 5


def transition_log_prob(
    sample: Tensor,
    output: Tensor,
    prev_sample: Tensor,
    coef: Tensor,
    *,
    kind: str = "gaussian",
    rows: Tensor | None = None,
) -> Tensor:
    """`reference.transition_log_prob`."""
    return guided_transition_log_prob(sample, output, None, 1.0, prev_sample, coef, kind=kind, rows=rows)


def guided_transition_log_prob(
    sample: Tensor,
    output_cond: Tensor,
    output_uncond: Tensor | None,
    guidance_scale: float,
    prev_sample: Tensor,
    coef: Tensor,
    *,
    kind: str = "gaussian",
    rows: Tensor | None = None,
) -> Tensor:
    """`reference.guided_transition_log_prob`."""
    return _LogProb.apply(  # pyright: ignore
        sample, output_cond, output_uncond, guidance_scale, prev_sample, coef, rows, is_gaussian(kind)
    )


def is_gaussian(kind: str) -> bool:
    """Whether the log-probability is the density; a ValueError if it is neither that nor the squared error."""
    return is_first("kind", kind, ("gaussian", "squared_error"))


def transition_log_prob_grad(
    sample: Tensor,
    output: Tensor,
    prev_sample: Tensor,
    coef: Tensor,
    weight: Tensor,
    *,
    output_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    kind: str = "gaussian",
    rows: Tensor | None = None,
    needs_uncond: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`reference.transition_log_prob_grad`."""
    n, needs_uncond = len(output), needs_uncond and output_uncond is not None
    if weight.shape != (n,) or weight.device != output.device:
        raise ValueError(f"weight must be [{n}] on {output.device}, not {list(weight.shape)} on {weight.device}")
    with torch.no_grad():
        made = log_prob_backward_op(
            weight, sample, output, output_uncond, guidance_scale, prev_sample, coef, rows, is_gaussian(kind),
            needs_uncond,
        )  # fmt: skip
    grad_output, grad_uncond = each_gradient(made, n)
    return grad_output, grad_uncond if needs_uncond else None
