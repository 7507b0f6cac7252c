# ruff: noqa: N803 -- compile-time constants are upper case, as Triton writes them
# pyright: reportGeneralTypeIssues=false
"""Log-probability of a Gaussian step x_next ~ N(a * sample + b * output, std^2 I), and the step itself.

Bytes moved a row of d elements, e bytes an element: the log-probability reads 3 d e (4 d e with guidance), its gradient
reads the same and writes d e (2 d e); a step reads 3 d e (4 d e), writes d e, and then pays for one log-probability.
No mean, residual or guided output is written to memory. Launches: 2 forward, 1 backward, 3 for a step.

A step does not accumulate the log-probability while it writes: it runs the log-probability kernel on what it stored.
So the rollout's number and the update's come from one compiled kernel, and their ratio is 1 exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .library import launch, register
from .rows import BLOCK, NUM_STAGES, aligned, cdiv, check, load, load_output, load_sum, split, vector

HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)
FINISH_ROWS = 128


@triton.jit
def residual_of(prev_row_ptr, sample_row_ptr, coef_row_ptr, output, index, mask):
    """prev_sample - mean; 0 beyond the end of the row."""
    residual = load(prev_row_ptr, index, mask)
    residual -= tl.load(coef_row_ptr) * load(sample_row_ptr, index, mask)
    return residual - tl.load(coef_row_ptr + 1) * output


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
    partial_ptr, sample_ptr, output_ptr, uncond_ptr, prev_ptr, coef_ptr, d, chunk,
    sample_stride, output_stride, uncond_stride, prev_stride, guidance_scale,
    IS_GUIDED: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of (prev_sample - mean)^2 over each chunk of each row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, chunk, BLOCK, num_stages=NUM_STAGES):
        index = part * chunk + start + tl.arange(0, BLOCK)
        mask = index < d
        output = load_output(
            output_ptr + row * output_stride, uncond_ptr + row * uncond_stride, guidance_scale, index, mask, IS_GUIDED
        )
        residual = residual_of(
            prev_ptr + row * prev_stride, sample_ptr + row * sample_stride, coef_ptr + row * 3, output, index, mask
        )
        total += residual * residual
    tl.store(partial_ptr + row * NUM_SPLITS + part, tl.sum(total))


@triton.jit
def log_prob_of(partial_ptr, coef_ptr, row, mask, d, NUM_SPLITS: tl.constexpr):
    """Log-probability of each row from its partial sums of squares; NaN unless std > 0."""
    mean_square = load_sum(partial_ptr, row, mask, NUM_SPLITS) / d
    std = tl.load(coef_ptr + row * 3 + 2, mask=mask, other=1.0)
    is_random = std > 0
    std = tl.where(is_random, std, 1.0)
    log_prob = -0.5 * mean_square / (std * std) - tl.log(std) - HALF_LOG_TWO_PI
    return tl.where(is_random, log_prob, float("nan"))


@triton.jit
def log_prob_kernel(log_prob_ptr, partial_ptr, coef_ptr, n, d, NUM_SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Finish: one number a row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < n
    tl.store(log_prob_ptr + row, log_prob_of(partial_ptr, coef_ptr, row, mask, d, NUM_SPLITS), mask=mask)


@triton.jit
def log_prob_grad_kernel(
    grad_output_ptr, grad_uncond_ptr, grad_ptr, sample_ptr, output_ptr, uncond_ptr, prev_ptr, coef_ptr, d,
    sample_stride, output_stride, uncond_stride, prev_stride, guidance_scale,
    IS_GUIDED: tl.constexpr, NEEDS_UNCOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad * b * (prev_sample - mean) / (d * std^2)."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < d
    output = load_output(
        output_ptr + row * output_stride, uncond_ptr + row * uncond_stride, guidance_scale, index, mask, IS_GUIDED
    )
    residual = residual_of(
        prev_ptr + row * prev_stride, sample_ptr + row * sample_stride, coef_ptr + row * 3, output, index, mask
    )
    std = tl.load(coef_ptr + row * 3 + 2)
    grad = tl.load(grad_ptr + row) * tl.load(coef_ptr + row * 3 + 1) / (std * std) / d * residual
    store_gradients(
        grad_output_ptr, grad_uncond_ptr, row * d + index, grad, guidance_scale, mask, IS_GUIDED, NEEDS_UNCOND
    )


@triton.jit
def step_kernel(
    prev_ptr, sample_ptr, output_ptr, uncond_ptr, noise_ptr, coef_ptr, d,
    sample_stride, output_stride, uncond_stride, noise_stride, guidance_scale,
    IS_GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """a * sample + b * output + std * noise, rounded to the dtype of prev_sample."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < d
    output = load_output(
        output_ptr + row * output_stride, uncond_ptr + row * uncond_stride, guidance_scale, index, mask, IS_GUIDED
    )
    prev = tl.load(coef_ptr + row * 3) * load(sample_ptr + row * sample_stride, index, mask)
    prev += tl.load(coef_ptr + row * 3 + 1) * output
    prev += tl.load(coef_ptr + row * 3 + 2) * load(noise_ptr + row * noise_stride, index, mask)
    tl.store(prev_ptr + row * d + index, prev.to(prev_ptr.dtype.element_ty), mask=mask)


def residual_square(
    sample: Tensor,
    output: Tensor,
    output_uncond: Tensor | None,
    guidance_scale: float,
    prev_sample: Tensor,
    coef: Tensor,
) -> Tensor:
    """Partial sums of the squared residual [n, splits], the one kernel behind every log-probability."""
    is_guided = output_uncond is not None
    uncond = output if output_uncond is None else output_uncond
    n, d = check(coef, sample=sample, output=output, output_uncond=uncond, prev_sample=prev_sample)
    num_splits, chunk = split(d)
    partial = torch.empty(n, num_splits, device=sample.device, dtype=torch.float32)
    latents, strides = zip(*(aligned(x) for x in (sample, output, uncond, prev_sample)), strict=True)
    launch(
        residual_square_kernel, (n, num_splits), partial, *latents, coef, d, chunk, *strides, guidance_scale,
        IS_GUIDED=is_guided, NUM_SPLITS=num_splits, BLOCK=BLOCK,
    )  # fmt: skip
    return partial


def _log_prob(
    sample: Tensor,
    output: Tensor,
    output_uncond: Tensor | None,
    guidance_scale: float,
    prev_sample: Tensor,
    coef: Tensor,
) -> Tensor:
    coef = vector(coef)
    partial = residual_square(sample, output, output_uncond, guidance_scale, prev_sample, coef)
    (n, num_splits), d = partial.shape, sample.shape[1:].numel()
    log_prob = torch.empty(n, device=sample.device, dtype=torch.float32)
    grid = (cdiv(n, FINISH_ROWS),)
    launch(log_prob_kernel, grid, log_prob, partial, coef, n, d, NUM_SPLITS=num_splits, ROWS=FINISH_ROWS)
    return log_prob


def _log_prob_backward(
    grad: Tensor, sample: Tensor, output: Tensor, output_uncond: Tensor | None, guidance_scale: float,
    prev_sample: Tensor, coef: Tensor, needs_uncond: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    is_guided = output_uncond is not None
    uncond = output if output_uncond is None else output_uncond
    n, d = check(coef, sample=sample, output=output, output_uncond=uncond, prev_sample=prev_sample)
    grad_output, grad_uncond = gradients(output, output_uncond, needs_uncond)
    latents, strides = zip(*(aligned(x) for x in (sample, output, uncond, prev_sample)), strict=True)
    launch(
        log_prob_grad_kernel, (n, cdiv(d, BLOCK)), grad_output, grad_uncond, vector(grad), *latents,
        vector(coef), d, *strides, guidance_scale, IS_GUIDED=is_guided, NEEDS_UNCOND=needs_uncond, BLOCK=BLOCK,
    )  # fmt: skip
    return grad_output, grad_uncond


def gradients(output: Tensor, output_uncond: Tensor | None, needs_uncond: bool) -> tuple[Tensor, Tensor]:
    """Memory for the gradients of the two outputs; the second is empty unless it is needed."""
    like = output_uncond if output_uncond is not None and needs_uncond else output.new_empty(0)
    contiguous = torch.contiguous_format
    return torch.empty_like(output, memory_format=contiguous), torch.empty_like(like, memory_format=contiguous)


def _step(
    sample: Tensor, output: Tensor, output_uncond: Tensor | None, guidance_scale: float, noise: Tensor, coef: Tensor
) -> tuple[Tensor, Tensor]:
    coef = vector(coef)
    uncond = output if output_uncond is None else output_uncond
    n, d = check(coef, sample=sample, output=output, output_uncond=uncond, noise=noise)
    prev_sample = torch.empty_like(sample, memory_format=torch.contiguous_format)
    latents, strides = zip(*(aligned(x) for x in (sample, output, uncond, noise)), strict=True)
    launch(
        step_kernel, (n, cdiv(d, BLOCK)), prev_sample, *latents, coef, d, *strides, guidance_scale,
        IS_GUIDED=output_uncond is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return prev_sample, _log_prob(sample, output, output_uncond, guidance_scale, prev_sample, coef)


log_prob_op = register(
    "transition_log_prob(Tensor sample, Tensor output, Tensor? output_uncond, float guidance_scale, "
    "Tensor prev_sample, Tensor coef) -> Tensor",
    _log_prob,
    lambda sample, *_: sample.new_empty(sample.shape[0], dtype=torch.float32),
)
log_prob_backward_op = register(
    "transition_log_prob_backward(Tensor grad, Tensor sample, Tensor output, Tensor? output_uncond, "
    "float guidance_scale, Tensor prev_sample, Tensor coef, bool needs_uncond) -> (Tensor, Tensor)",
    _log_prob_backward,
    lambda grad, sample, output, output_uncond, guidance_scale, prev_sample, coef, needs_uncond: gradients(
        output, output_uncond, needs_uncond
    ),
)
step_op = register(
    "transition_step(Tensor sample, Tensor output, Tensor? output_uncond, float guidance_scale, Tensor noise, "
    "Tensor coef) -> (Tensor, Tensor)",
    _step,
    lambda sample, *_: (
        torch.empty_like(sample, memory_format=torch.contiguous_format),
        sample.new_empty(sample.shape[0], dtype=torch.float32),
    ),
)


class _LogProb(Function):
    @staticmethod
    def forward(sample, output, output_uncond, guidance_scale, prev_sample, coef):  # pyright: ignore
        return log_prob_op(sample, output, output_uncond, guidance_scale, prev_sample, coef)

    @staticmethod
    def setup_context(ctx, inputs, output):  # pyright: ignore
        sample, model_output, output_uncond, ctx.guidance_scale, prev_sample, coef = inputs
        ctx.save_for_backward(sample, model_output, output_uncond, prev_sample, coef)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore
        sample, output, output_uncond, prev_sample, coef = ctx.saved_tensors
        needs_uncond = output_uncond is not None and ctx.needs_input_grad[2]
        grad_output, grad_uncond = log_prob_backward_op(
            grad, sample, output, output_uncond, ctx.guidance_scale, prev_sample, coef, needs_uncond
        )
        return None, grad_output, grad_uncond if needs_uncond else None, None, None, None


def transition_log_prob(sample: Tensor, output: Tensor, prev_sample: Tensor, coef: Tensor) -> Tensor:
    """`reference.transition_log_prob`."""
    return _LogProb.apply(sample, output, None, 1.0, prev_sample, coef)  # pyright: ignore


def guided_transition_log_prob(
    sample: Tensor,
    output_cond: Tensor,
    output_uncond: Tensor | None,
    guidance_scale: float,
    prev_sample: Tensor,
    coef: Tensor,
) -> Tensor:
    """`reference.guided_transition_log_prob`."""
    return _LogProb.apply(sample, output_cond, output_uncond, guidance_scale, prev_sample, coef)  # pyright: ignore


def transition_step(
    sample: Tensor,
    output: Tensor,
    noise: Tensor,
    coef: Tensor,
    *,
    output_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`reference.transition_step`."""
    with torch.no_grad():
        return step_op(sample, output, output_uncond, guidance_scale, noise, coef)
