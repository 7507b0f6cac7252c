# ruff: noqa: N803 -- compile-time constants are upper case, as Triton writes them
# pyright: reportGeneralTypeIssues=false
"""A rollout step, x_next = a * sample + b * output + std * noise rounded to its storage type, and its log-probability.

Bytes moved a row of d elements, e bytes an element: 3 d e read (4 d e with guidance), d e written. On request the same
pass writes the predicted x0 (d e more) and reads that of the step before (d e more) for their correlation moments.
Launches: 2.

The log-probability is of the rounded sample: the residual is taken of what is stored, in registers, by the expression
and in the order of `transition.residual_square_kernel`. So the update that reads it back finds the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .correlation import load_row, merge_block, store_moments
from .library import launch, register
from .rows import BLOCK, NUM_STAGES, aligned, cdiv, check, load, load_output, ordered_sum, split, vector
from .transition import FINISH_ROWS, is_gaussian, log_prob_of, residual_of


@triton.jit
def x0_of(sample, output, weight_sample, weight_output, TYPE: tl.constexpr):
    """c0 * sample + c1 * output, as stored."""
    return (weight_sample * sample + weight_output * output).to(TYPE)


@triton.jit
def step_kernel(
    prev_ptr, x0_ptr, partial_ptr, moments_partial_ptr, sample_ptr, output_ptr, uncond_ptr, noise_ptr, prev_x0_ptr,
    coef_ptr, x0_coef_ptr, d, chunk, sample_stride, output_stride, uncond_stride, noise_stride, prev_x0_stride,
    guidance_scale, IS_GUIDED: tl.constexpr, HAS_X0: tl.constexpr, HAS_MOMENTS: tl.constexpr,
    NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """prev_sample, x0 and the partial sums of one chunk of a row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    sample_ptr += row * sample_stride
    output_ptr += row * output_stride
    uncond_ptr += row * uncond_stride
    noise_ptr += row * noise_stride
    prev_x0_ptr += row * prev_x0_stride
    coef_ptr += row * 3
    weight_sample, weight_output, std = tl.load(coef_ptr), tl.load(coef_ptr + 1), tl.load(coef_ptr + 2)
    if HAS_X0:
        x0_coef_ptr += row * 2
        x0_sample, x0_output = tl.load(x0_coef_ptr), tl.load(x0_coef_ptr + 1)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros((), tl.float32)
    mean_x, mean_y, sxx, syy, sxy = count, count, count, count, count
    if HAS_MOMENTS:  # relative to the row's first element, as in `correlation.py`
        first_output = load_output(output_ptr, uncond_ptr, guidance_scale, 0, True, IS_GUIDED)
        first_x0 = x0_of(load(sample_ptr, 0, True), first_output, x0_sample, x0_output, x0_ptr.dtype.element_ty)
        pilot_x, pilot_y = first_x0.to(tl.float32), load(prev_x0_ptr, 0, True)
    for start in tl.range(0, chunk, BLOCK, num_stages=NUM_STAGES):
        first = part * chunk + start
        index = first + tl.arange(0, BLOCK)
        mask = index < d
        sample = load(sample_ptr, index, mask)
        output = load_output(output_ptr, uncond_ptr, guidance_scale, index, mask, IS_GUIDED)
        prev = weight_sample * sample + weight_output * output + std * load(noise_ptr, index, mask)
        prev = prev.to(prev_ptr.dtype.element_ty)
        tl.store(prev_ptr + row * d + index, prev, mask=mask)
        residual = residual_of(prev.to(tl.float32), sample, output, weight_sample, weight_output)
        total += residual * residual
        if HAS_X0:
            x0 = x0_of(sample, output, x0_sample, x0_output, x0_ptr.dtype.element_ty)
            tl.store(x0_ptr + row * d + index, x0, mask=mask)
            if HAS_MOMENTS:
                x = x0.to(tl.float32) - pilot_x
                y = load(prev_x0_ptr, index, mask) - pilot_y
                block_count = tl.minimum(tl.maximum(d - first, 0), BLOCK).to(tl.float32)
                count, mean_x, mean_y, sxx, syy, sxy = merge_block(
                    count, mean_x, mean_y, sxx, syy, sxy, x, y, block_count, mask
                )
    tl.store(partial_ptr + row * NUM_SPLITS + part, ordered_sum(total))
    if HAS_MOMENTS:
        chunk_ptr = moments_partial_ptr + (row * NUM_SPLITS + part) * 8
        store_moments(chunk_ptr, count, mean_x, mean_y, sxx, syy, sxy, None)
        tl.store(chunk_ptr + 6, pilot_x)
        tl.store(chunk_ptr + 7, pilot_y)


@triton.jit
def finish_step_kernel(
    log_prob_ptr, moments_ptr, partial_ptr, moments_partial_ptr, coef_ptr, n, d,
    IS_GAUSSIAN: tl.constexpr, HAS_MOMENTS: tl.constexpr, NUM_SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Finish: the log-probability and the moments of each row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < n
    log_prob = log_prob_of(partial_ptr, coef_ptr, row, mask, d, IS_GAUSSIAN, NUM_SPLITS)
    tl.store(log_prob_ptr + row, log_prob, mask=mask)
    if HAS_MOMENTS:
        count, mean_x, mean_y, sxx, syy, sxy = load_row(moments_partial_ptr + row * NUM_SPLITS * 8, mask, NUM_SPLITS)
        store_moments(moments_ptr + row * 6, count, mean_x, mean_y, sxx, syy, sxy, mask)


def _step(
    sample: Tensor, output: Tensor, output_uncond: Tensor | None, guidance_scale: float, noise: Tensor, coef: Tensor,
    x0_coef: Tensor | None, prev_x0: Tensor | None, is_gaussian: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    coef = vector(coef)
    uncond = output if output_uncond is None else output_uncond
    last_x0 = sample if prev_x0 is None else prev_x0
    n, d = check(coef, sample=sample, output=output, output_uncond=uncond, noise=noise, prev_x0=last_x0)
    has_x0, has_moments = x0_coef is not None, prev_x0 is not None
    weights = coef if x0_coef is None else vector(x0_coef)
    if has_x0 and weights.shape != (n, 2):
        raise ValueError(f"x0_coef must be [{n}, 2], one (c0, c1) for each row, not {list(weights.shape)}")
    num_splits, chunk = split(d)
    prev_sample, log_prob, x0, moments = _new_results(sample, has_x0, has_moments)
    partial = coef.new_empty(n, num_splits)
    moments_partial = coef.new_empty(n, num_splits, 8) if has_moments else partial
    latents, strides = zip(*(aligned(x) for x in (sample, output, uncond, noise, last_x0)), strict=True)
    launch(
        step_kernel, (n, num_splits), prev_sample, x0, partial, moments_partial, *latents, coef, weights, d, chunk,
        *strides, guidance_scale, IS_GUIDED=output_uncond is not None, HAS_X0=has_x0, HAS_MOMENTS=has_moments,
        NUM_SPLITS=num_splits, BLOCK=BLOCK,
    )  # fmt: skip
    launch(
        finish_step_kernel, (cdiv(n, FINISH_ROWS),), log_prob, moments, partial, moments_partial, coef, n, d,
        IS_GAUSSIAN=is_gaussian, HAS_MOMENTS=has_moments, NUM_SPLITS=num_splits, ROWS=FINISH_ROWS,
    )  # fmt: skip
    return prev_sample, log_prob, x0, moments


def _new_results(sample: Tensor, has_x0: bool, has_moments: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for prev_sample, log_prob, x0 and moments; the last two are empty unless they are asked for."""
    n, contiguous = len(sample), torch.contiguous_format
    return (
        torch.empty_like(sample, memory_format=contiguous),
        sample.new_empty(n, dtype=torch.float32),
        torch.empty_like(sample, memory_format=contiguous) if has_x0 else sample.new_empty(0),
        sample.new_empty((n, 6) if has_moments else (0, 6), dtype=torch.float32),
    )


step_op = register(
    "transition_step(Tensor sample, Tensor output, Tensor? output_uncond, float guidance_scale, Tensor noise, "
    "Tensor coef, Tensor? x0_coef, Tensor? prev_x0, bool is_gaussian) -> (Tensor, Tensor, Tensor, Tensor)",
    _step,
    lambda sample, *rest: _new_results(sample, rest[5] is not None, rest[6] is not None),
)


def transition_step(
    sample: Tensor,
    output: Tensor,
    noise: Tensor,
    coef: Tensor,
    *,
    output_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    kind: str = "gaussian",
) -> tuple[Tensor, Tensor]:
    """`reference.transition_step`."""
    with torch.no_grad():
        results = step_op(
            sample, output, output_uncond, guidance_scale, noise, coef, None, None, is_gaussian(kind)
        )  # fmt: skip
    return results[0], results[1]


def transition_step_with_x0(
    sample: Tensor,
    output: Tensor,
    noise: Tensor,
    coef: Tensor,
    x0_coef: Tensor,
    *,
    prev_x0: Tensor | None = None,
    output_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    kind: str = "gaussian",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`reference.transition_step_with_x0`."""
    with torch.no_grad():
        prev_sample, log_prob, x0, moments = step_op(
            sample, output, output_uncond, guidance_scale, noise, coef, x0_coef, prev_x0, is_gaussian(kind)
        )
    return prev_sample, log_prob, x0, None if prev_x0 is None else moments
