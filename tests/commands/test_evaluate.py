"""`evaluate` on a real run: what it prints and writes, what it refuses, and that it goes on where it was stopped."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from browser import opened
from command_line import Outcome, call, refused
from image_folders import folder

from adascope_fast import prompts
from adascope_fast.commands import evaluate
from adascope_fast.config import Config

ASK = ("--num-prompts", "3", "--num", "2", "--steps", "3")


@pytest.fixture(scope="module")
def evaluated(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    out = tmp_path_factory.mktemp("evaluate") / "out"
    return out, call("evaluate", f"trained={run}", "--out", out, *ASK)


def test_it_prints_the_table_the_reasons_and_the_verdict(evaluated: tuple[Path, Outcome]):
    out, outcome = evaluated
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["base", "trained"]
    for name in ("scene_attributes", "PS", "FID", "CLIP", "LPIPS", "BRI", "SE", "#Top2"):
        assert any(line.startswith(name) for line in lines), name
    assert any(line.startswith("not measured: FID: ") for line in lines)
    assert any(line.startswith("not measured: NIQE: NIQE needs images of at least 192") for line in lines)
    assert any(line.startswith("trained: The reward ") for line in lines)
    assert lines[-1] == str(out / "report.html")


def test_what_is_measured_and_what_is_not_stands_in_the_files(evaluated: tuple[Path, Outcome]):
    out, _ = evaluated
    values = json.loads((out / "evaluation.json").read_text())
    assert [values["arms"][name]["kind"] for name in ("base", "trained")] == ["base", "run"]
    metrics = values["metrics"]
    for key in ("clip_score", "lpips", "brisque", "spectral_entropy", "contrast", "pixel_diversity"):
        assert metrics[key]["arms"]["trained"]["value"] == pytest.approx(
            metrics[key]["arms"]["base"]["value"], rel=0.2
        ), key
        assert len(metrics[key]["arms"]["trained"]["gain"]) == 3
    assert "needs the weights of inception" in metrics["fid"]["arms"]["trained"]["why"]
    assert values["drawn"] == {
        "images": 2,
        "seed": 0,
        "num_steps": 3,
        "guidance_scale": 1.0,
        "shift": None,
        "num_prompts": 3,
    }
    assert {sign["measure"] for sign in values["hacked"]["trained"]["signs"]} == {
        "LPIPS diversity",
        "diversity of pixels",
        "CLIP score",
        "contrast",
        "LPIPS to the base's image",
    }
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert len(rows) == 2 * len(metrics)
    assert len(list((out / "images" / "trained").glob("*.png"))) == 6


def test_the_page_shows_arms_side_by_side(evaluated: tuple[Path, Outcome]):
    out, _ = evaluated
    with opened(viewport={"width": 1200, "height": 800}) as page:
        page.goto((out / "report.html").as_uri())
        assert page.locator("h2").all_inner_texts() == [
            "Metrics",
            "Is it hacked?",
            "Pictures",
            "Variety",
            "What was compared",
        ]
        assert page.locator("figure").count() == 3
        assert page.locator("figure").first.locator("img").count() == 2
        assert page.locator("svg circle").count() == 12, "a point an image"


def test_an_evaluation_that_was_stopped_goes_on(evaluated: tuple[Path, Outcome], run: Path):
    out, first = evaluated
    before = {path: path.stat().st_mtime_ns for path in sorted((out / "images").rglob("*.png"))}
    lost = next(iter(before))
    lost.unlink()
    again = call("evaluate", f"trained={run}", "--out", out, *ASK)
    # In a batch of another size a pixel may be rounded to the other side, which statistics of flat images see.
    number = r"[-+]?\d+\.\d+"
    assert re.sub(number, "", again.out) == re.sub(number, "", first.out)
    told, was = ([float(text) for text in re.findall(number, one.out)] for one in (again, first))
    assert told == pytest.approx(was, rel=1e-3, abs=2e-3)
    changed = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert lost in changed
    assert len(changed) == 2, "the other image of its prompt is drawn with it"


def test_other_images_are_not_replaced_unasked(evaluated: tuple[Path, Outcome], run: Path):
    out, _ = evaluated
    assert "add --overwrite" in refused("evaluate", f"trained={run}", "--out", out, *ASK, "--seed", "1")


def test_one_metric_alone_must_be_measured(run: Path, tmp_path: Path):
    line = refused("evaluate", run, "--out", tmp_path / "out", *ASK, "--metric", "niqe", "--no-base")
    assert "--metric niqe must be measured, and was not: NIQE needs images of at least 192" in line
    outcome = call("evaluate", run, "--out", tmp_path / "out", *ASK, "--metric", "contrast", "--no-base")
    assert outcome.code == 0
    assert "scene_attributes" not in outcome.out


def test_folders_of_images_need_no_model(tmp_path: Path):
    for name, greys in (("dark", [0, 20]), ("light", [200, 255])):
        folder(tmp_path / name, {"a large red circle on a grey background": greys, "a cat": greys}, size=(64, 64))
    outcome = call("evaluate", tmp_path / "dark", tmp_path / "light", "--out", tmp_path / "out", "--metric", "contrast")
    assert outcome.code == 0, outcome
    assert outcome.out.splitlines()[0].split() == ["dark", "light"]
    assert not (tmp_path / "out" / "images").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "evaluate needs what to compare, got nothing"),
        (("scenes",), "evaluate needs --out"),
        (("scenes", "--out", "x"), "add --prompts FILE"),
        (("nowhere", "--out", "x"), "a source is a run, a model, a LoRA or a folder of images, got 'nowhere'"),
        (("scenes", "--out", "x", "--weights", "nowhere"), "--weights must be a folder"),
        (("scenes", "--out", "x", "--reward", "beauty"), "reward.name"),
        (("scenes", "--out", "x", "--prompts", "nowhere"), "prompts are scenes:train"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused("evaluate", *arguments)


def test_prompts_of_drawn_images_and_folders_exclude_each_other(tmp_path: Path):
    folder(tmp_path / "dark", {"a cat": [0]})
    line = refused("evaluate", tmp_path / "dark", "--out", tmp_path / "out", "--prompts", "scenes:train")
    assert "--prompts is for what draws images" in line


def test_a_reward_that_asks_for_metadata_is_told_that_of_the_prompts_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "counting.py").write_text(
        "def score(images, prompts, metadata):\n    return [float(one['count']) for one in metadata]\n"
    )
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a red circle", "count": 2}, {"prompt": "a blue cross", "count": 4}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    ask = ("--prompts", prompts, "--num", "1", "--steps", "2", "--reward", "counting:score")
    outcome = call("evaluate", "scenes", "--out", tmp_path / "out", *ask, "--metric", "reward:counting:score")
    assert outcome.code == 0, outcome
    assert outcome.out.splitlines()[2].split()[:3] == ["counting:score", "up", "3.000"]


def test_a_run_that_held_out_a_share_is_judged_by_that_share(tmp_path: Path):
    lines = [json.dumps({"text": f"prompt {number}", "number": number}) for number in range(20)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    config = Config.load(None, [f"prompts.train={tmp_path / 'mine.jsonl'}", "prompts.column=text"])
    run: Any = SimpleNamespace(kind="run", config=config)
    texts, told, known = evaluate._prompts([run], None)
    assert texts == prompts.named(config.prompts)[1]
    assert len(texts) == 2
    assert told == f"the held-out share of {tmp_path / 'mine.jsonl'}"
    assert [known[text] for text in texts] == [{"number": int(text.removeprefix("prompt "))} for text in texts]
