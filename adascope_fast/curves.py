"""Arithmetic on sensed curves, on the host and in float64: [p, n] samples by states or steps.

Sums run in the order of the values, so neither the order of the samples nor the rank they were on can matter.
"""

import math
from typing import Any

import numpy as np
from torch import Tensor


def host(x: Any) -> np.ndarray:
    """`x` as float64 in numpy."""
    return np.asarray(x.detach().double().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)


def mean(curves: np.ndarray) -> np.ndarray:
    """Mean over the first axis, summed in the order of the values."""
    return np.sort(curves, axis=0).mean(0)


def finite_mean(curves: np.ndarray) -> np.ndarray:
    """`mean` of the rows that are finite throughout; NaN where there is none."""
    rows = curves[np.isfinite(curves).all(1)]
    return mean(rows) if len(rows) else np.full(curves.shape[1], np.nan)


def smooth(curve: np.ndarray, width: int) -> np.ndarray:
    """Centred moving average of odd width, edges replicated."""
    return np.convolve(np.pad(curve, width // 2, mode="edge"), np.full(width, 1 / width), mode="valid")


def first(holds: np.ndarray, low: int, high: int, persist: int) -> int | None:
    """The first index in low..high from which `holds` is true `persist` times in a row."""
    starts = range(low, min(high, len(holds) - persist) + 1)
    return next((i for i in starts if holds[i : i + persist].all()), None)


def rounded(x: float) -> int:
    """The nearest integer, halves upward."""
    return math.floor(x + 0.5)
