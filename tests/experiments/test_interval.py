"""The comparison of AdaScope with its controls: what it reads of a run, and how it sums it up."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Any:
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("adascope_bench", BENCH / "adascope.py")
        assert spec is not None
        assert spec.loader is not None
        module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))
    return module


def _run(folder: Path, *, after: float, start: float) -> Path:
    folder.mkdir(parents=True)
    curves = {"preference": [0.1, 0.5, None], "volatility": [0.3, 0.1]}
    records = [
        {
            "pairs_trained": 10 * (number + 1), "cpu_seconds": 2.0, "fraction_trained": 0.5, "reward_mean": 0.1,
            "seconds": {"rollout": 2.0, "update": 1.5},
            "selector": {"mean_start": start + number - 1, "mean_end": start + 4, "curves": curves}
            | {"reasons": {"ok": 2}},
        }
        for number in range(3)
    ]  # fmt: skip
    (folder / "stats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    history = [{"iteration": 0, "mean": 0.5}, {"iteration": 2, "mean": 0.6}, {"iteration": 3, "mean": after}]
    sides = {"before": {"diversity": 0.4, "contrast": 0.2}, "after": {"diversity": 0.3, "contrast": 0.1}}
    evaluation = {"history": history, "difference": {"mean": after - 0.5, "low": 0.0, "high": 1.0}, **sides}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "run.json").write_text(json.dumps({"seconds_total": 12.5, "peak_memory_mb": 900}))
    return folder


def test_points_add_up_pairs_and_seconds_until_each_evaluation(bench: Any, tmp_path: Path):
    found = bench.read(_run(tmp_path / "run", after=0.7, start=2.0))
    assert [(p["iteration"], p["pairs"], p["cpu_seconds"]) for p in found["points"]] == [
        (0, 0, 0), (2, 30, 4.0), (3, 60, 6.0)
    ]  # fmt: skip
    assert found["interval"] == [2.0, 6.0]
    assert found["interval_by_thirds"] == [[1.0, 6.0], [2.0, 6.0], [3.0, 6.0]]
    assert found["seconds"] == {"rollout": 6.0, "update": 4.5}
    assert (found["seconds_total"], found["peak_memory_mb"]) == (12.5, 900)
    assert found["diversity"] == [0.4, 0.3]
    assert found["reasons"] == {"ok": 6}


def test_the_summary_is_over_seeds_and_the_plot_is_drawn(bench: Any, tmp_path: Path):
    rows = [
        {"reward": "r", "seed": seed, "arms": {"adascope": bench.read(_run(tmp_path / str(seed), after=a, start=s))}}
        for seed, (a, s) in enumerate([(0.7, 2.0), (0.9, 3.0)])
    ]
    summary = bench.summarise(rows)
    gain = {"mean": 0.3, "std": 0.02**0.5, "low": 0.2, "high": 0.4}
    assert summary["arms"]["adascope"]["gain"] == pytest.approx(gain)
    assert summary["start"]["mean"] == 2.5
    assert summary["end"]["low"] == 6.0
    assert (
        "| r | adascope | +0.300 (+0.200 to +0.400) | 0.000 | 60 | 6 | 0.400 to 0.300 | 0.200 to 0.100 |"
        in bench.table({"r": summary})
    )
    bench.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_a_run_that_swung_back_has_fallen_from_its_best(bench: Any, tmp_path: Path):
    run = bench.read(_run(tmp_path / "run", after=0.45, start=2.0))
    summary = bench.summarise([{"reward": "r", "seed": 0, "arms": {"adascope": run}}])
    assert summary["arms"]["adascope"]["fall"]["high"] == pytest.approx(0.15)  # from 0.6, not from the start


def test_arms_and_variants_differ_in_what_they_say_they_do(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, list[str]] = {}

    def run(folder: Path, reward: str, seed: int, overrides: list[str], chosen: Any) -> dict[str, Any]:
        asked[folder.name] = overrides
        return {"fraction_trained": 0.45}

    monkeypatch.setattr(bench, "run", run)
    chosen = argparse.Namespace(
        arms=["adascope", "random_fraction", "late_steps"],
        variant=[["slow", "train.learning_rate=1e-3"]],
        work=tmp_path,
        config=BENCH.parent / "configs" / "compressibility_flow.toml",
        set=["sampler.num_steps=40"],
    )
    bench.run_arms("r", 0, chosen)
    assert asked == {
        "r-0-adascope": ["selector.name=adascope"],
        "r-0-random_fraction": ["selector.name=random_fraction", "selector.fraction=0.4500"],
        "r-0-late_steps": ["selector.name=static_range", "selector.start=26", "selector.end=38"],
        "r-0-slow": ["selector.name=adascope", "train.learning_rate=1e-3"],
    }
