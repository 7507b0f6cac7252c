"""Distances of two sets of images by their features: Fréchet distance (FID) and kernel distance (KID).

FID is the name of the Fréchet distance of the 2048 features of one Inception network on 8-bit images at 299 px, and of
nothing else; of other features it is a Fréchet distance with a name of its own, and the values do not compare. It is
biased upward for few images: compare sets of equal size alone.

Unlike torchmetrics, which keeps sums of products and takes 2048 eigenvalues, rows are kept: with X and Y the centred
features over the root of their number less one, tr (S1 S2)^(1/2) is the sum of the singular values of X Y^T, a matrix
of images alone. Both give the same number, and this one in a thousandth of the time for a few hundred images, so there
is an interval. KID here is the unbiased estimate of all images at once, not a mean over random subsets of 1000.

Axes: `n` images, `m` images of the reference set, `k` features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adascope_fast.metrics.metric import Choice, Compared


class Frechet(Compared):
    """norm(mu1 - mu2)^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of features (Heusel et al. 2017), with unbiased covariances.

    Args:
        features: images to features [n, k], with `name` and `facts`.
        name: what tables call it; it is FID for the pool of Inception alone.
    """

    name, title, higher_is_better = "FD", "Fréchet distance", False
    fewest, draws = 50, 50

    def __init__(self, features: Any, name: str = "FD") -> None:
        super().__init__()
        self.features, self.name, self.least = features, name, features.least

    def rows(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.features(images)

    def choice(self, rows: Tensor) -> Choice:
        mean, spread = _moments(self.reference)
        products = rows @ spread.T  # [n, m], once: a draw chooses among its rows
        trace = spread.square().sum()

        def number(index: Tensor, prompts: Sequence[str]) -> float:
            own, count = index.unique(return_counts=True)  # a copy is a weight, so matrices stay small
            weight = count.double() / len(index)
            centre = weight @ rows[own]
            root = (count.double() / (len(index) - 1)).sqrt()[:, None]
            between = root * (products[own] - weight @ products[own])
            variance = (root * (rows[own] - centre)).square().sum()
            return ((centre - mean).square().sum() + variance + trace - 2 * _sum_of_singular_values(between)).item()

        return number

    def facts(self) -> dict[str, Any]:
        return self.features.facts


class KernelDistance(Compared):
    """Unbiased squared maximum mean discrepancy of (x.y / k + 1)^3 (Binkowski et al. 2018); it may be below 0."""

    name, title, higher_is_better = "KID", "kernel distance", False
    fewest = 2

    def __init__(self, features: Any, name: str = "KID") -> None:
        super().__init__()
        self.features, self.name, self.least = features, name, features.least

    def rows(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.features(images)

    def choice(self, rows: Tensor) -> Choice:
        own, across, other = _kernel(rows, rows), _kernel(rows, self.reference), _kernel(self.reference, self.reference)
        num_other = len(other)
        within = (other.sum() - other.trace()) / (num_other * (num_other - 1))
        own = own - own.diag().diag()

        def number(index: Tensor, prompts: Sequence[str]) -> float:
            weight = torch.bincount(index, minlength=len(rows)).double()
            pairs = weight.sum() ** 2 - weight.square().sum()  # of different images: copies are no pair
            return (weight @ own @ weight / pairs + within - 2 * weight @ across.mean(1) / weight.sum()).item()

        return number

    def facts(self) -> dict[str, Any]:
        return self.features.facts


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [k], and a matrix [at most k, k] whose product with itself is the unbiased covariance."""
    mean = rows.mean(0)
    spread = (rows - mean) / (len(rows) - 1) ** 0.5
    return mean, torch.linalg.qr(spread, mode="r").R if len(spread) > spread.shape[1] else spread


def _sum_of_singular_values(matrix: Tensor) -> Tensor:
    if matrix.shape[0] > matrix.shape[1]:
        matrix = torch.linalg.qr(matrix, mode="r").R
    return torch.linalg.svdvals(matrix).sum()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
