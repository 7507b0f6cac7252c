import json
from pathlib import Path

import pytest
from browser import opened
from image_folders import folder
from run_folders import HOSTILE

from adascope_fast.comparison import evaluation
from adascope_fast.comparison.arms import arms_of
from adascope_fast.comparison.evaluation import Comparison, Options, compare
from adascope_fast.config import Config
from adascope_fast.rewards.settings import JpegCompressibility, Judge, OwnReward


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two folders of images, one prompt of which is hostile, by what needs no weights."""
    place = tmp_path_factory.mktemp("page")
    arms = []
    for name, greys in (("plain", [10, 40]), ("bright", [200, 240])):
        folder(place / name, {HOSTILE: greys, "a cat": [0, 255]}, size=(40, 40))
        arms.append(f"{name}={place / name}")
    options = Options(out=place / "out", only=("contrast", "pixel_diversity"))
    return compare(arms_of(arms), None, options)


def page_of(compared: Comparison) -> Path:
    return compared.folders["plain"].path.parent / "out" / "report.html"


def test_the_files_say_the_same(compared: Comparison):
    out = page_of(compared).parent
    values = json.loads((out / "evaluation.json").read_text())
    assert values["arms"].keys() == {"plain", "bright"}
    shown = values["metrics"]["pixel_diversity"]["arms"]
    assert shown["plain"]["value"] == pytest.approx((30 / 255 + 1) / 2)
    assert "pixel_diversity" not in (out / "table.csv").read_text()
    assert "RMSD" in (out / "table.csv").read_text()


def test_texts_are_escaped(compared: Comparison):
    text = page_of(compared).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_its_window_and_asks_for_nothing(compared: Comparison, width: int, tmp_path: Path):
    with opened(viewport={"width": width, "height": 800}) as page:
        page.goto(page_of(compared).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("h2").all_inner_texts() == ["Metrics", "Pictures", "Variety", "What was compared"]
        assert page.locator("img").count() == 4, "two prompts of two arms"
        assert all(page.evaluate("[...document.images].map(image => image.naturalWidth > 0)"))
        assert page.locator("figcaption").first.inner_text() == HOSTILE


def test_arms_without_a_prompt_in_common_are_refused(tmp_path: Path):
    for name, prompt in (("one", "a cat"), ("other", "a dog")):
        folder(tmp_path / name, {prompt: [0]})
    arms = arms_of([str(tmp_path / "one"), str(tmp_path / "other")])
    with pytest.raises(ValueError, match="must have prompts in common, 'one' and 'other' have none"):
        compare(arms, None, Options(out=tmp_path / "out", only=("contrast",)))


def test_an_unknown_metric_and_one_that_cannot_be_measured_are_refused(tmp_path: Path):
    folder(tmp_path / "one", {"a cat": [0]})
    arms = arms_of([str(tmp_path / "one")])
    with pytest.raises(ValueError, match=r"--metric must be one of .*, got 'beauty'"):
        compare(arms, None, Options(out=tmp_path / "out", only=("beauty",)))
    with pytest.raises(ValueError, match="--metric pixel_diversity must be measured, and was not: RMSD compares"):
        compare(arms, None, Options(out=tmp_path / "out", only=("pixel_diversity",)))


def test_what_differs_between_arms_is_told(tmp_path: Path):
    folder(tmp_path / "one", {"a cat": [0, 1], "a dog": [0, 1]}, size=(8, 8))
    folder(tmp_path / "other", {"a cat": [0, 1]}, size=(9, 9))
    arms = arms_of([str(tmp_path / "one"), str(tmp_path / "other")])
    found = compare(arms, None, Options(out=tmp_path / "out", only=("contrast",)))
    assert found.notes == (
        "one and other have 1 prompts in common, and 1 not",
        "images of one and other differ in size, which most metrics see",
    )


def test_the_reference_is_an_arm_or_a_folder(tmp_path: Path):
    folder(tmp_path / "one", {"a cat": [0]})
    arms = arms_of([str(tmp_path / "one")])
    with pytest.raises(ValueError, match="--reference must be one of one or a folder of images, got 'two'"):
        compare(arms, None, Options(out=tmp_path / "out", only=("contrast",), reference="two"))
    found = compare(arms, None, Options(out=tmp_path / "out", only=("contrast",), reference_folder=tmp_path / "one"))
    assert found.reference == "reference "


def test_a_runs_reward_is_measured_and_own_code_only_if_asked_for(small_run: Path):
    (arm,) = arms_of([str(small_run)], with_base=False)
    found, own, notes = evaluation._rewards([arm], Options(out=Path("x"), rewards=(JpegCompressibility(),)))
    assert list(found) == ["reward:jpeg_compressibility", "reward:scene_attributes"]
    assert own == {arm.name: "reward:scene_attributes"}
    assert notes == []
    section = OwnReward(name="mine:score")
    config = arm.config.model_copy(update={"reward": section})  # type: ignore[union-attr]
    foreign = type(arm)(arm.name, "run", arm.place, "base", config=config)
    found, own, notes = evaluation._rewards([foreign], Options(out=Path("x")))
    assert (found, own) == ({}, {})
    assert "was trained on mine:score, code of its own, which is not run unasked; add --reward" in notes[0]
    found, own, notes = evaluation._rewards([foreign], Options(out=Path("x"), rewards=(section,)))
    assert own == {arm.name: "reward:mine:score"}


def test_people_whose_votes_were_the_reward_are_not_asked_again(small_run: Path):
    (arm,) = arms_of([str(small_run)], with_base=False)
    config = arm.config.model_copy(update={"reward": Judge()})  # type: ignore[union-attr]
    judged = type(arm)(arm.name, "run", arm.place, "base", config=config)
    found, own, notes = evaluation._rewards([judged], Options(out=Path("x")))
    assert (found, own) == ({}, {})
    assert "people's votes, who are not asked again" in notes[0]


def test_a_folder_that_names_code_or_a_server_reaches_neither(small_run: Path):
    (arm,) = arms_of([str(small_run)], with_base=False)
    for section, said in (
        ({"name": "mixed", "parts": {"jpeg_compressibility": 1.0, "mine:score": 1.0}}, "mine:score, code of its own"),
        ({"name": "remote", "url": "http://192.0.2.1:1"}, "nothing is sent unasked"),
        ({"name": "mixed", "parts": {"jpeg_compressibility": 1.0, "remote": 1.0}}, "nothing is sent unasked"),
    ):
        config = arm.config.model_copy(update={"reward": Config.of({"reward": section}).reward})  # type: ignore[union-attr]
        foreign = type(arm)(arm.name, "run", arm.place, "base", config=config)
        found, own, notes = evaluation._rewards([foreign], Options(out=Path("x")))
        assert (found, own) == ({}, {})
        assert said in notes[0]
