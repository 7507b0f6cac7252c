"""Latents as rows in the dtype of computation, and sums of a row whose order depends on its length alone."""

import torch
from torch import Tensor

ROW_CHUNK = 4096


def compute_dtype(*latents: Tensor) -> torch.dtype:
    """float32, or float64 if one of the latents is float64."""
    return torch.float64 if any(x.dtype == torch.float64 for x in latents) else torch.float32


def as_rows(coef: Tensor | None, **latents: Tensor) -> list[Tensor]:
    """The latents as [n, d] in the dtype of computation, in order; then `coef` in it too, if given."""
    first, *others = latents.values()
    if first.dim() < 2 or any(x.shape != first.shape for x in others):
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in latents.items())
        raise ValueError(f"latents must share one shape [n, ...], not {shapes}")
    dtype = compute_dtype(*latents.values())
    rows = [x.to(dtype).flatten(1) for x in latents.values()]
    if coef is not None:
        if coef.shape != (first.shape[0], 3):
            raise ValueError(
                f"coef must be [{first.shape[0]}, 3], one (a, b, std) for each row, not {list(coef.shape)}"
            )
        rows.append(coef.detach().to(dtype))
    return rows


def row_sum(values: Tensor) -> Tensor:
    """Sum of each row of [n, d], in an order that depends on d alone.

    `values.sum(1)` does not have that: torch splits a single long row over its threads, but not two.
    """
    whole = values.shape[1] // ROW_CHUNK * ROW_CHUNK
    if whole == 0:
        return values.sum(1)
    total = values[:, :whole].unflatten(1, (-1, ROW_CHUNK)).sum(2).sum(1)
    return total if whole == values.shape[1] else total + values[:, whole:].sum(1)


def row_mean(values: Tensor) -> Tensor:
    """Mean of each row of [n, d], as `row_sum`."""
    return row_sum(values) / values.shape[1]
