"""What a metric is: a number of a set of images, from rows that are kept, an interval of it, and its direction.

Images come in batches, those of a prompt one after the other, and are not kept: each leaves a row (a score, a vector of
features). So memory grows by rows, and the number of any choice of prompts can be made again: the interval is the
estimate and 1.96 bootstrap standard errors either way, over prompts drawn with replacement, since images of one prompt
resemble each other. Not the percentiles of the draws: a set drawn with replacement holds copies, which by themselves
move what is of sets (Fréchet distance, recall, entropy), and a standard error is not moved by that.

Metrics of the same prompts and seed see the same draws, so the draws of two models can be subtracted.

Axes: `n` images, `k` numbers of a row, `r` draws.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

NORMAL_95 = 1.959964
NUM_DRAWS = 200


class Metric(ABC):
    """A number of a set of images: `update` with each batch, then `compute`."""

    name: ClassVar[str]
    """Short, as in a table's heading."""
    title: ClassVar[str]
    """What it is, in words."""
    higher_is_better: ClassVar[bool]
    unit: ClassVar[str] = ""
    fewest: ClassVar[int] = 1
    """Images without which it has no value."""
    draws: ClassVar[int] = NUM_DRAWS
    """Bootstrap draws; fewer where one takes long."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._prompts: list[str] = []

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Take images [n, 3, h, w] in [0, 1] in; ValueError where they are too small, or not finite."""
        rows = self.rows(images, prompts).detach().to("cpu", torch.float64)
        if rows.shape[0] != len(prompts):
            raise ValueError(
                f"{self.name} must have a row an image, {len(prompts)}, got {rows.shape[0]}; return as many"
            )
        if not bool(rows.isfinite().all()):
            raise ValueError(f"{self.name} must be finite, and is not for an image of {_first(rows, prompts)!r:.80}")
        self._rows.append(rows)
        self._prompts.extend(prompts)

    def compute(self) -> float:
        """The number; ValueError for too few images."""
        if len(self) < self.fewest:
            raise ValueError(f"{self.name} needs at least {self.fewest} images, got {len(self)}; draw more")
        return float(self.value(torch.cat(self._rows), self._prompts))

    def bootstrap(self, seed: int = 0) -> Tensor:
        """The number [r] of prompts drawn with replacement; NaN where a draw has none. Empty for a single prompt."""
        rows, groups = torch.cat(self._rows), self._groups()
        if len(groups) < 2:
            return torch.empty(0, dtype=torch.float64)
        generator = np.random.default_rng(seed)
        drawn = []
        for _ in range(self.draws):
            chosen = generator.integers(len(groups), size=len(groups))
            # A prompt drawn twice counts as two, each with images of its own.
            index = torch.cat([groups[group] for group in chosen])
            names = [f"{place}" for place, group in enumerate(chosen) for _ in groups[group]]
            drawn.append(self._or_nan(rows[index], names))
        return torch.tensor(drawn, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._prompts)

    @abstractmethod
    def rows(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """What each image leaves: [n, k], or [n] for a single number."""

    @abstractmethod
    def value(self, rows: Tensor, prompts: Sequence[str]) -> float:
        """The number of images by their rows [n, k], float64; those of equal prompts belong together."""

    def facts(self) -> dict[str, Any]:
        """What else a reader of the number must know: weights, layer, reference."""
        return {}

    def _groups(self) -> list[Tensor]:
        """The indices of each prompt's images, in the order of their first appearance."""
        places: dict[str, list[int]] = {}
        for index, prompt in enumerate(self._prompts):
            places.setdefault(prompt, []).append(index)
        return [torch.tensor(place) for place in places.values()]

    def _or_nan(self, rows: Tensor, prompts: Sequence[str]) -> float:
        try:
            return float(self.value(rows, prompts))
        except ValueError:
            return math.nan


class MeanScore(Metric):
    """The mean of a score of each image."""

    def value(self, rows: Tensor, prompts: Sequence[str]) -> float:
        return rows.mean().item()


def interval(value: float, drawn: Tensor) -> tuple[float, float]:
    """`value` and 1.96 standard deviations of its bootstrap draws [r] either way; NaN without two finite draws."""
    drawn = drawn[drawn.isfinite()]
    reach = NORMAL_95 * drawn.std().item() if len(drawn) > 1 else math.nan
    return value - reach, value + reach


def _first(rows: Tensor, prompts: Sequence[str]) -> str:
    return prompts[int((~rows.reshape(len(rows), -1).isfinite().all(1)).nonzero()[0, 0])]
