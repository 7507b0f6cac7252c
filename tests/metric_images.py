"""Images, features and weights by formula, as those that other implementations were given for `data/metrics.json`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"
PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
"""Of a person, 512 x 606, in the public domain; it comes with matplotlib."""


def known(name: str) -> dict[str, Any]:
    """What another implementation said."""
    return json.loads((DATA / "metrics.json").read_text(encoding="utf-8"))[name]


def vector(name: str) -> dict[str, Any]:
    """A value worked out by hand."""
    return json.loads((DATA / "vectors.json").read_text(encoding="utf-8"))["metrics"][name]


def images(count: int, height: int, width: int) -> Tensor:
    """Smooth waves with a fine one on top, of 8 bits, [count, 3, height, width]."""
    i = np.arange(count)[:, None, None, None]
    c = np.arange(3)[None, :, None, None]
    y = np.arange(height)[None, None, :, None]
    x = np.arange(width)[None, None, None, :]
    values = 0.5 + 0.25 * np.sin(0.11 * x * (1 + 0.3 * i) + 0.07 * y + c)
    values = values + 0.2 * np.cos(0.05 * x * y / (10 + i) + c * 0.7) + 0.05 * np.sin(1.7 * x + 2.3 * y * (i + 1))
    return torch.from_numpy(np.round(np.clip(values, 0, 1) * 255) / 255).float()


def scattered(count: int, start: int = 0) -> Tensor:
    """Numbers in [0, 1) that look drawn, float64."""
    return (torch.sin(torch.arange(start, start + count, dtype=torch.float64) * 12.9898) * 43758.5453).remainder(1)


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Weights by name under which a signal keeps its size through rectifiers."""
    found = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        count = int(np.prod(shape))
        wave = torch.sin(torch.arange(count, dtype=torch.float64) * 12.9898 + number) * 43758.5453
        wave = wave.remainder(1) * 2 - 1
        if name.endswith("running_var"):
            values = 1 + 0.3 * wave
        elif name.endswith("running_mean") or name.endswith("bias"):
            values = 0.1 * wave
        elif name.endswith("bn.weight"):
            values = 1 + 0.2 * wave
        else:
            values = wave * (6 * shape[0] / count) ** 0.5
        found[name] = values.float().view(*shape)
    return found


class Pixels:
    """Features that are the first values of an image, for metrics of sets; counts how often it is asked."""

    name, least = "pixels", 1
    facts: Mapping[str, Any] = {"network": "none"}

    def __init__(self, width: int = 3) -> None:
        self.width, self.asked = width, 0

    def __call__(self, given: Tensor) -> Tensor:
        self.asked += 1
        return given.flatten(1)[:, : self.width]


def with_features(rows: Tensor) -> Tensor:
    """Images [n, 3, 4, 4] whose first values are the rows [n, k]."""
    flat = torch.zeros(len(rows), 48, dtype=rows.dtype)
    flat[:, : rows.shape[1]] = rows
    return flat.view(-1, 3, 4, 4)
