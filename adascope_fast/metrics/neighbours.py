"""Improved precision and recall (Kynkäänniemi et al. 2019): is an image like the reference's, and are they all there?

An image counts as realistic where it lies within the distance from some reference image to that one's k-th neighbour
among the others, with k = 3; recall is the same with the sets exchanged. Bootstrap draws keep each image's radius,
since copies would shrink it.

Axes: `n` images, `m` images of the reference set.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adascope_fast.metrics.metric import Choice, Compared

NEIGHBOURS = 3


class Neighbours(Compared):
    """Precision, recall, or their harmonic mean F1, in [0, 1].

    Args:
        features: images to features, with `name`, `least` and `facts`.
        of: what to make of precision and recall: one of `precision`, `recall`, `f1`.
        neighbours: k.
    """

    name, title, higher_is_better = "iFS", "F1 of improved precision and recall", True

    def __init__(
        self, features: Any, *, name: str = "iFS", of: Callable[[float, float], float], neighbours: int = NEIGHBOURS
    ) -> None:
        super().__init__()
        self.features, self.name, self.least = features, name, features.least
        self.of, self.neighbours, self.fewest = of, neighbours, neighbours + 1

    def rows(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.features(images)

    def choice(self, rows: Tensor) -> Choice:
        distances = torch.cdist(rows, self.reference, compute_mode=_EXACT)  # [n, m]
        realistic = (distances <= _radii(self.reference, self.neighbours)).any(1).double()
        covers = distances <= _radii(rows, self.neighbours)[:, None]

        def number(index: Tensor, prompts: Sequence[str]) -> float:
            return self.of(realistic[index].mean().item(), covers[index].any(0).double().mean().item())

        return number

    def facts(self) -> dict[str, Any]:
        return self.features.facts | {"neighbours": self.neighbours}


def precision(precision: float, recall: float) -> float:
    """Share of the images that lie among the reference's."""
    return precision


def recall(precision: float, recall: float) -> float:
    """Share of the reference images that lie among the images."""
    return recall


def f1(precision: float, recall: float) -> float:
    """Harmonic mean of both; 0 where both are."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


_EXACT = "donot_use_mm_for_euclid_dist"


def _radii(rows: Tensor, neighbours: int) -> Tensor:
    """Distance of each row to its k-th neighbour among the others."""
    return torch.cdist(rows, rows, compute_mode=_EXACT).kthvalue(neighbours + 1, dim=1).values
