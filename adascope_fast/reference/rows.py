"""Latents in one layout and in the dtype of computation, and sums of a row whose order depends on its length alone."""

import torch
from torch import Tensor

ROW_CHUNK = 4096


def compute_dtype(*latents: Tensor) -> torch.dtype:
    """float32, or float64 if one of the latents is float64."""
    return torch.float64 if any(x.dtype == torch.float64 for x in latents) else torch.float32


def arranged(coef: Tensor | None, **latents: Tensor) -> list[Tensor]:
    """The latents [n, *latent] in the dtype of computation, laid out as the first; then `coef` in it too, if given.

    Raises:
        ValueError: shapes or devices differ, rows are empty, or coef is not [n, 3].
    """
    first, *others = latents.values()
    if first.dim() < 2 or any(x.shape != first.shape for x in others):
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in latents.items())
        raise ValueError(f"latents must share one shape [n, ...], not {shapes}")
    if any(x.device != first.device for x in others):
        devices = ", ".join(f"{name} on {x.device}" for name, x in latents.items())
        raise ValueError(f"latents must be on one device, not {devices}; move them")
    if first.shape[1:].numel() == 0:
        raise ValueError(f"latents must have elements, got rows of shape {list(first.shape[1:])}")
    dtype, order = compute_dtype(*latents.values()), storage_order(first)
    found = [_laid_out(x.to(dtype), order) for x in latents.values()]
    if coef is not None:
        if coef.shape != (len(first), 3):
            raise ValueError(f"coef must be [{len(first)}, 3], one (a, b, std) for each row, not {list(coef.shape)}")
        found.append(coef.detach().to(dtype))
    return found


def storage_order(x: Tensor) -> list[int]:
    """The axes of a row from the slowest in memory to the fastest, where they fill it; else as they come."""
    axes = sorted(range(1, x.dim()), key=lambda axis: (-x.stride(axis), axis))
    expected = 1
    for axis in reversed(axes):
        if x.shape[axis] != 1:
            if x.stride(axis) != expected:
                return list(range(1, x.dim()))
            expected *= x.shape[axis]
    return axes


def _laid_out(x: Tensor, order: list[int]) -> Tensor:
    """`x`, copied if its rows are not dense in that order of axes."""
    rows = x.permute(0, *order)
    expected = 1
    for size, stride in zip(reversed(rows.shape[1:]), reversed(rows.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return rows.contiguous().permute(0, *(1 + order.index(axis) for axis in range(1, x.dim())))
        expected *= size
    return x


def picked(x: Tensor, rows: Tensor | None) -> Tensor:
    """The rows of `x` with these numbers, in its layout; all if None. A ValueError where there is no such row."""
    if rows is None:
        return x
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise ValueError(f"rows must be int64 and [n], got {rows.dtype} and {list(rows.shape)}")
    order = storage_order(x)
    back = [0, *(1 + order.index(axis) for axis in range(1, x.dim()))]
    try:
        return x.permute(0, *order).index_select(0, rows).permute(back)
    except IndexError:
        found = f"{rows.min().item()} to {rows.max().item()}"
        raise ValueError(f"rows must be numbers from 0 to {len(x) - 1} of a table's rows, got {found}") from None


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """One number a row, [n], shaped to multiply latents."""
    return values.view(-1, *[1] * (like.dim() - 1))


def row_sum(values: Tensor) -> Tensor:
    """Sum of each row of [n, *latent], in an order that depends on its layout and length alone.

    `values.sum(1)` does not have that: torch splits a single long row over its threads, but not two.
    """
    values = values.permute(0, *storage_order(values)).flatten(1)
    whole = values.shape[1] // ROW_CHUNK * ROW_CHUNK
    if whole == 0:
        return values.sum(1)
    total = values[:, :whole].unflatten(1, (-1, ROW_CHUNK)).sum(2).sum(1)
    return total if whole == values.shape[1] else total + values[:, whole:].sum(1)


def row_mean(values: Tensor) -> Tensor:
    """Mean of each row of [n, *latent], as `row_sum`."""
    return row_sum(values) / values.shape[1:].numel()
