"""Which images are compared, on which side, and whether votes are on the same ones."""

import json
import logging
from collections import Counter
from pathlib import Path

import PIL.Image
import pytest
from arms_to_judge import PROMPTS, arms, comparison_of, write_arm

from adascope_fast.images import Image
from adascope_fast.judging import Comparison, arms_of


def test_images_of_the_same_prompt_and_seed_meet(tmp_path: Path):
    found = comparison_of([write_arm(tmp_path / "a", seeds=[0, 1, 2]), write_arm(tmp_path / "b", seeds=[2, 1, 7])])
    assert Counter(pair.prompt for pair in found.pairs) == dict.fromkeys(PROMPTS, 2)
    for pair in found.pairs:
        assert Path(pair.left.path).name == Path(pair.right.path).name
        assert Path(pair.left.path).stem[-1] in "12"


def test_without_seeds_the_first_of_a_prompt_meets_the_first(tmp_path: Path):
    paths = arms(tmp_path)
    described = paths[1] / "metadata.jsonl"
    records = [json.loads(line) for line in described.read_text().splitlines()]
    described.write_text("".join(json.dumps(record | {"seed": None}) + "\n" for record in records))
    found = comparison_of(paths)
    assert len(found.pairs) == 6
    assert all(Path(pair.left.path).name == Path(pair.right.path).name for pair in found.pairs)


@pytest.mark.parametrize("num", [6, 7, None])
def test_arms_meet_equally_often_and_each_is_left_in_half(tmp_path: Path, num: int | None):
    found = comparison_of(arms(tmp_path, "abc"), num=num)
    met = Counter(frozenset((pair.left.arm, pair.right.arm)) for pair in found.pairs)
    assert sum(met.values()) == (num or 18)
    assert max(met.values()) - min(met.values()) <= 1
    for two in met:
        lefts = [pair.left.arm == min(two) for pair in found.pairs if {pair.left.arm, pair.right.arm} == two]
        assert abs(2 * sum(lefts) - len(lefts)) <= 1


def test_few_pairs_are_of_different_prompts(tmp_path: Path):
    found = comparison_of(arms(tmp_path, seeds=range(5)), num=3)
    assert {pair.prompt for pair in found.pairs} == set(PROMPTS)


def test_the_seed_decides_the_order_and_nothing_else_does(tmp_path: Path):
    paths = arms(tmp_path)
    first = comparison_of(paths)
    assert comparison_of(paths[::-1]) == first
    assert comparison_of(paths, seed=1) != first
    assert comparison_of(paths, seed=1).digest != first.digest


def test_pairs_are_kept_and_others_are_refused(tmp_path: Path):
    paths, out = arms(tmp_path), tmp_path / "out"
    found = comparison_of(paths)
    found.keep_in(out)
    found.keep_in(out)
    assert Comparison.kept_in(out) == found
    others = [comparison_of(paths, seed=1), comparison_of(paths, num=2)]
    file = next(paths[0].glob("*.png"))
    PIL.Image.new("RGB", (16, 16)).save(file)
    others.append(comparison_of(paths))
    for other in others:
        with pytest.raises(ValueError, match="must be on the same pairs"):
            other.keep_in(out)
    assert Comparison.kept_in(out) == found


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"pairs": [3], "arms": [], "seed": 0}'])
def test_a_damaged_file_of_pairs_is_refused(tmp_path: Path, damage: str):
    with pytest.raises(ValueError, match=r"has pairs\.json, .* has none"):
        Comparison.kept_in(tmp_path)
    (tmp_path / "pairs.json").write_text(damage)
    with pytest.raises(ValueError, match="is damaged; restore it"):
        Comparison.kept_in(tmp_path)


def test_what_an_image_file_says_of_its_origin_is_not_shown(tmp_path: Path):
    paths = arms(tmp_path)
    file = next(paths[0].glob("*.png"))
    info = PIL.Image.Exif()
    info[0x010E] = "quokka"
    with PIL.Image.open(file) as image:
        image.copy().save(file, exif=info)
    assert b"quokka" in file.read_bytes()
    (side,) = {one for pair in comparison_of(paths).pairs for one in (pair.left, pair.right) if one.path == str(file)}
    assert b"quokka" not in side.png()
    assert (Image(file, None).pixels() == _pixels(side.png(), tmp_path)).all()


def _pixels(png: bytes, folder: Path):
    (folder / "shown.png").write_bytes(png)
    return Image(folder / "shown.png", None).pixels()


def test_a_folder_that_holds_arms_is_enough(tmp_path: Path):
    arms(tmp_path / "images")
    names = ["quokka", "zebra"]
    assert [arm.name for arm in arms_of([tmp_path / "images"])] == names
    assert [arm.name for arm in arms_of([tmp_path])] == names


def test_folders_of_one_name_are_told_apart(tmp_path: Path):
    paths = [write_arm(tmp_path / run / "samples", shade=place) for place, run in enumerate("ab")]
    assert [arm.name for arm in arms_of(paths)] == [str(path) for path in paths]


def test_what_cannot_be_compared_is_refused(tmp_path: Path):
    one, other = arms(tmp_path)
    with pytest.raises(ValueError, match="two folders of images or more, got 0 in"):
        arms_of([one])
    with pytest.raises(ValueError, match="got one of them twice"):
        arms_of([one, one])
    with pytest.raises(ValueError, match="a folder of images must be one"):
        arms_of([one, tmp_path / "nowhere"])
    strange = write_arm(tmp_path / "strange", ["a cat"])
    with pytest.raises(ValueError, match="'quokka' and 'strange' have none in common"):
        comparison_of([one, strange])
    (other / "0000_0.png").write_bytes((other / "0000_0.png").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"0000_0\.png must be an image"):
        comparison_of([one, other])


def test_images_of_different_size_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    paths = arms(tmp_path)
    PIL.Image.new("RGB", (8, 8)).save(paths[0] / "0000_0.png")
    with caplog.at_level(logging.WARNING):
        comparison_of(paths)
    assert "differ in size" in caplog.text
