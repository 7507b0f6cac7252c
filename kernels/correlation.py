# ruff: noqa: N803 -- compile-time constants are upper case, as Triton writes them
# pyright: reportGeneralTypeIssues=false
"""Pearson correlation of each row of x with the same row of y, at once or streamed over many calls.

Bytes moved a row of d elements, e bytes an element: 2 d e read, once. Launches: 2. No gradient.

Each block of a row is centred on its own mean while it is in registers, then merged (Chan et al.): no second pass over
memory, and no E[xy] - E[x] E[y], which loses everything to an offset. All merges run in index order. Means are kept
relative to the row's first element, the pilot: beside an offset of 1e4 spreads, a float32 mean has lost four digits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .library import launch, register
from .rows import BLOCK, NUM_STAGES, aligned, cdiv, check, load, split

DEGENERATE = tl.constexpr(1e-12)
FINISH_ROWS = 64


@triton.jit
def merge(
    count_a, mean_x_a, mean_y_a, sxx_a, syy_a, sxy_a, count_b, mean_x_b, mean_y_b, sxx_b, syy_b, sxy_b
):  # fmt: skip
    """Moments of two sets together; either may be empty."""
    count = count_a + count_b
    share = count_b / tl.where(count > 0, count, 1.0)
    dx, dy = mean_x_b - mean_x_a, mean_y_b - mean_y_a
    weight = count_a * share
    sxx = sxx_a + sxx_b + dx * dx * weight
    syy = syy_a + syy_b + dy * dy * weight
    sxy = sxy_a + sxy_b + dx * dy * weight
    return count, mean_x_a + dx * share, mean_y_a + dy * share, sxx, syy, sxy


@triton.jit
def load_moments(moments_ptr, mask):
    """(count, mean_x, mean_y, sxx, syy, sxy) stored side by side."""
    count = tl.load(moments_ptr, mask=mask, other=0.0)
    mean_x = tl.load(moments_ptr + 1, mask=mask, other=0.0)
    mean_y = tl.load(moments_ptr + 2, mask=mask, other=0.0)
    sxx = tl.load(moments_ptr + 3, mask=mask, other=0.0)
    syy = tl.load(moments_ptr + 4, mask=mask, other=0.0)
    sxy = tl.load(moments_ptr + 5, mask=mask, other=0.0)
    return count, mean_x, mean_y, sxx, syy, sxy


@triton.jit
def store_moments(moments_ptr, count, mean_x, mean_y, sxx, syy, sxy, mask):
    """What `load_moments` reads."""
    tl.store(moments_ptr, count, mask=mask)
    tl.store(moments_ptr + 1, mean_x, mask=mask)
    tl.store(moments_ptr + 2, mean_y, mask=mask)
    tl.store(moments_ptr + 3, sxx, mask=mask)
    tl.store(moments_ptr + 4, syy, mask=mask)
    tl.store(moments_ptr + 5, sxy, mask=mask)


@triton.jit
def merge_block(count, mean_x, mean_y, sxx, syy, sxy, x, y, block_count, mask):
    """The moments with a block's merged in; centred on the block's own means first."""
    divisor = tl.where(block_count > 0, block_count, 1.0)
    x, y = tl.where(mask, x, 0.0), tl.where(mask, y, 0.0)
    block_mean_x, block_mean_y = tl.sum(x) / divisor, tl.sum(y) / divisor
    x, y = tl.where(mask, x - block_mean_x, 0.0), tl.where(mask, y - block_mean_y, 0.0)
    return merge(
        count, mean_x, mean_y, sxx, syy, sxy,
        block_count, block_mean_x, block_mean_y, tl.sum(x * x), tl.sum(y * y), tl.sum(x * y),
    )  # fmt: skip


@triton.jit
def moments_kernel(
    partial_ptr, x_ptr, y_ptr, d, chunk, x_stride, y_stride, groups, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Moments of each chunk of each group of a row, relative to the group's first elements; then those two."""
    sample = tl.program_id(0).to(tl.int64) // groups
    group = tl.program_id(0).to(tl.int64) % groups
    part = tl.program_id(1)
    x_row_ptr = x_ptr + sample * x_stride + group * d
    y_row_ptr = y_ptr + sample * y_stride + group * d
    pilot_x, pilot_y = tl.load(x_row_ptr).to(tl.float32), tl.load(y_row_ptr).to(tl.float32)
    count = tl.zeros((), tl.float32)
    mean_x, mean_y, sxx, syy, sxy = count, count, count, count, count
    for start in tl.range(0, chunk, BLOCK, num_stages=NUM_STAGES):
        first = part * chunk + start
        index = first + tl.arange(0, BLOCK)
        mask = index < d
        x, y = load(x_row_ptr, index, mask) - pilot_x, load(y_row_ptr, index, mask) - pilot_y
        block_count = tl.minimum(tl.maximum(d - first, 0), BLOCK).to(tl.float32)
        count, mean_x, mean_y, sxx, syy, sxy = merge_block(
            count, mean_x, mean_y, sxx, syy, sxy, x, y, block_count, mask
        )
    chunk_ptr = partial_ptr + ((sample * groups + group) * NUM_SPLITS + part) * 8
    store_moments(chunk_ptr, count, mean_x, mean_y, sxx, syy, sxy, None)
    tl.store(chunk_ptr + 6, pilot_x)
    tl.store(chunk_ptr + 7, pilot_y)


@triton.jit
def load_row(row_ptr, mask, NUM_SPLITS: tl.constexpr):
    """Moments of whole rows: their chunks merged in index order, the pilot added to the means."""
    count, mean_x, mean_y, sxx, syy, sxy = load_moments(row_ptr, mask)
    for part in tl.range(1, NUM_SPLITS):
        count_b, mean_x_b, mean_y_b, sxx_b, syy_b, sxy_b = load_moments(row_ptr + part * 8, mask)
        count, mean_x, mean_y, sxx, syy, sxy = merge(
            count, mean_x, mean_y, sxx, syy, sxy, count_b, mean_x_b, mean_y_b, sxx_b, syy_b, sxy_b
        )
    mean_x += tl.load(row_ptr + 6, mask=mask, other=0.0)
    mean_y += tl.load(row_ptr + 7, mask=mask, other=0.0)
    return count, mean_x, mean_y, sxx, syy, sxy


@triton.jit
def state_kernel(new_state_ptr, state_ptr, partial_ptr, n, NUM_SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Finish of the streaming update: each row's moments merged into its state."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < n
    count, mean_x, mean_y, sxx, syy, sxy = load_moments(state_ptr + row * 6, mask)
    count_b, mean_x_b, mean_y_b, sxx_b, syy_b, sxy_b = load_row(partial_ptr + row * NUM_SPLITS * 8, mask, NUM_SPLITS)
    count, mean_x, mean_y, sxx, syy, sxy = merge(
        count, mean_x, mean_y, sxx, syy, sxy, count_b, mean_x_b, mean_y_b, sxx_b, syy_b, sxy_b
    )
    store_moments(new_state_ptr + row * 6, count, mean_x, mean_y, sxx, syy, sxy, mask)


@triton.jit
def correlation_kernel(correlation_ptr, partial_ptr, n, groups, NUM_SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Finish: add the co-moments of each row's groups, and divide."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < n
    total_xx = tl.zeros([ROWS], tl.float32)
    total_yy, total_xy, level_x, level_y = total_xx, total_xx, total_xx, total_xx
    for group in range(0, groups):
        group_ptr = partial_ptr + (row * groups + group) * NUM_SPLITS * 8
        count, mean_x, mean_y, sxx, syy, sxy = load_row(group_ptr, mask, NUM_SPLITS)
        total_xx += sxx
        total_yy += syy
        total_xy += sxy
        level_x += count * mean_x * mean_x
        level_y += count * mean_y * mean_y
    is_degenerate = (total_xx <= (total_xx + level_x) * DEGENERATE) | (total_yy <= (total_yy + level_y) * DEGENERATE)
    norm = tl.sqrt(tl.where(is_degenerate, 1.0, total_xx)) * tl.sqrt(tl.where(is_degenerate, 1.0, total_yy))
    value = total_xy / norm
    value = tl.where(value > 1, 1.0, tl.where(value < -1, -1.0, value))
    tl.store(correlation_ptr + row, tl.where(is_degenerate, float("nan"), value), mask=mask)


def _moments(x: Tensor, y: Tensor, groups: int) -> Tensor:
    """Moments of each chunk of each group of a row, then the pilots, [n, groups, splits, 8]."""
    n, d = check(None, x=x, y=y)
    (x, x_stride), (y, y_stride) = aligned(x), aligned(y)
    num_splits, chunk = split(d // groups)
    partial = torch.empty(n, groups, num_splits, 8, device=x.device, dtype=torch.float32)
    launch(
        moments_kernel, (n * groups, num_splits), partial, x, y, d // groups, chunk, x_stride, y_stride, groups,
        NUM_SPLITS=num_splits, BLOCK=BLOCK,
    )  # fmt: skip
    return partial


def _correlation(x: Tensor, y: Tensor, groups: int) -> Tensor:
    partial = _moments(x, y, groups)
    n = len(x)
    value = torch.empty(n, device=x.device, dtype=torch.float32)
    arguments = (value, partial, n, groups)
    launch(correlation_kernel, (cdiv(n, FINISH_ROWS),), *arguments, NUM_SPLITS=partial.shape[2], ROWS=FINISH_ROWS)
    return value


def _update(state: Tensor, x: Tensor, y: Tensor) -> Tensor:
    partial = _moments(x, y, 1)
    n = len(x)
    state = state.to(torch.float32).contiguous()
    new_state = torch.empty_like(state)
    arguments = (new_state, state, partial, n)
    launch(state_kernel, (cdiv(n, FINISH_ROWS),), *arguments, NUM_SPLITS=partial.shape[2], ROWS=FINISH_ROWS)
    return new_state


correlation_op = register(
    "correlation(Tensor x, Tensor y, int groups) -> Tensor",
    _correlation,
    lambda x, *_: x.new_empty(x.shape[0], dtype=torch.float32),
)
update_op = register(
    "correlation_update(Tensor state, Tensor x, Tensor y) -> Tensor",
    _update,
    lambda state, *_: state.new_empty(state.shape, dtype=torch.float32),
)


def correlation(x: Tensor, y: Tensor, *, center: str = "sample", num_channels: int | None = None) -> Tensor:
    """`reference.correlation`."""
    check(None, x=x, y=y)
    with torch.no_grad():
        return correlation_op(x, y, _num_groups(x, center, num_channels))


def correlation_update(state: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`reference.correlation_update`."""
    n, _ = check(None, x=x, y=y)
    if state.shape != (n, 6):
        raise ValueError(f"state must be [{n}, 6], one row for each row of x, not {list(state.shape)}")
    with torch.no_grad():
        return update_op(state, x, y)


def _num_groups(x: Tensor, center: str, num_channels: int | None) -> int:
    d = x.shape[1:].numel()
    if center == "sample":
        return 1
    if center != "channel":
        raise ValueError(f'center must be "sample" or "channel", not {center!r}')
    if num_channels is None or num_channels < 1 or d % num_channels:
        raise ValueError(f"center='channel' needs num_channels that divides {d} elements a row, not {num_channels}")
    return num_channels
