"""The benchmark of drift: that it compares with what the rollout recorded, and how it shows nothing."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from adascope_fast.rollout import trajectory

SMALL = ["sampler.num_steps=3", "train.samples_per_prompt=1", "train.rollout_batch=4", "train.microbatch=4"]


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """`drift`, with the folder it is started from in the path."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
    yield import_module("drift")
    sys.path.remove(str(Path(__file__).parents[2] / "bench"))


def test_a_drift_of_recorded_log_probs_is_found(bench: Any, monkeypatch: pytest.MonkeyPatch):
    row = bench.measure("scenes", SMALL, device="cpu")
    assert row["pairs"] == 4 * 3
    assert row["largest_log_prob_drift"] < 1e-5
    gather = trajectory.Trajectory.gather

    def drifted(self: Any, pairs: Tensor) -> Any:
        batch = gather(self, pairs)
        return replace(batch, old_log_prob=batch.old_log_prob - 1e-2 * (batch.step_index == 1))

    monkeypatch.setattr(trajectory.Trajectory, "gather", drifted)
    row = bench.measure("scenes", SMALL, device="cpu")
    assert row["largest_log_prob_drift"] == pytest.approx(1e-2, rel=1e-3)
    assert row["mean_log_prob_drift"] == pytest.approx(1e-2 / 3, rel=1e-3)
    assert row["largest_ratio_deviation"] == pytest.approx(1.00502e-2, rel=1e-3), "exp(0.01) - 1"
    assert row["share_beyond_1e-4"] == pytest.approx(1 / 3)


def test_the_table_shows_zeros_and_what_was_not_measured(bench: Any):
    row = {"model": "scenes", "dtype": "float32", "changed": "alike"}
    values = {"largest_ratio_deviation": 0.0, "largest_log_prob_drift": 1.2e-7, "share_beyond_1e-4": 0.25}
    lines = bench.markdown([row | values, row | {"note": "not measured: the time was over"}]).splitlines()[2:]
    assert lines == [
        "| scenes | float32 | alike | 0 | 1.2e-07 | 25% |",
        "| scenes | float32 | alike | not measured: the time was over | | |",
    ]
