"""What a metric is: a number of a set of images, from rows that are kept, an interval of it, and its direction.

Images come in batches, those of a prompt one after the other, and are not kept: each leaves a row (a score, a vector of
features). So memory grows by rows, and the number of any choice of prompts can be made again: the interval is the
estimate and 1.96 bootstrap standard errors either way, over prompts drawn with replacement, since images of one prompt
resemble each other. Not the percentiles of the draws: a set drawn with replacement holds copies, which by themselves
move what is of sets (Fréchet distance, recall, entropy), and a standard error is not moved by that. A reference set
is held fixed.

Metrics of the same prompts and seed see the same draws, so the draws of two models can be subtracted.

Axes: `n` images, `k` numbers of a row, `r` draws.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

NORMAL_95 = 1.959964
NUM_DRAWS = 200

Choice = Callable[[Tensor, Sequence[str]], float]
"""The number of the images of an index, each of them with the name of its prompt; an image may be there twice."""


class Unavailable(ValueError):  # noqa: N818 - it says what is the case, and often is no error
    """A metric lacks weights or a package here; the line says which, and how to get them."""


class Metric(ABC):
    """A number of a set of images: `update` with each batch, then `compute`."""

    name: str
    """Short, as in a table's heading."""
    title: str
    """What it is, in words."""
    higher_is_better: bool
    unit: str = ""
    fewest: int = 1
    """Images without which it has no value."""
    least: int = 1
    """Pixels of an image's shorter side below which it has no value."""
    draws: int = NUM_DRAWS
    """Bootstrap draws; fewer where one takes long."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._prompts: list[str] = []

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Take images [n, 3, h, w] in [0, 1] in; ValueError where they are too small, or not finite."""
        self.check(images, prompts)
        if not len(prompts):
            return
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
        self.check_enough()
        return float(self.value(torch.cat(self._rows), self._prompts))

    def bootstrap(self, seed: int = 0) -> Tensor:
        """The number [r] of prompts drawn with replacement; NaN where a draw has none. Empty for a single prompt."""
        groups = groups_of(self._prompts)
        if len(groups) < 2:
            return torch.empty(0, dtype=torch.float64)
        number = self.choice(torch.cat(self._rows))
        generator = np.random.default_rng(seed)
        drawn = []
        for _ in range(self.draws):
            chosen = generator.integers(len(groups), size=len(groups))
            # A prompt drawn twice counts as two, each with images of its own.
            index = torch.cat([groups[group] for group in chosen])
            names = [f"{place}" for place, group in enumerate(chosen) for _ in groups[group]]
            drawn.append(_or_nan(number, index, names))
        return torch.tensor(drawn, dtype=torch.float64)

    def spread(self) -> float:
        """Standard deviation over prompts of the number of each one's images; NaN where a prompt alone has none."""
        number = self.choice(torch.cat(self._rows))
        values = [_or_nan(number, group, [""] * len(group)) for group in groups_of(self._prompts)]
        return torch.tensor(values, dtype=torch.float64).std().item() if len(values) > 1 else math.nan

    def choice(self, rows: Tensor) -> Choice:
        """The number of any choice of the rows [n, k]; here what is the same for all choices is computed once."""
        return lambda index, names: self.value(rows[index], names)

    def against(self, reference: "Metric") -> None:
        """Compare with the images of another metric of the same kind; ValueError for one that compares nothing."""
        raise ValueError(f"{self.name} is of one set of images, got a reference; leave it out")

    def check(self, images: Tensor, prompts: Sequence[str]) -> None:
        """ValueError unless these are finite images [n, 3, h, w] in [0, 1], large enough, each with a prompt."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"{self.name} needs images [n, 3, h, w] of floats in [0, 1], got {list(images.shape)} of "
                f"{str(images.dtype).removeprefix('torch.')}; convert them"
            )
        if len(images) != len(prompts):
            raise ValueError(f"{self.name} needs a prompt an image, got {len(prompts)} of {len(images)}; give as many")
        height, width = images.shape[-2:]
        if len(images) and min(height, width) < self.least:
            raise ValueError(
                f"{self.name} needs images of at least {self.least} x {self.least} pixels, got {width} x {height}; "
                f"draw larger ones, or do without it"
            )
        if not bool(images.isfinite().all()):
            raise ValueError(
                f"images must be finite, got one that is not for {_first(images, prompts)!r:.80}; draw again"
            )
        if len(images) and not -_SLACK <= images.min().item() <= images.max().item() <= 1 + _SLACK:
            raise ValueError(
                f"images must be in [0, 1], got values from {images.min().item():g} to {images.max().item():g}; "
                f"scale them"
            )

    def check_enough(self) -> None:
        """ValueError where there are fewer images than it needs."""
        if len(self) < self.fewest:
            raise ValueError(f"{self.name} needs at least {self.fewest} images, got {len(self)}; draw more")

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


class MeanScore(Metric):
    """The mean of a score of each image."""

    def value(self, rows: Tensor, prompts: Sequence[str]) -> float:
        return rows.mean().item()


class Compared(Metric):
    """A number of a set of images beside a reference set, which `against` names."""

    _reference: Tensor | None = None

    def against(self, reference: Metric) -> None:
        """Compare with the images that `reference`, a metric of the same kind, has taken in so far."""
        if type(reference) is not type(self) or reference.facts() != self.facts():
            raise ValueError(
                f"{self.name} is compared with a metric of its own kind and features, got {reference.name}; "
                f"make both by the same row"
            )
        try:
            reference.check_enough()
        except ValueError as error:
            raise ValueError(f"the reference set is too small: {error}") from None
        self._reference = torch.cat(reference._rows)

    @property
    def reference(self) -> Tensor:
        """Rows [m, k] of the reference set; ValueError where `against` was not called."""
        if self._reference is None:
            raise ValueError(
                f"{self.name} compares with a reference set, got none; call against() with its metric first"
            )
        return self._reference

    def value(self, rows: Tensor, prompts: Sequence[str]) -> float:
        return self.choice(rows)(torch.arange(len(rows)), prompts)


def groups_of(prompts: Sequence[str]) -> list[Tensor]:
    """The indices of each prompt's images, in the order of their first appearance."""
    places: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(index)
    return [torch.tensor(place) for place in places.values()]


def interval(value: float, drawn: Tensor) -> tuple[float, float]:
    """`value` and 1.96 standard deviations of its bootstrap draws [r] either way; NaN without two finite draws."""
    drawn = drawn[drawn.isfinite()]
    reach = NORMAL_95 * drawn.std().item() if len(drawn) > 1 else math.nan
    return value - reach, value + reach


def eight_bits(images: Tensor) -> Tensor:
    """Images as a file of 8 bits holds them: the nearest of 256 levels, still in [0, 1]."""
    return images.clamp(0, 1).mul(255).round() / 255


_SLACK = 1e-3
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


def grey(images: Tensor) -> Tensor:
    """Luminance [n, h, w] of images [n, 3, h, w] by BT.601, float64."""
    return torch.einsum("nchw,c->nhw", images.double(), torch.tensor(_GREY, dtype=torch.float64, device=images.device))


def _or_nan(number: Choice, index: Tensor, names: Sequence[str]) -> float:
    try:
        return float(number(index, names))
    except ValueError:
        return math.nan


def _first(rows: Tensor, prompts: Sequence[str]) -> str:
    return prompts[int((~rows.reshape(len(rows), -1).isfinite().all(1)).nonzero()[0, 0])]
