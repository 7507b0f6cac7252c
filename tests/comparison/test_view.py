import math
from pathlib import Path

import pytest
import torch
from image_folders import folder
from torch import Tensor

from adascope_fast.comparison.view import view


def by_brightness(images: Tensor) -> Tensor:
    """Two features: an angle by the brightness."""
    angle = images.mean((1, 2, 3)) * math.pi / 2
    return torch.stack([angle.cos(), angle.sin()], 1)


def made(tmp_path: Path, trained: list[float]):
    folders = {
        "base": folder(tmp_path / "base", {"a": [0, 20], "b": [10, 30]}),
        "trained": folder(tmp_path / "trained", {"a": trained[:2], "b": trained[2:]}),
    }
    bases = {"base": None, "trained": "base"}
    return view(folders, bases, by_brightness, "brightness", batch=3, device=torch.device("cpu"))


def test_apart_and_mixed_arms(tmp_path: Path):
    apart, mixed = made(tmp_path / "x", [250, 252, 254, 255]), made(tmp_path / "y", [0, 20, 10, 30])
    assert apart.silhouette["trained"] > 0.9
    assert mixed.silhouette["trained"] < 0.1
    assert math.isnan(apart.silhouette["base"])
    assert {arm: len(points) for arm, points in apart.points.items()} == {"base": 4, "trained": 4}
    assert all(0 <= value <= 1 for points in apart.points.values() for point in points for value in point)


def test_within_is_the_mean_cosine_distance_of_pairs(tmp_path: Path):
    found = made(tmp_path, [255, 255, 255, 255])
    assert found.within["trained"] == pytest.approx(0, abs=1e-9)
    angles = torch.tensor([0, 20, 10, 30]) / 255 * math.pi / 2
    pairs = torch.combinations(angles, 2)
    assert found.within["base"] == pytest.approx((1 - (pairs[:, 0] - pairs[:, 1]).cos()).mean().item(), rel=1e-4)


def test_the_same_images_give_the_same_picture(tmp_path: Path):
    assert made(tmp_path / "x", [5, 50, 90, 200]).points == made(tmp_path / "y", [5, 50, 90, 200]).points
