# ruff: noqa: N803 -- compile-time constants are upper case, as Triton writes them
# pyright: reportGeneralTypeIssues=false
"""A rollout step, x_next = a * sample + b * output + std * noise rounded to its storage type, and its log-probability.

Bytes moved a row of d elements, e bytes an element: 3 d e read (4 d e with guidance), d e written. On request the same
pass writes the guess of x0 (d e more) and reads that of the step before (d e more), and yields two correlations: of the
guess with the one before, and of sample with x_next. Launches: 2.

The log-probability is of the rounded sample: the residual is taken of what is stored, in registers, by the expression
and in the order of `transition.residual_square_kernel`. So the update that reads it back finds the same bits.
x_next may be written where the noise lies: each element is read before it is written, and the pilots, which are read
while others may write, are none of the noise.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .correlation import NUMBERS, add_pairs, median, moments_of, pearson_of, pilot_of, store_sums, three_of
from .library import WAVE, launch, register
from .rows import (
    BLOCK,
    FOLDED,
    SPREAD,
    alike,
    arranged,
    coefficients,
    fold,
    is_alike,
    load,
    load_output,
    load_spread,
    new_rows,
    ordered_sum,
    row_of,
    split,
    store_spread,
)
from .transition import is_gaussian, log_prob_of, residual_of


class Step(NamedTuple):
    """See `reference.Step`."""

    prev_sample: Tensor
    log_prob: Tensor
    x0: Tensor
    x0_correlation: Tensor | None
    sample_correlation: Tensor


@triton.jit
def guess_at(
    sample_ptr, output_ptr, uncond_ptr, index, x0_sample, x0_output, guidance_scale, TYPE: tl.constexpr,
    IS_GUIDED: tl.constexpr,
):  # fmt: skip
    """(sample, output after guidance, x0 as stored) at one element."""
    output = load_output(output_ptr, uncond_ptr, guidance_scale, index, True, IS_GUIDED)
    sample = load(sample_ptr, index, True)
    return sample, output, (x0_sample * sample + x0_output * output).to(TYPE).to(tl.float32)


@triton.jit
def step_kernel(
    prev_ptr, x0_ptr, partial_ptr, sample_ptr, output_ptr, uncond_ptr, noise_ptr, prev_x0_ptr, rows_ptr, coef_ptr,
    x0_coef_ptr, d, chunk, num_chunks, sample_stride, output_stride, uncond_stride, noise_stride, prev_x0_stride,
    prev_stride, x0_stride, coef_stride, x0_coef_stride, guidance_scale, IS_GUIDED: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_X0: tl.constexpr, HAS_PREV_X0: tl.constexpr, OF_A_CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """prev_sample, x0, and the sums of one chunk of a row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = row_of(rows_ptr, row, HAS_ROWS)
    sample_ptr += at * sample_stride
    noise_ptr += at * noise_stride
    prev_x0_ptr += at * prev_x0_stride
    prev_ptr += at * prev_stride
    x0_ptr += at * x0_stride
    output_ptr += row * output_stride
    uncond_ptr += row * uncond_stride
    coef_ptr += row * coef_stride
    x0_coef_ptr += row * x0_coef_stride
    weight_sample, weight_output, std = tl.load(coef_ptr), tl.load(coef_ptr + 1), tl.load(coef_ptr + 2)
    total = tl.zeros([BLOCK // FOLDED], tl.float32)
    if HAS_X0:
        x0_type: tl.constexpr = x0_ptr.dtype.element_ty
        x0_sample, x0_output = tl.load(x0_coef_ptr), tl.load(x0_coef_ptr + 1)
        first, middle, last = three_of(part, chunk, d)
        sample_a, output_a, x0_a = guess_at(
            sample_ptr, output_ptr, uncond_ptr, first, x0_sample, x0_output, guidance_scale, x0_type, IS_GUIDED
        )
        sample_b, output_b, x0_b = guess_at(
            sample_ptr, output_ptr, uncond_ptr, middle, x0_sample, x0_output, guidance_scale, x0_type, IS_GUIDED
        )
        sample_c, output_c, x0_c = guess_at(
            sample_ptr, output_ptr, uncond_ptr, last, x0_sample, x0_output, guidance_scale, x0_type, IS_GUIDED
        )
        pilot_s, pilot_x = median(sample_a, sample_b, sample_c), median(x0_a, x0_b, x0_c)
        pilot_p = weight_sample * pilot_s + weight_output * median(output_a, output_b, output_c)
        sum_s, sum_p, sum_ss, sum_pp, sum_sp = total, total, total, total, total
        if HAS_PREV_X0:
            pilot_y = pilot_of(prev_x0_ptr, first, middle, last)
            sum_x, sum_y, sum_xx, sum_yy, sum_xy = total, total, total, total, total
    for start in range(0, chunk, BLOCK):
        index = part * chunk + start + tl.arange(0, BLOCK)
        mask = index < d
        noise, sample = load(noise_ptr, index, mask), load(sample_ptr, index, mask)
        output = load_output(output_ptr, uncond_ptr, guidance_scale, index, mask, IS_GUIDED)
        if HAS_PREV_X0:
            prev_x0 = load(prev_x0_ptr, index, mask)
        prev = weight_sample * sample + weight_output * output + std * noise
        prev = prev.to(prev_ptr.dtype.element_ty)
        tl.store(prev_ptr + index, prev, mask=mask)
        prev = prev.to(tl.float32)
        residual = residual_of(prev, sample, output, weight_sample, weight_output)
        total += fold(residual * residual)
        if HAS_X0:
            x0 = (x0_sample * sample + x0_output * output).to(x0_type)
            tl.store(x0_ptr + index, x0, mask=mask)
            sum_s, sum_p, sum_ss, sum_pp, sum_sp = add_pairs(
                sum_s, sum_p, sum_ss, sum_pp, sum_sp, sample - pilot_s, prev - pilot_p, mask
            )
            if HAS_PREV_X0:
                x, y = x0.to(tl.float32) - pilot_x, prev_x0 - pilot_y  # pyright: ignore
                sum_x, sum_y, sum_xx, sum_yy, sum_xy = add_pairs(sum_x, sum_y, sum_xx, sum_yy, sum_xy, x, y, mask)
    partial_ptr += row * OF_A_CHUNK * num_chunks
    store_spread(partial_ptr + part * SPREAD, total)
    if HAS_X0:
        partial_ptr += SPREAD * num_chunks
        store_sums(partial_ptr, part, num_chunks, sum_s, sum_p, sum_ss, sum_pp, sum_sp, pilot_s, pilot_p)
        if HAS_PREV_X0:
            partial_ptr += NUMBERS * num_chunks
            store_sums(partial_ptr, part, num_chunks, sum_x, sum_y, sum_xx, sum_yy, sum_xy, pilot_x, pilot_y)


@triton.jit
def finish_step_kernel(
    log_prob_ptr, sample_correlation_ptr, x0_correlation_ptr, partial_ptr, rows_ptr, coef_ptr, d, chunk, num_chunks,
    log_prob_stride, sample_correlation_stride, x0_correlation_stride, coef_stride, HAS_ROWS: tl.constexpr,
    HAS_X0: tl.constexpr, HAS_PREV_X0: tl.constexpr, IS_GAUSSIAN: tl.constexpr, OF_A_CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Finish: the log-probability and the correlations of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = row_of(rows_ptr, row, HAS_ROWS)
    partial_ptr += row * OF_A_CHUNK * num_chunks
    mean_square = ordered_sum(load_spread(partial_ptr, num_chunks, WIDTH)) / d
    log_prob = log_prob_of(mean_square, coef_ptr + row * coef_stride, IS_GAUSSIAN)
    tl.store(log_prob_ptr + at * log_prob_stride, log_prob)
    if HAS_X0:
        partial_ptr += SPREAD * num_chunks
        value = correlation_of(partial_ptr, d, chunk, num_chunks, WIDTH)
        tl.store(sample_correlation_ptr + at * sample_correlation_stride, value)
        if HAS_PREV_X0:
            value = correlation_of(partial_ptr + NUMBERS * num_chunks, d, chunk, num_chunks, WIDTH)
            tl.store(x0_correlation_ptr + at * x0_correlation_stride, value)


@triton.jit
def correlation_of(row_ptr, d, chunk, num_chunks, WIDTH: tl.constexpr):
    """Correlation of a row from what its chunks left."""
    count, mean_x, mean_y, sxx, syy, sxy = moments_of(row_ptr, d, chunk, num_chunks, WIDTH)
    return pearson_of(sxx, syy, sxy, count * mean_x * mean_x, count * mean_y * mean_y)


def _step(
    prev_sample: Tensor, log_prob: Tensor, x0: Tensor | None, x0_correlation: Tensor | None,
    sample_correlation: Tensor | None, sample: Tensor, output: Tensor, output_uncond: Tensor | None,
    guidance_scale: float, noise: Tensor, coef: Tensor, x0_coef: Tensor | None, prev_x0: Tensor | None,
    rows: Tensor | None, is_gaussian: bool,
) -> None:  # fmt: skip
    uncond = output if output_uncond is None else output_uncond
    last_x0 = sample if prev_x0 is None else prev_x0
    n, d, latents = arranged(
        "sample output output_uncond noise prev_x0", sample, output, uncond, noise, last_x0, rows=rows
    )
    _check_out(sample, {"prev_sample": prev_sample, "x0": x0}, sample.shape)
    numbers = {"log_prob": log_prob, "x0_correlation": x0_correlation, "sample_correlation": sample_correlation}
    _check_out(sample, numbers, sample.shape[:1])
    coef = coefficients("coef", coef, n, 3)
    weights = coef if x0_coef is None else coefficients("x0_coef", x0_coef, n, 2)
    num_chunks, chunk, width = split(d)
    has_x0, has_prev_x0 = x0_coef is not None, prev_x0 is not None
    of_a_chunk = SPREAD.value + NUMBERS.value * (has_x0 + has_prev_x0)
    partial = torch.empty((n, of_a_chunk, num_chunks), device=coef.device, dtype=torch.float32)
    written = [_written(x, latents[0]) for x in ((prev_sample, x0) if x0 is not None else (prev_sample,))]
    of_sample = log_prob if sample_correlation is None else sample_correlation
    of_x0 = log_prob if x0_correlation is None else x0_correlation
    flags = {"HAS_ROWS": rows is not None, "HAS_X0": has_x0, "HAS_PREV_X0": has_prev_x0, "OF_A_CHUNK": of_a_chunk}
    places = coef if rows is None else rows
    launch(
        step_kernel, (n, num_chunks), written[0], written[-1], partial, *latents, places, coef, weights, d, chunk,
        num_chunks, *(x.stride(0) for x in latents), written[0].stride(0), written[-1].stride(0), coef.stride(0),
        weights.stride(0), guidance_scale, IS_GUIDED=output_uncond is not None, BLOCK=BLOCK, **flags,
    )  # fmt: skip
    launch(
        finish_step_kernel, (n,), log_prob, of_sample, of_x0, partial, places, coef, d, chunk, num_chunks,
        log_prob.stride(0), of_sample.stride(0), of_x0.stride(0), coef.stride(0), IS_GAUSSIAN=is_gaussian,
        WIDTH=width, num_threads=WAVE, **flags,
    )  # fmt: skip
    for table, memory in zip((prev_sample, x0), written, strict=False):
        if table is not None and memory is not table:
            table.copy_(memory)


def _check_out(sample: Tensor, tables: dict[str, Tensor | None], shape: tuple[int, ...]) -> None:
    for name, table in tables.items():
        if table is not None and (table.shape != shape or table.device != sample.device):
            raise ValueError(
                f"out's {name} must be {list(shape)} on {sample.device}, a row for each of sample, "
                f"not {list(table.shape)} on {table.device}"
            )


def _written(table: Tensor, like: Tensor) -> Tensor:
    """The table itself, or memory of the call's layout to be copied to it."""
    layout, own = like.stride()[1:], table.stride()[1:]
    return table if own == layout or is_alike(table.shape[1:], own, layout) else alike(table, like)


step_op = register(
    "transition_step(Tensor(a!) prev_sample, Tensor(b!) log_prob, Tensor(c!)? x0, Tensor(d!)? x0_correlation, "
    "Tensor(e!)? sample_correlation, Tensor sample, Tensor output, Tensor? output_uncond, float guidance_scale, "
    "Tensor noise, Tensor coef, Tensor? x0_coef, Tensor? prev_x0, Tensor? rows, bool is_gaussian) -> ()",
    _step,
    lambda *_: None,
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
    prev_sample, log_prob = new_rows(sample), _new_numbers(sample)
    with torch.no_grad():
        step_op(
            prev_sample, log_prob, None, None, None, sample, output, output_uncond, guidance_scale, noise, coef, None,
            None, None, is_gaussian(kind),
        )  # fmt: skip
    return prev_sample, log_prob


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
    rows: Tensor | None = None,
    out: Step | None = None,
) -> Step:
    """`reference.transition_step_with_x0`."""
    if out is None:
        if rows is not None:
            raise ValueError("rows are those of tables to write to, and out is None; pass out, or the rows themselves")
        numbers = _new_numbers(sample), _new_numbers(sample)
        of_x0 = None if prev_x0 is None else _new_numbers(sample)
        out = Step(new_rows(sample), numbers[0], new_rows(sample), of_x0, numbers[1])
    if prev_x0 is not None and out.x0_correlation is None:
        raise ValueError("prev_x0 is given, and out has no x0_correlation to write to; give both or neither")
    with torch.no_grad():
        step_op(
            out.prev_sample, out.log_prob, out.x0, None if prev_x0 is None else out.x0_correlation,
            out.sample_correlation, sample, output, output_uncond, guidance_scale, noise, coef, x0_coef, prev_x0, rows,
            is_gaussian(kind),
        )  # fmt: skip
    return out


def _new_numbers(sample: Tensor) -> Tensor:
    return sample.new_empty(len(sample), dtype=torch.float32)
