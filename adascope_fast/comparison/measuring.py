"""Every metric of every arm, in one pass over its images: a batch of them is in memory at a time.

A metric that cannot be had (no weights, images too small, no reference) is not left out: it says why.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adascope_fast.comparison.arms import Arm
from adascope_fast.comparison.guards import MEASURES, DistanceToBase
from adascope_fast.comparison.reading import batches, pixels_of
from adascope_fast.images import Folder
from adascope_fast.metrics import Metric, interval
from adascope_fast.metrics.sources import Sources
from adascope_fast.metrics.table import Row

GROUPS = {
    "reward": "reward",
    "preference": "human preference",
    "fidelity": "fidelity and alignment",
    "diversity": "diversity",
    "quality": "image quality",
    "besides": "besides the table",
}


@dataclass(frozen=True)
class Estimate:
    """A metric of an arm with its 95 % interval, or why there is none."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    why: str = ""
    spread: float = math.nan
    """Standard deviation of its value over prompts, of what the verdict looks at; NaN otherwise."""
    gain: tuple[float, float, float] | None = None
    """Difference to the arm's base with its interval, over the same prompts."""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_known(self) -> bool:
        """Whether there is a number."""
        return math.isfinite(self.value)


@dataclass(frozen=True)
class Line:
    """A metric over all arms."""

    key: str
    name: str
    title: str
    group: str
    higher_is_better: bool
    counts: bool
    """Whether it is one of the paper's thirteen, which #Top2 counts."""
    estimates: Mapping[str, Estimate]

    def ranks(self) -> dict[str, int]:
        """1 for the best arm, 2 for the second best; equal values share a rank, and a lone value has none."""
        known = {name: one.value for name, one in self.estimates.items() if one.is_known}
        if len(known) < 2:
            return {}
        order = sorted(set(known.values()), reverse=self.higher_is_better)
        return {name: order.index(value) + 1 for name, value in known.items() if order.index(value) < 2}


@dataclass(frozen=True)
class Asking:
    """A metric to be measured."""

    row: Row
    group: str
    counts: bool


def measure(
    arms: Sequence[Arm],
    folders: Mapping[str, Folder],
    asked: Sequence[Asking],
    sources: Sources,
    *,
    reference: str | None,
    batch: int,
    device: torch.device,
    seed: int,
    distance: DistanceToBase | None = None,
    on_images: Callable[[int], None] = lambda count: None,
) -> list[Line]:
    """Each metric of each arm.

    Args:
        sources: where the metrics' networks come from.
        reference: the arm, or the further folder, that FID and the like compare with; it has no such value itself.
        batch: images in memory at once.
        distance: told every batch of an arm that has a base, and the base's folder.
    """
    names = [arm.name for arm in arms]
    order = sorted(folders, key=lambda name: name != reference)  # the reference first, others are compared with it
    made = {name: [_try(one.row, sources) for one in asked] for name in order}
    for name in order:
        metrics = made[name]
        base = next((arm.base for arm in arms if arm.name == name), None)
        for of_prompts in batches(folders[name], batch):
            pixels, prompts = pixels_of(of_prompts).to(device), [str(image.prompt) for image in of_prompts]
            metrics[:] = [_updated(metric, pixels, prompts) for metric in metrics]
            if distance is not None and base is not None:
                distance.update(name, pixels, of_prompts, folders[base])
            on_images(len(of_prompts))
    lines = []
    draws: dict[tuple[str, str], Tensor] = {}
    for number, one in enumerate(asked):
        estimates = {}
        for name in sorted(names, key=lambda name: _depth(arms, name)):
            base = next(arm.base for arm in arms if arm.name == name)
            estimate = _estimate(one, made, number, name, reference, seed, draws)
            if base is not None and estimate.is_known and estimates[base].is_known:
                difference = estimate.value - estimates[base].value
                drawn = draws[one.row.key, name] - draws[one.row.key, base]
                estimate = replace(estimate, gain=(difference, *interval(difference, drawn)))
            estimates[name] = estimate
        row = one.row
        ordered = {name: estimates[name] for name in names}
        lines.append(Line(row.key, row.name, row.title, one.group, row.higher_is_better, one.counts, ordered))
    return lines


def _depth(arms: Sequence[Arm], name: str) -> int:
    return int(next(arm.base for arm in arms if arm.name == name) is not None)


def _estimate(
    asking: Asking,
    made: Mapping[str, Sequence[Metric | str]],
    number: int,
    name: str,
    reference: str | None,
    seed: int,
    draws: dict[tuple[str, str], Tensor],
) -> Estimate:
    metric = made[name][number]
    if isinstance(metric, str):
        return Estimate(why=metric)
    if asking.row.needs_reference:
        if name == reference:
            return Estimate(why="it is what the others are compared with")
        other = "no arm or folder is the reference; add --reference" if reference is None else made[reference][number]
        if isinstance(other, str):
            return Estimate(why=other)
    else:
        other = None
    try:
        if other is not None:
            metric.against(other)
        value, drawn = metric.compute(), metric.bootstrap(seed)
    except ValueError as error:
        return Estimate(why=" ".join(str(error).split()))
    draws[asking.row.key, name] = drawn
    low, high = interval(value, drawn)
    spread = metric.spread() if asking.row.key in MEASURES else math.nan
    return Estimate(value, low, high, spread=spread, facts=metric.facts())


def _try(row: Row, sources: Sources) -> Metric | str:
    try:
        return row.make(sources)
    except ValueError as error:
        return " ".join(str(error).split())


def _updated(metric: Metric | str, pixels: Tensor, prompts: Sequence[str]) -> Metric | str:
    if isinstance(metric, str):
        return metric
    try:
        metric.update(pixels, prompts)
    except ValueError as error:
        return " ".join(str(error).split())
    return metric
