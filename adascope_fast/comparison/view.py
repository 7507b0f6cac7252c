"""How varied the arms are: every image as a point, by features of your choice, projected on two dimensions.

Beside it the silhouette of each arm against its base (Rousseeuw 1987; 0: the images of both are mixed, 1: two separate
clusters), in the features themselves, and the mean distance of images within an arm. The projection is t-SNE (van der
Maaten and Hinton 2008), or the first two principal components where scikit-learn is not installed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adascope_fast.comparison.reading import batches, pixels_of
from adascope_fast.images import Folder

MOST_POINTS = 300  # of an arm; t-SNE's time grows faster than their number


@dataclass(frozen=True)
class View:
    """Points [n, 2] of each arm, in [0, 1], and what is said of them."""

    features: str
    projection: str
    points: Mapping[str, list[tuple[float, float]]]
    silhouette: Mapping[str, float]
    """Of an arm against its base, NaN where there is none or scikit-learn is not installed."""
    within: Mapping[str, float]
    """Mean cosine distance of two images of the arm."""


def view(
    folders: Mapping[str, Folder],
    bases: Mapping[str, str | None],
    features: Callable[[Tensor], Tensor],
    name: str,
    *,
    batch: int,
    device: torch.device,
) -> View:
    """The arms' images by `features` [n, 3, h, w] -> [n, k]; ValueError where they cannot be had."""
    rows = {arm: _rows(folder, features, batch, device) for arm, folder in folders.items()}
    whole = torch.cat(list(rows.values()))
    try:
        from sklearn.manifold import TSNE
        from sklearn.metrics import silhouette_score
    except ImportError:
        TSNE = silhouette_score = None  # noqa: N806 - a class that may be missing
    if TSNE is not None and len(whole) > 3:
        perplexity = min(30.0, (len(whole) - 1) / 3)
        flat = torch.from_numpy(
            TSNE(perplexity=perplexity, init="pca", random_state=0, metric="cosine").fit_transform(whole.numpy())
        )
        projection = f"t-SNE, perplexity {perplexity:g}"
    else:
        centred = whole - whole.mean(0)
        flat = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
        flat = torch.nn.functional.pad(flat, (0, 2 - flat.shape[1]))
        projection = "first two principal components"
    low, high = flat.min(0).values, flat.max(0).values
    flat = (flat - low) / (high - low).clamp_min(1e-12)
    parts = dict(zip(rows, flat.split([len(part) for part in rows.values()]), strict=True))
    silhouette = {}
    for arm, base in bases.items():
        value = math.nan
        if base is not None and silhouette_score is not None and min(len(rows[arm]), len(rows[base])) > 1:
            labels = [0] * len(rows[base]) + [1] * len(rows[arm])
            value = float(silhouette_score(torch.cat([rows[base], rows[arm]]).numpy(), labels, metric="cosine"))
        silhouette[arm] = value
    points = {arm: [(float(x), float(y)) for x, y in part] for arm, part in parts.items()}
    return View(name, projection, points, silhouette, {arm: _within(part) for arm, part in rows.items()})


def _rows(folder: Folder, features: Callable[[Tensor], Tensor], batch: int, device: torch.device) -> Tensor:
    """Unit vectors of the first images of each prompt, MOST_POINTS at most."""
    chosen = list(folder.images)
    if len(chosen) > MOST_POINTS:  # evenly, so that every prompt has its share
        chosen = [chosen[number * len(chosen) // MOST_POINTS] for number in range(MOST_POINTS)]
    part = Folder(folder.name, folder.path, tuple(chosen))
    rows = [features(pixels_of(images).to(device)).detach().cpu().double() for images in batches(part, batch)]
    return torch.nn.functional.normalize(torch.cat(rows), dim=1)


def _within(rows: Tensor) -> float:
    num = len(rows)
    if num < 2:
        return math.nan
    total = rows.sum(0)
    return 1 - ((total @ total - num) / (num * (num - 1))).item()  # unit vectors: the mean cosine of all pairs
