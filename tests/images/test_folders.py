import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from adascope_fast import images


def draw(path: Path, grey: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((4, 6, 3), grey, np.uint8)).save(path)


def describe(folder: Path, *records: object) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(record) for record in records))


def test_images_are_grouped_by_prompt_in_the_order_of_the_metadata(tmp_path: Path):
    for name in "abc":
        draw(tmp_path / f"{name}.png")
    describe(
        tmp_path,
        {"file_name": "c.png", "prompt": "two", "seed": 4},
        {"file_name": "a.png", "text": "one"},
        {"file_name": "b.png", "caption": "two"},
    )
    folder = images.read(tmp_path, "arm")
    assert folder.name == "arm"
    assert [(image.path.name, image.prompt, image.seed) for image in folder.images] == [
        ("c.png", "two", 4),
        ("b.png", "two", None),
        ("a.png", "one", None),
    ]
    assert folder.prompts == ["two", "one"]
    assert {prompt: len(of) for prompt, of in folder.by_prompt().items()} == {"two": 2, "one": 1}


def test_captions_may_lie_beside_the_images(tmp_path: Path):
    draw(tmp_path / "a.png", 7)
    draw(tmp_path / "b.jpg")
    (tmp_path / "a.txt").write_text("a cat\n")
    one, other = images.read(tmp_path).images
    assert (one.prompt, other.prompt) == ("a cat", None)
    assert one.pixels().shape == (4, 6, 3)
    assert one.pixels()[0, 0].tolist() == [7, 7, 7]


@pytest.mark.parametrize("record", [{"prompt": "x"}, {"file_name": "no.png"}, {"file_name": ["a.png"]}, 3])
def test_a_wrong_line_is_told_with_its_number(tmp_path: Path, record: object):
    draw(tmp_path / "a.png")
    describe(tmp_path, {"file_name": "a.png", "prompt": "x"}, record)
    with pytest.raises(ValueError, match="got line 2"):
        images.read(tmp_path)


def test_what_is_no_folder_of_images_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="must be one"):
        images.read(tmp_path / "none")
    with pytest.raises(ValueError, match="holds none"):
        images.read(tmp_path)


def test_a_damaged_image_is_named(tmp_path: Path):
    draw(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (image,) = images.read(tmp_path).images
    with pytest.raises(ValueError, match=r"a\.png must be an image, got"):
        image.pixels()


def test_folders_within_a_folder(tmp_path: Path):
    draw(tmp_path / "b" / "x.png")
    draw(tmp_path / "a" / "x.png")
    (tmp_path / "empty").mkdir()
    assert [folder.name for folder in images.folders(tmp_path)] == ["a", "b"]


def test_images_left_out_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png")
    describe(tmp_path, {"file_name": "a.png", "prompt": "x"})
    assert len(images.read(tmp_path).images) == 1
    assert "leaves out 1 images" in caplog.text
