"""Pearson correlation of rows, at once or streamed: the part of `reference` that measures and trains nothing.

Axes: `n` rows of `d` elements. A state is (count, mean_x, mean_y, sxx, syy, sxy) of each row, [n, 6].
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from adascope_fast.reference.rows import arranged, row_mean, row_sum, storage_order

DEGENERATE = 1e-12
"""Variance, relative to the mean square, at or below which a row counts as constant: a spread of 1e-6 of its level."""


@torch.no_grad()
def correlation(
    x: Float[Tensor, "n *latent"],
    y: Float[Tensor, "n *latent"],
    *,
    center: Literal["sample", "channel"] = "sample",
    num_channels: int | None = None,
) -> Float[Tensor, " n"]:
    """Pearson correlation of each row of x with the same row of y, in [-1, 1]; NaN if one is constant or not finite.

    Args:
        x, y: latents at two steps.
        center: "sample" removes one mean a row; "channel" removes one a channel and sums the co-moments over channels.
        num_channels: C of rows laid out [C, H, W]; needed by "channel" alone.
    """
    x, y = arranged(None, x=x, y=y)
    d = x.shape[1:].numel()
    if center == "sample":
        num_channels = 1
    elif center != "channel":
        raise ValueError(f'center must be "sample" or "channel", not {center!r}')
    elif num_channels is None or num_channels < 1 or d % num_channels:
        raise ValueError(f"center='channel' needs num_channels that divides {d} elements a row, not {num_channels}")
    shape = (len(x) * num_channels, d // num_channels)
    if num_channels == 1:
        order = (0, *storage_order(x))
        x, y = x.permute(order), y.permute(order)
    state = _moments(x.reshape(shape), y.reshape(shape))
    return _pearson(state.view(len(x), num_channels, 6))


@torch.no_grad()
def correlations(x: Float[Tensor, "n k *latent"], y: Float[Tensor, "n *latent"]) -> Float[Tensor, "n k"]:
    """`correlation` of each of the k rows of x with the one of y."""
    if x.dim() != y.dim() + 1 or x.shape[2:] != y.shape[1:] or len(x) != len(y) or x.shape[1] == 0:
        shapes = f"x {list(x.shape)}, y {list(y.shape)}"
        raise ValueError(f"x must be [n, k, ...] and y [n, ...] of one latent shape, k at least 1, not {shapes}")
    return torch.stack([correlation(one, y) for one in x.unbind(1)], 1)


@torch.no_grad()
def correlation_update(
    state: Float[Tensor, "n 6"], x: Float[Tensor, "n *latent"], y: Float[Tensor, "n *latent"]
) -> Float[Tensor, "n 6"]:
    """(count, mean_x, mean_y, sxx, syy, sxy) of each row, with all elements of x and y merged in (Chan).

    Start from zeros. The result is float32, or float64 if x or y is.
    """
    x, y = (rows.flatten(1) for rows in arranged(None, x=x, y=y))
    if state.shape != (x.shape[0], 6):
        raise ValueError(f"state must be [{x.shape[0]}, 6], one row for each row of x, not {list(state.shape)}")
    new = _moments(x, y)
    old = state.to(new.dtype)
    count = old[:, :1] + new[:, :1]
    share = new[:, :1] / count.clamp_min(1)
    shift = new[:, 1:3] - old[:, 1:3]  # [n, 2]: of mean_x and mean_y
    products = torch.cat([shift.square(), shift.prod(1, keepdim=True)], dim=1)
    comoments = old[:, 3:] + new[:, 3:] + products * (old[:, :1] * share)
    return torch.cat([count, old[:, 1:3] + shift * share, comoments], dim=1)


@torch.no_grad()
def correlation_from_state(state: Float[Tensor, "n 6"]) -> Float[Tensor, " n"]:
    """Pearson correlation of each row of a streaming state, in [-1, 1]; NaN where degenerate."""
    return _pearson(state.unsqueeze(1))


def _moments(x: Tensor, y: Tensor) -> Tensor:
    """(count, mean_x, mean_y, sxx, syy, sxy) of each row, [n, 6]; shifted, in two passes: an offset does no harm."""
    pilot_x, pilot_y = x[:, :1], y[:, :1]
    x, y = x - pilot_x, y - pilot_y
    mean_x, mean_y = row_mean(x).unsqueeze(1), row_mean(y).unsqueeze(1)
    x, y = x.sub_(mean_x), y.sub_(mean_y)
    comoments = torch.stack([row_sum(x * x), row_sum(y * y), row_sum(x * y)], dim=1)
    count = torch.full_like(mean_x, x.shape[1])
    return torch.cat([count, mean_x + pilot_x, mean_y + pilot_y, comoments], dim=1)


def _pearson(state: Tensor) -> Tensor:
    """Correlation from the moments [n, groups, 6] of each row's groups, co-moments summed over groups."""
    count, mean_x, mean_y, _, _, _ = state.unbind(2)
    sxx, syy, sxy = state[..., 3:].sum(1).unbind(1)
    level_x, level_y = (count * mean_x.square()).sum(1), (count * mean_y.square()).sum(1)
    is_degenerate = (sxx <= DEGENERATE * (sxx + level_x)) | (syy <= DEGENERATE * (syy + level_y))
    value = (sxy / (sxx.sqrt() * syy.sqrt())).clamp(-1, 1)
    return torch.where(is_degenerate, math.nan, value)
