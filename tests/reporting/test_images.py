"""Picture grids keep every pixel in its place, and captioned sheets show picture and caption."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adascope_fast.reporting import contact_sheet, save_grid


def test_save_grid_keeps_every_pixel(tmp_path: Path):
    images = np.random.default_rng(0).random((5, 3, 7, 9)).astype(np.float32)
    images[0, 0, 0, :3] = (-1, 2, math.nan)
    save_grid(images, 2, tmp_path / "new" / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape == (3 * 7, 2 * 9, 3)
    want = np.rint(images[3] * 255).transpose(1, 2, 0)
    assert (grid[7:14, 9:18] == want).all()  # picture 3: second row, second column
    assert grid[0, :3, 0].tolist() == [0, 255, 0]
    assert (grid[14:, 9:] == 255).all()


def test_save_grid_names_a_wrong_shape(tmp_path: Path):
    with pytest.raises(ValueError, match=r"pictures are \[n, 3, h, w\] with n >= 1, got \[3, 8, 8\]"):
        save_grid(np.zeros((3, 8, 8)), 2, tmp_path / "grid.png")


def test_contact_sheet(tmp_path: Path):
    images = np.full((3, 3, 32, 32), 0.5, np.float32)
    contact_sheet(
        images, ["a circle", "a caption that needs more than one line", ""], 2, tmp_path / "sheet.png", scale=2
    )
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet[10:70, 10:70] == 128).all()
    assert (sheet[74:90, 8:72] < 128).any()  # the caption below the first picture
    with pytest.raises(ValueError, match="one caption a picture, got 1 for 3"):
        contact_sheet(images, ["a"], 2, tmp_path / "sheet.png")
