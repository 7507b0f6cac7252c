# ruff: noqa: N803 -- compile-time constants are upper case, as Triton writes them
# pyright: reportGeneralTypeIssues=false
"""Pearson correlation of each row of x with the same row of y, or of several earlier latents; at once or streamed.

Bytes moved a row of d elements, e bytes an element: 2 d e read, once; for k lags (k + 1) d e instead of 2 k d e, as a
block of x stays in registers for up to 4 of them. Launches: 2, and one more for every further 4 lags. No gradient.

Each block of a row is centred on its own mean while it is in registers, then merged (Chan et al.): no second pass over
memory, and no E[xy] - E[x] E[y], which loses everything to an offset. All merges run in index order. Means are kept
relative to the row's first element, the pilot: beside an offset of 1e4 spreads, a float32 mean has lost four digits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .library import launch, register
from .rows import BLOCK, NUM_STAGES, aligned, cdiv, check, load, split

DEGENERATE = tl.constexpr(1e-12)
FINISH_ROWS = 64
MAX_LAGS = 4


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
def moments_kernel(
    partial_ptr, x_ptr, history_ptr, d, chunk, x_stride, history_stride, step_stride, groups, num_lags, first_lag,
    STEPS: tl.constexpr, NUM_STEPS: tl.constexpr, LAGS: tl.constexpr, NUM_SPLITS: tl.constexpr, STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Moments of each chunk of each group of a row with every step, relative to the first elements; then those two."""
    sample = tl.program_id(0).to(tl.int64) // groups
    group = tl.program_id(0).to(tl.int64) % groups
    part = tl.program_id(1)
    x_row_ptr = x_ptr + sample * x_stride + group * d
    history_row_ptr = history_ptr + sample * history_stride + group * d
    step_stride = tl.cast(step_stride, tl.int64)
    lag = tl.arange(0, LAGS)
    pilot_x = tl.load(x_row_ptr).to(tl.float32)
    pilot_y = tl.zeros([LAGS], tl.float32)
    for j in tl.static_range(NUM_STEPS):
        pilot_y = tl.where(lag == j, tl.load(history_row_ptr + STEPS[j] * step_stride).to(tl.float32), pilot_y)
    count = tl.zeros((), tl.float32)
    mean_x, sxx = count, count
    mean_y = tl.zeros([LAGS], tl.float32)
    syy, sxy = mean_y, mean_y
    for start in tl.range(0, chunk, BLOCK, num_stages=STAGES):
        first = part * chunk + start
        index = first + tl.arange(0, BLOCK)
        mask = index < d
        block_count = tl.minimum(tl.maximum(d - first, 0), BLOCK).to(tl.float32)
        divisor = tl.where(block_count > 0, block_count, 1.0)
        x = tl.where(mask, load(x_row_ptr, index, mask) - pilot_x, 0.0)
        block_mean_x = tl.sum(x) / divisor
        x = tl.where(mask, x - block_mean_x, 0.0)
        block_mean_y = tl.zeros([LAGS], tl.float32)
        block_syy, block_sxy = block_mean_y, block_mean_y
        for j in tl.static_range(NUM_STEPS):
            y_row_ptr = history_row_ptr + STEPS[j] * step_stride
            y = tl.where(mask, load(y_row_ptr, index, mask) - tl.load(y_row_ptr).to(tl.float32), 0.0)
            mean = tl.sum(y) / divisor
            y = tl.where(mask, y - mean, 0.0)
            block_mean_y = tl.where(lag == j, mean, block_mean_y)
            block_syy = tl.where(lag == j, tl.sum(y * y), block_syy)
            block_sxy = tl.where(lag == j, tl.sum(x * y), block_sxy)
        count, mean_x, mean_y, sxx, syy, sxy = merge(
            count, mean_x, mean_y, sxx, syy, sxy,
            block_count, block_mean_x, block_mean_y, tl.sum(x * x), block_syy, block_sxy,
        )  # fmt: skip
    chunk_ptr = partial_ptr + (((sample * num_lags + first_lag + lag) * groups + group) * NUM_SPLITS + part) * 8
    none = tl.zeros([LAGS], tl.float32)
    mask = lag < NUM_STEPS
    store_moments(chunk_ptr, count + none, mean_x + none, mean_y, sxx + none, syy, sxy, mask)
    tl.store(chunk_ptr + 6, pilot_x + none, mask=mask)
    tl.store(chunk_ptr + 7, pilot_y, mask=mask)


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


def _moments(x: Tensor, history: Tensor, lags: Sequence[int], groups: int) -> Tensor:
    """Moments of each chunk of each group of a row with each lag, then the pilots, [n, k, groups, splits, 8]."""
    n, d = check(None, x=x, history=history[:, 0])
    steps = tuple(history.shape[1] - lag for lag in lags)
    x, x_stride = aligned(x)
    history, steps = aligned_steps(history, steps)
    num_splits, chunk = split(d // groups)
    partial = torch.empty(n, len(steps), groups, num_splits, 8, device=x.device, dtype=torch.float32)
    history_stride = history.shape[1] * d if n == 1 else history.stride(0)
    arguments = (partial, x, history, d // groups, chunk, x_stride, history_stride, history.stride(1), groups)
    for first in range(0, len(steps), MAX_LAGS):
        some = steps[first : first + MAX_LAGS]
        launch(
            moments_kernel, (n * groups, num_splits), *arguments, len(steps), first, STEPS=some, NUM_STEPS=len(some),
            LAGS=triton.next_power_of_2(len(some)), NUM_SPLITS=num_splits, BLOCK=BLOCK,
            STAGES=NUM_STAGES.value if len(some) == 1 else 1,
        )  # fmt: skip
    return partial


def aligned_steps(history: Tensor, steps: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """History [n, t, d] as `aligned` has its rows, and where the steps lie in it; these are copied if it is not so."""
    n, t = history.shape[:2]
    history = history.detach().flatten(2)
    d = history.shape[2]
    row, step, element = history.stride()
    row, step = t * d if n == 1 else row, d if t == 1 else step
    is_even = row % 16 == step % 16 == 0 if d % 16 == 0 else (row, step) == (t * d, d)
    if is_even and history.data_ptr() % 16 == 0 and (d == 1 or element == 1):
        return history.as_strided((n, t, d), (row, step, 1)), steps
    return torch.stack([history[:, step] for step in steps], 1), tuple(range(len(steps)))


def _lags(x: Tensor, history: Tensor, lags: list[int], groups: int) -> Tensor:
    n = x.shape[0]
    partial = _moments(x, history, lags, groups)
    value = torch.empty(n, len(lags), device=x.device, dtype=torch.float32)
    rows = value.numel()
    launch(
        correlation_kernel, (cdiv(rows, FINISH_ROWS),), value, partial, rows, groups,
        NUM_SPLITS=partial.shape[3], ROWS=FINISH_ROWS,
    )  # fmt: skip
    return value


def _lags_update(state: Tensor, x: Tensor, history: Tensor, lags: list[int]) -> Tensor:
    partial = _moments(x, history, lags, 1)
    state = state.to(torch.float32).contiguous()
    new_state = torch.empty_like(state)
    rows = len(x) * len(lags)
    arguments = (new_state, state, partial, rows)
    launch(state_kernel, (cdiv(rows, FINISH_ROWS),), *arguments, NUM_SPLITS=partial.shape[3], ROWS=FINISH_ROWS)
    return new_state


lags_op = register(
    "correlation_lags(Tensor x, Tensor history, int[] lags, int groups) -> Tensor",
    _lags,
    lambda x, history, lags, groups: x.new_empty(x.shape[0], len(lags), dtype=torch.float32),
)
update_op = register(
    "correlation_lags_update(Tensor state, Tensor x, Tensor history, int[] lags) -> Tensor",
    _lags_update,
    lambda state, *_: state.new_empty(state.shape, dtype=torch.float32),
)


def correlation(x: Tensor, y: Tensor, *, center: str = "sample", num_channels: int | None = None) -> Tensor:
    """`reference.correlation`."""
    check(None, x=x, y=y)
    with torch.no_grad():
        return lags_op(x, y.unsqueeze(1), [1], _num_groups(x, center, num_channels)).squeeze(1)


def correlation_lags(
    x: Tensor, history: Tensor, *, lags: Sequence[int], center: str = "sample", num_channels: int | None = None
) -> Tensor:
    """`reference.correlation_lags`."""
    _check_lags(x, history, lags)
    with torch.no_grad():
        return lags_op(x, history, list(lags), _num_groups(x, center, num_channels))


def correlation_update(state: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`reference.correlation_update`."""
    n, _ = check(None, x=x, y=y)
    if state.shape != (n, 6):
        raise ValueError(f"state must be [{n}, 6], one row for each row of x, not {list(state.shape)}")
    with torch.no_grad():
        return update_op(state.unsqueeze(1), x, y.unsqueeze(1), [1]).squeeze(1)


def correlation_lags_update(state: Tensor, x: Tensor, history: Tensor, *, lags: Sequence[int]) -> Tensor:
    """`reference.correlation_lags_update`."""
    _check_lags(x, history, lags)
    if state.shape != (len(x), len(lags), 6):
        raise ValueError(f"state must be [{len(x)}, {len(lags)}, 6], one row and lag each, not {list(state.shape)}")
    with torch.no_grad():
        return update_op(state, x, history, list(lags))


def _check_lags(x: Tensor, history: Tensor, lags: Sequence[int]) -> None:
    if history.dim() != x.dim() + 1 or x.dim() < 2 or (history.shape[0], *history.shape[2:]) != tuple(x.shape):
        raise ValueError(
            f"history must be [n, t, *latent] for x of shape [n, *latent] {list(x.shape)}, not {list(history.shape)}"
        )
    if not lags or min(lags) < 1 or max(lags) > history.shape[1]:
        raise ValueError(f"lags must be of the {history.shape[1]} steps back that history holds, not {list(lags)}")


def _num_groups(x: Tensor, center: str, num_channels: int | None) -> int:
    d = x.shape[1:].numel()
    if center == "sample":
        return 1
    if center != "channel":
        raise ValueError(f'center must be "sample" or "channel", not {center!r}')
    if num_channels is None or num_channels < 1 or d % num_channels:
        raise ValueError(f"center='channel' needs num_channels that divides {d} elements a row, not {num_channels}")
    return num_channels
