"""Picture grids keep every pixel in its place, and captioned sheets show picture and caption."""

import base64
import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adascope_fast.reporting import contact_sheet, save_grid
from adascope_fast.reporting.images import GAP, cut


def pixels_of(address: str) -> np.ndarray:
    """The picture of a `data:` address."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def test_save_grid_keeps_every_pixel(tmp_path: Path):
    images = np.random.default_rng(0).random((5, 3, 7, 9)).astype(np.float32)
    images[0, 0, 0, :3] = (-1, 2, math.nan)
    save_grid(images, 2, tmp_path / "new" / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape == (3 * 7 + 4 * GAP, 2 * 9 + 3 * GAP, 3)
    want = np.rint(images[3] * 255).transpose(1, 2, 0)
    top, left = 7 + 2 * GAP, 9 + 2 * GAP
    assert (grid[top : top + 7, left : left + 9] == want).all()  # picture 3: second row, second column
    assert grid[GAP, GAP : GAP + 3, 0].tolist() == [0, 255, 0]
    assert (grid[2 * 7 + 3 * GAP :, left:] == 255).all()


def test_pictures_of_a_grid_stand_apart_on_any_ground(tmp_path: Path):
    for level in (0.0, 1.0):
        save_grid(np.full((2, 3, 8, 8), level), 2, tmp_path / "grid.png")
        between = np.asarray(Image.open(tmp_path / "grid.png"))[GAP, GAP + 8 : 2 * GAP + 8, 0]
        assert between.tolist() == [150, *[255] * (GAP - 2), 150], "a grey frame around each, white between"


@pytest.mark.parametrize("gap", [GAP, 0], ids=["with gaps", "as earlier versions wrote"])
def test_pictures_are_cut_out_as_they_were(tmp_path: Path, gap: int):
    images = np.random.default_rng(1).random((6, 3, 7, 9)).astype(np.float32)
    want = np.rint(images * 255).transpose(0, 2, 3, 1)
    if gap:
        save_grid(images, 3, tmp_path / "grid.png")
    else:
        joined = want.reshape(2, 3, 7, 9, 3).transpose(0, 2, 1, 3, 4).reshape(14, 27, 3)
        Image.fromarray(joined.astype(np.uint8)).save(tmp_path / "grid.png")
    rows = cut(tmp_path / "grid.png", 2, 3, gap=gap)
    assert [len(row) for row in rows] == [3, 3]
    np.testing.assert_array_equal([pixels_of(address) for row in rows for address in row], want)


def test_a_large_picture_is_made_small_enough_to_send(tmp_path: Path):
    save_grid(np.random.default_rng(2).random((1, 3, 300, 600)), 1, tmp_path / "grid.png")
    ((address,),) = cut(tmp_path / "grid.png", 1, 1, gap=GAP)
    assert address.startswith("data:image/jpeg;")
    assert pixels_of(address).shape == (128, 256, 3)


def test_more_pictures_than_a_grid_has_pixels_are_refused(tmp_path: Path):
    save_grid(np.zeros((1, 3, 8, 8)), 1, tmp_path / "grid.png")
    with pytest.raises(ValueError, match=f"a grid of 3 by 9 pictures is larger than {8 + 2 * GAP} x"):
        cut(tmp_path / "grid.png", 3, 9, gap=GAP)


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
