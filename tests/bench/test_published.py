"""The benchmark of published models: what it reports of an iteration, and when it calls a goal met."""

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from adascope_fast.backbones import ASSETS
from adascope_fast.config import Config
from adascope_fast.planning.plan import GIB, plan

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """`published`, with the folder it is started from in the path."""
    sys.path.insert(0, str(BENCH))
    yield import_module("published")
    sys.path.remove(str(BENCH))


@pytest.mark.parametrize("name", ["scenes", "scenes-flow"])
def test_an_iteration_of_a_model_with_random_weights(bench: Any, name: str):
    smaller = ["sampler.num_steps=4", "train.samples_per_prompt=2", "train.rollout_batch=4", "train.microbatch=2"]
    algorithm = ["algorithm.name=grpo"] if name == "scenes-flow" else ["sampler.guidance_scale=2.0"]
    row = bench.measure(ASSETS / name, [*smaller, *algorithm], device="cpu")
    json.dumps(row)
    assert set(row["seconds"]) >= {"rollout", "reward", "sensing", "update", "all"}
    assert row["seconds"]["all"] >= row["seconds"]["update"] > 0
    assert row["grad_norm"] > 0
    assert 0 < row["fraction_trained"] <= 1
    assert (row["microbatch"], row["microbatch_used"]) == (2, 2)
    assert row["planned_gib_by_part"]["update"] > 0
    assert row["deviation"] is None, "there is no peak without a GPU"
    assert [goal["met"] for goal in bench.goals(name, row)] == [None, None]


def test_goals_are_met_by_what_was_measured(bench: Any):
    planned, peaks = (
        plan(Config.load(None, ["train.microbatch=8", "train.rollout_batch=1", "acceleration.fold_adapter=off"])),
        bench.Peaks(),
    )
    update = planned.update_bytes[8] / GIB
    peaks.gib, peaks.seconds = {"rollout": update / 2, "update": update * 1.05}, {"rollout": 1.0, "update": 2.0}
    values = {"fraction_trained": 0.5, "grad_norm": 1.0, "microbatch": 8}
    row = bench.summary(planned, peaks, values)
    assert row["deviation"] == pytest.approx(1 / 1.05 - 1, abs=1e-4)
    assert row["seconds"]["all"] == 3.0
    assert [goal["met"] for goal in bench.goals("sd15", row)] == [True, True, True]
    peaks.gib["update"] = 30.0
    row = bench.summary(planned, peaks, values | {"grad_norm": 0.0})
    assert [goal["met"] for goal in bench.goals("sd15", row)] == [False, False, False]
    assert [goal["met"] for goal in bench.goals("sdxl", row)] == [False, True, False]
    assert [goal["met"] for goal in bench.goals("sdxl", {"note": "out of memory"})] == [None, None, None]


@pytest.mark.slow
def test_the_configurations_of_the_benchmark_are_planned_below_its_goals(bench: Any):
    for name, most in bench.MOST_GIB.items():
        config = Config.load(None, [*bench.SHARED, *bench.MODELS[name], f"model.name={bench.FOLDER / name}"])
        planned = plan(config)
        assert max(planned.update_bytes[8], planned.rollout_bytes, planned.decode_bytes) / GIB < most
