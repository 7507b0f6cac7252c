"""The comparison of AdaScope with its controls: what it reads of a run, when it takes one, and how it sums it up."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adascope_fast.config import Config
from adascope_fast.reporting import save_grid
from adascope_fast.reporting.images import GAP

CHECKOUT = Path(__file__).parents[2]
INTERVAL = CHECKOUT / "experiments" / "interval"
CONFIG = CHECKOUT / "configs" / "tiny.toml"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", INTERVAL / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def experiment() -> Any:
    return _load("interval")


MACHINE = {"commit": "abc", "device": "a CPU", "versions": {"torch": "2"}}


def _run(folder: Path, *, after: float, start: float) -> Path:
    folder.mkdir(parents=True)
    curves = {"preference": [0.1, 0.5, None], "volatility": [0.3, 0.1]}
    records = [
        {
            "pairs_trained": 10 * (number + 1), "cpu_seconds": 2.0, "fraction_trained": 0.5, "reward_mean": 0.1,
            "seconds": {"rollout": 2.0, "update": 1.5},
            "selector": {"mean_start": start + number - 1, "mean_end": start + 4, "curves": curves}
            | {"reasons": {"ok": 2}, "fraction": 0.5 + 0.1 * number},
        }
        for number in range(3)
    ]  # fmt: skip
    (folder / "stats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    history = [{"iteration": 0, "mean": 0.5}, {"iteration": 2, "mean": 0.6}, {"iteration": 3, "mean": after}]
    sides = {"before": {"diversity": 0.4, "contrast": 0.2}, "after": {"diversity": 0.3, "contrast": 0.1}}
    evaluation = {"history": history, "difference": {"mean": after - 0.5, "low": 0.0, "high": 1.0}, **sides}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "run.json").write_text(json.dumps({"seconds_total": 12.5, "peak_memory_mb": 900, **MACHINE}))
    return folder


def test_points_add_up_pairs_and_seconds_until_each_evaluation(experiment: Any, tmp_path: Path):
    found = experiment.read(_run(tmp_path / "run", after=0.7, start=2.0))
    assert [(p["iteration"], p["pairs"], p["cpu_seconds"]) for p in found["points"]] == [
        (0, 0, 0), (2, 30, 4.0), (3, 60, 6.0)
    ]  # fmt: skip
    assert found["interval"] == [2.0, 6.0]
    assert found["interval_by_thirds"] == [[1.0, 6.0], [2.0, 6.0], [3.0, 6.0]]
    assert found["seconds"] == {"rollout": 6.0, "update": 4.5}
    assert (found["seconds_total"], found["peak_memory_mb"]) == (12.5, 900)
    assert found["diversity"] == [0.4, 0.3]
    assert found["reasons"] == {"ok": 6}
    assert (found["fraction_trained"], found["fraction_chosen"]) == (0.5, pytest.approx(0.6))


def test_the_summary_is_over_seeds_and_the_plot_is_drawn(
    experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = [
        {
            "reward": "r",
            "seed": seed,
            "arms": {"adascope": experiment.read(_run(tmp_path / str(seed), after=a, start=s))},
        }
        for seed, (a, s) in enumerate([(0.7, 2.0), (0.9, 3.0)])
    ]
    summary = experiment.summarise(rows)
    gain = {"mean": 0.3, "std": 0.02**0.5, "low": 0.2, "high": 0.4}
    assert summary["arms"]["adascope"]["gain"] == pytest.approx(gain)
    assert summary["start"]["mean"] == 2.5
    assert summary["end"]["low"] == 6.0
    assert (
        "| r | adascope | +0.300 (+0.200 to +0.400) | 0.000 | 60 | 6 | 0.400 to 0.300 | 0.200 to 0.100 |"
        in experiment.table({"r": summary})
    )
    experiment.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    with Image.open(tmp_path / "plot.png") as image:
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 0), "nothing is behind it"
    (tmp_path / "again.json").write_text(json.dumps({"runs": rows}))
    monkeypatch.setattr(sys, "argv", ["interval.py", "--redraw", str(tmp_path / "again.json")])
    experiment.main()
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "plot.png").read_bytes()


def test_a_run_that_swung_back_has_fallen_from_its_best(experiment: Any, tmp_path: Path):
    run = experiment.read(_run(tmp_path / "run", after=0.45, start=2.0))
    summary = experiment.summarise([{"reward": "r", "seed": 0, "arms": {"adascope": run}}])
    assert summary["arms"]["adascope"]["fall"]["high"] == pytest.approx(0.15)  # from 0.6, not from the start


def test_arms_and_variants_differ_in_what_they_say_they_do(
    experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: dict[str, list[str]] = {}

    def run(folder: Path, reward: str, seed: int, overrides: list[str], chosen: Any) -> dict[str, Any]:
        asked[folder.name] = overrides
        return {"fraction_trained": 0.3, "fraction_chosen": 0.45}

    monkeypatch.setattr(experiment, "run", run)
    chosen = argparse.Namespace(
        arms=["adascope", "random_fraction", "late_steps"],
        variant=[["slow", "train.learning_rate=1e-3"]],
        work=tmp_path,
        config=CHECKOUT / "configs" / "compressibility_flow.toml",
        set=["sampler.num_steps=40"],
    )
    experiment.run_arms("r", 0, chosen)
    assert asked == {
        "r-0-adascope": ["selector.name=adascope"],
        "r-0-random_fraction": ["selector.name=random_fraction", "selector.fraction=0.4500"],
        "r-0-late_steps": ["selector.name=static_range", "selector.start=26", "selector.end=38"],
        "r-0-slow": ["selector.name=adascope", "train.learning_rate=1e-3"],
    }


def _chosen(work: Path, *settings: str, **changes: Any) -> argparse.Namespace:
    values = {"arms": ["every_step"], "variant": [], "work": work, "config": CONFIG, "set": list(settings), "every": 2}
    return argparse.Namespace(**values | {"iterations": 3, "threads": 1} | changes)


def _finished(experiment: Any, chosen: argparse.Namespace) -> Path:
    """The folder of the run that `chosen` asks for, as if it had been trained."""
    folder = _run(chosen.work / experiment.run_name("jpeg_compressibility", 0, "every_step"), after=0.7, start=2.0)
    overrides = experiment.overrides_of("every_step", chosen)
    settings = experiment.settings_of(folder, "jpeg_compressibility", 0, overrides, chosen)
    (folder / "config.toml").write_text(Config.load(CONFIG, settings).to_toml())
    (folder / "report.html").write_text("")
    return folder


def test_a_finished_run_is_taken_only_with_the_settings_asked_for(experiment: Any, tmp_path: Path):
    chosen = _chosen(tmp_path, "sampler.num_steps=4")
    folder = _finished(experiment, chosen)
    cases = [("jpeg_compressibility", 0)]
    experiment.check_found(cases, chosen)
    experiment.check_found(cases, _chosen(tmp_path, "sampler.num_steps=4", arms=["adascope", "random_fraction"]))
    taken = experiment.run_arms("jpeg_compressibility", 0, chosen)
    assert taken["arms"]["every_step"]["points"][-1]["pairs"] == 60
    moved = folder.parent.rename(tmp_path.parent / f"{tmp_path.name}-moved")
    experiment.check_found(cases, _chosen(moved, "sampler.num_steps=4"))  # its place is no setting
    for other, line in (
        (_chosen(moved, "sampler.num_steps=5"), r"has sampler.num_steps = 4 \(asked for: 5\); remove it, or give"),
        (_chosen(moved, "sampler.num_steps=4", iterations=9), r"train.iterations = 3 \(asked for: 9\)"),
        (_chosen(moved, iterations=9), r"sampler.num_steps = 4 \(asked for: \d+\), train.iterations = 3"),
    ):
        with pytest.raises(ValueError, match=line) as refused:
            experiment.check_found(cases, other)
        assert "\n" not in str(refused.value)
        with pytest.raises(ValueError, match=line):
            experiment.run_arms("jpeg_compressibility", 0, other)


def test_a_refusal_is_one_line_before_anything_is_trained(
    experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _finished(experiment, _chosen(tmp_path))
    asked = ["--config", CONFIG, "--rewards", "jpeg_compressibility", "--seeds", "0", "1", "--arms", "every_step"]
    asked += ["--every", "2", "--work", tmp_path, "--out", tmp_path / "out.json"]
    monkeypatch.setattr(experiment.runs.subprocess, "run", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(sys, "argv", ["interval.py", *map(str, asked)])
    with pytest.raises(SystemExit) as stopped:
        experiment.main()
    assert str(stopped.value.code).startswith("error: a finished run is taken as it is only if its settings are")
    assert "train.iterations = 3 (asked for: 12)" in str(stopped.value.code)
    assert not (tmp_path / "out.json").exists()


def test_the_file_says_where_its_runs_were_made(experiment: Any, tmp_path: Path):
    folders = [_run(tmp_path / str(number), after=0.7, start=2.0) for number in range(2)]
    assert experiment.runs.provenance(folders) == {"commit": "abc", "machine": "a CPU", "versions": {"torch": "2"}}
    (folders[1] / "run.json").write_text(json.dumps(MACHINE | {"commit": "def"}))
    assert experiment.runs.provenance(folders)["commit"] == ["abc", "def"]


def test_pictures_before_and_after_are_side_by_side(tmp_path: Path):
    run = tmp_path / "run"
    for name, level in (("before", 0.25), ("after", 0.75)):
        save_grid(np.full((6, 3, 8, 8), level), 2, run / "samples" / f"{name}.png")
    grid = {"prompts": ["a", "b", "c"], "columns": 2, "tile": 8, "gap": GAP}
    (run / "samples" / "grid.json").write_text(json.dumps(grid))
    (run / "stats.jsonl").write_text("{}\n{}\n")
    script = _load("before_after")
    sheet = script.before_after(run, num_prompts=2)
    width = 2 * (8 + GAP + 8)
    assert sheet.size == (2 * (10 + width) + 24, 34 + 2 * (8 * 2 + 26))
    for top in (34, 34 + 8 * 2 + 26):
        for left, level in ((10, 64), (10 + width + 24, 191)):
            for picture in (left, left + 2 * (8 + GAP)):  # enlarged with the gap, so its inside alone is even
                inside = np.asarray(sheet)[top + 4 : top + 12, picture + 4 : picture + 12]
                assert inside.tolist() == np.full((8, 8, 3), level).tolist()
