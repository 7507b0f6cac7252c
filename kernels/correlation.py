# ruff: noqa: N803 -- compile-time constants are upper case, as Triton writes them
# pyright: reportGeneralTypeIssues=false
"""Pearson correlation of each row of x with the same row of y, at once, of many x with one y, or streamed.

Bytes moved a row of d elements, e bytes an element: 2 d e read, once. Launches: 2. No gradient.

A chunk's sums are taken around a pilot, an element of it, and centred when they are complete: around 0 they would lose
everything to an offset. The pilot is the median of three, so that no outlier is one. Chunks are merged around their
means, relative to the first pilot: beside an offset of 1e4 spreads, a float32 mean has lost four digits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .library import WAVE, launch, register
from .rows import (
    BLOCK,
    FOLDED,
    SPREAD,
    arranged,
    fold,
    is_dense,
    load,
    load_parts,
    load_spread,
    ordered_sum,
    split,
    spread,
)

DEGENERATE = tl.constexpr(1e-12)
NUMBERS = tl.constexpr(5 * SPREAD.value + 2)
"""That a chunk leaves: sums of x, y, x^2, y^2 and x y around the pilots, spread, and the two pilots."""


@triton.jit
def median(a, b, c):
    """Of three numbers."""
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def three_of(part, chunk, d):
    """Indices of a chunk's first, middle and last element."""
    first = part * chunk
    last = tl.minimum(first + chunk, d) - 1
    return first, first + (last - first) // 2, last


@triton.jit
def pilot_of(row_ptr, first, middle, last):
    """The median of three elements of a row."""
    a, b, c = tl.load(row_ptr + first), tl.load(row_ptr + middle), tl.load(row_ptr + last)
    return median(a.to(tl.float32), b.to(tl.float32), c.to(tl.float32))


@triton.jit
def add_pairs(sum_x, sum_y, sum_xx, sum_yy, sum_xy, x, y, mask):
    """The sums with a block's added; x and y are relative to the pilots."""
    x, y = tl.where(mask, x, 0.0), tl.where(mask, y, 0.0)
    return sum_x + fold(x), sum_y + fold(y), sum_xx + fold(x * x), sum_yy + fold(y * y), sum_xy + fold(x * y)


@triton.jit
def store_sums(row_ptr, part, num_chunks, sum_x, sum_y, sum_xx, sum_yy, sum_xy, pilot_x, pilot_y):
    """What a chunk leaves; each of the numbers of all chunks of a row lies in one piece.

    One store for the five sums: for each of its own, warps would wait for one another.
    """
    sum_x, sum_y, sum_xx, sum_yy = spread(sum_x), spread(sum_y), spread(sum_xx), spread(sum_yy)
    sum_xy = spread(sum_xy)
    first = tl.join(tl.join(sum_x, sum_y), tl.join(sum_xx, sum_yy))
    second = tl.join(tl.join(sum_xy, sum_xy), tl.join(sum_xy, sum_xy))
    values = tl.reshape(tl.join(first, second), [SPREAD * 8])
    place = tl.arange(0, SPREAD * 8)
    number = place // 4 % 2 + place // 2 % 2 * 2 + place % 2 * 4  # of the sum; the latest join is the last axis
    size = num_chunks * SPREAD
    tl.store(row_ptr + number * size + part * SPREAD + place // 8, values, mask=number < 5)
    tl.store(row_ptr + 5 * size + part, pilot_x)
    tl.store(row_ptr + 5 * size + num_chunks + part, pilot_y)


@triton.jit
def moments_of(row_ptr, d, chunk, num_chunks, WIDTH: tl.constexpr):
    """(count, mean_x, mean_y, sxx, syy, sxy) of a row from what its chunks left."""
    part = tl.arange(0, WIDTH)
    size = num_chunks * SPREAD
    count = tl.minimum(tl.maximum(d - part * chunk, 0), chunk).to(tl.float32)
    is_there = part < num_chunks
    divisor = tl.where(is_there, count, 1.0)
    sum_x, sum_y = load_spread(row_ptr, num_chunks, WIDTH), load_spread(row_ptr + size, num_chunks, WIDTH)
    sum_xx = load_spread(row_ptr + 2 * size, num_chunks, WIDTH)
    sum_yy = load_spread(row_ptr + 3 * size, num_chunks, WIDTH)
    sum_xy = load_spread(row_ptr + 4 * size, num_chunks, WIDTH)
    pilot_x_ptr, pilot_y_ptr = row_ptr + 5 * size, row_ptr + 5 * size + num_chunks
    first_x, first_y = tl.load(pilot_x_ptr), tl.load(pilot_y_ptr)
    mean_x, mean_y = sum_x / divisor, sum_y / divisor
    level_x = tl.where(is_there, load_parts(pilot_x_ptr, part, num_chunks) - first_x + mean_x, 0.0)
    level_y = tl.where(is_there, load_parts(pilot_y_ptr, part, num_chunks) - first_y + mean_y, 0.0)
    whole_x, whole_y = ordered_sum(count * level_x) / d, ordered_sum(count * level_y) / d
    shift_x, shift_y = level_x - whole_x, level_y - whole_y
    sxx = ordered_sum(sum_xx - sum_x * mean_x + count * shift_x * shift_x)
    syy = ordered_sum(sum_yy - sum_y * mean_y + count * shift_y * shift_y)
    sxy = ordered_sum(sum_xy - sum_x * mean_y + count * shift_x * shift_y)
    return tl.cast(d, tl.float32), first_x + whole_x, first_y + whole_y, sxx, syy, sxy


@triton.jit
def pearson_of(sxx, syy, sxy, level_x, level_y):
    """Correlation from co-moments, NaN where a row is constant; `level` is count * mean^2."""
    is_degenerate = (sxx <= (sxx + level_x) * DEGENERATE) | (syy <= (syy + level_y) * DEGENERATE)
    value = sxy / (tl.sqrt(tl.where(is_degenerate, 1.0, sxx)) * tl.sqrt(tl.where(is_degenerate, 1.0, syy)))
    value = tl.where(value > 1, 1.0, tl.where(value < -1, -1.0, value))
    return tl.where(is_degenerate, float("nan"), value)


@triton.jit
def moments_kernel(
    partial_ptr, x_ptr, y_ptr, d, chunk, num_chunks, x_stride, x_step, y_stride, count, groups, BLOCK: tl.constexpr
):
    """What each chunk leaves of each group of each of the `count` x of a row, and of the group of its y."""
    pair = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    group, x_row = pair % groups, pair // groups
    row, place = x_row // count, x_row % count
    x_ptr += row * x_stride + place * x_step + group * d
    y_ptr += row * y_stride + group * d
    first, middle, last = three_of(part, chunk, d)
    pilot_x, pilot_y = pilot_of(x_ptr, first, middle, last), pilot_of(y_ptr, first, middle, last)
    sum_x = tl.zeros([BLOCK // FOLDED], tl.float32)
    sum_y, sum_xx, sum_yy, sum_xy = sum_x, sum_x, sum_x, sum_x
    for start in range(0, chunk, BLOCK):
        index = part * chunk + start + tl.arange(0, BLOCK)
        mask = index < d
        x, y = load(x_ptr, index, mask) - pilot_x, load(y_ptr, index, mask) - pilot_y
        sum_x, sum_y, sum_xx, sum_yy, sum_xy = add_pairs(sum_x, sum_y, sum_xx, sum_yy, sum_xy, x, y, mask)
    partial_ptr += pair * NUMBERS * num_chunks
    store_sums(partial_ptr, part, num_chunks, sum_x, sum_y, sum_xx, sum_yy, sum_xy, pilot_x, pilot_y)


@triton.jit
def state_kernel(new_state_ptr, state_ptr, partial_ptr, d, chunk, num_chunks, WIDTH: tl.constexpr):
    """Finish of the streaming update: a row's moments merged into its state (Chan)."""
    row = tl.program_id(0).to(tl.int64)
    state_ptr += row * 6
    new_state_ptr += row * 6
    count_b, mean_x_b, mean_y_b, sxx_b, syy_b, sxy_b = moments_of(
        partial_ptr + row * NUMBERS * num_chunks, d, chunk, num_chunks, WIDTH
    )
    count_a, mean_x, mean_y = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)
    count = count_a + count_b
    share = count_b / count
    dx, dy = mean_x_b - mean_x, mean_y_b - mean_y
    weight = count_a * share
    tl.store(new_state_ptr, count)
    tl.store(new_state_ptr + 1, mean_x + dx * share)
    tl.store(new_state_ptr + 2, mean_y + dy * share)
    tl.store(new_state_ptr + 3, tl.load(state_ptr + 3) + sxx_b + dx * dx * weight)
    tl.store(new_state_ptr + 4, tl.load(state_ptr + 4) + syy_b + dy * dy * weight)
    tl.store(new_state_ptr + 5, tl.load(state_ptr + 5) + sxy_b + dx * dy * weight)


@triton.jit
def correlation_kernel(correlation_ptr, partial_ptr, d, chunk, num_chunks, groups, WIDTH: tl.constexpr):
    """Finish: add the co-moments of each row's groups, and divide."""
    row = tl.program_id(0).to(tl.int64)
    total_xx = tl.zeros((), tl.float32)
    total_yy, total_xy, level_x, level_y = total_xx, total_xx, total_xx, total_xx
    for group in range(0, groups):
        count, mean_x, mean_y, sxx, syy, sxy = moments_of(
            partial_ptr + (row * groups + group) * NUMBERS * num_chunks, d, chunk, num_chunks, WIDTH
        )
        total_xx += sxx
        total_yy += syy
        total_xy += sxy
        level_x += count * mean_x * mean_x
        level_y += count * mean_y * mean_y
    tl.store(correlation_ptr + row, pearson_of(total_xx, total_yy, total_xy, level_x, level_y))


def _moments(x: Tensor, y: Tensor, groups: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """What the chunks of each group leave, and (d, chunk, chunks, width) of a group. x [n, k, *latent], y [n, *latent].

    An x of [n, *latent] is one of k = 1.
    """
    if x.dim() == y.dim():
        x = x.unsqueeze(1)
    n, count = x.shape[:2]
    if x.shape[2:] != y.shape[1:] or len(y) != n or count == 0:
        shapes = f"x {list(x.shape)}, y {list(y.shape)}"
        raise ValueError(f"x must be [n, k, ...] and y [n, ...] of one latent shape, k at least 1, not {shapes}")
    if groups > 1 or not is_dense(x.shape[2:], x.stride()[2:]):
        x = x.contiguous()  # a group is a channel, in one piece
    _, d, (_, y) = arranged("x y", x[:, 0], y)
    d //= groups
    num_chunks, chunk, width = split(d)
    partial = torch.empty((n * count * groups, NUMBERS.value, num_chunks), device=y.device, dtype=torch.float32)
    launch(
        moments_kernel, (len(partial), num_chunks), partial, x, y, d, chunk, num_chunks, x.stride(0), x.stride(1),
        y.stride(0), count, groups, BLOCK=BLOCK,
    )  # fmt: skip
    return partial, (d, chunk, num_chunks, width)


def _correlation(x: Tensor, y: Tensor, groups: int) -> Tensor:
    partial, (*sizes, width) = _moments(x, y, groups)
    value = torch.empty(len(partial) // groups, device=y.device, dtype=torch.float32)
    launch(
        correlation_kernel, (len(value),), value, partial, *sizes, groups, WIDTH=width, num_threads=WAVE
    )  # fmt: skip
    return value


def _update(state: Tensor, x: Tensor, y: Tensor) -> Tensor:
    partial, (*sizes, width) = _moments(x, y, 1)
    state = state.to(torch.float32).contiguous()
    new_state = torch.empty_like(state)
    launch(state_kernel, (len(state),), new_state, state, partial, *sizes, WIDTH=width, num_threads=WAVE)
    return new_state


correlation_op = register(
    "correlation(Tensor x, Tensor y, int groups) -> Tensor",
    _correlation,
    lambda x, y, groups: x.new_empty(len(x) * (x.shape[1] if x.dim() > y.dim() else 1), dtype=torch.float32),
)
update_op = register(
    "correlation_update(Tensor state, Tensor x, Tensor y) -> Tensor",
    _update,
    lambda state, *_: state.new_empty(state.shape, dtype=torch.float32),
)


def correlation(x: Tensor, y: Tensor, *, center: str = "sample", num_channels: int | None = None) -> Tensor:
    """`reference.correlation`."""
    _check_alike(x, y)
    with torch.no_grad():
        return correlation_op(x, y, _num_groups(x, center, num_channels))


def correlations(x: Tensor, y: Tensor) -> Tensor:
    """`reference.correlations`."""
    if x.dim() != y.dim() + 1:
        raise ValueError(
            f"x must be [n, k, ...] and y [n, ...] of one latent shape, not {list(x.shape)}, {list(y.shape)}"
        )
    with torch.no_grad():
        return correlation_op(x, y, 1).view(x.shape[:2])


def correlation_update(state: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`reference.correlation_update`."""
    _check_alike(x, y)
    if state.shape != (len(x), 6):
        raise ValueError(f"state must be [{len(x)}, 6], one row for each row of x, not {list(state.shape)}")
    with torch.no_grad():
        return update_op(state, x, y)


def _check_alike(x: Tensor, y: Tensor) -> None:
    if x.dim() < 2 or x.shape != y.shape:
        raise ValueError(f"latents must share one shape [n, ...], not x {list(x.shape)}, y {list(y.shape)}")


def _num_groups(x: Tensor, center: str, num_channels: int | None) -> int:
    d = x.shape[1:].numel()
    if center == "sample":
        return 1
    if center != "channel":
        raise ValueError(f'center must be "sample" or "channel", not {center!r}')
    if num_channels is None or num_channels < 1 or d % num_channels:
        raise ValueError(f"center='channel' needs num_channels that divides {d} elements a row, not {num_channels}")
    return num_channels
