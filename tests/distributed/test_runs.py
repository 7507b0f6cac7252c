"""The same iterations on 1, 2 and 4 processes: samples, intervals and advantages bit for bit, gradients to 1e-5.

The processes are real ones (gloo), with the model whole on each, or in parts by FSDP2.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rank_cases import RUNS, TOYS

TESTS = Path(__file__).parents[1]
QUICK = ["scenes", "scenes-flow", "judged sets", *TOYS]
"""Those that are run on two processes in every test run; the others on two and four in the long one."""
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def _launched(folder: Path, size: int, cases: list[str], **environment: str) -> dict[str, list[dict[str, Any]]]:
    """What each rank has found, by case."""
    command = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        if size > 1
        else []
    )
    command = [*(command or [sys.executable]), str(TESTS / "rank_cases.py"), str(folder), *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {case: [json.loads((folder / f"{case}.{rank}.json").read_text()) for rank in range(size)] for case in cases}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found = _launched(tmp_path_factory.mktemp("alone"), 1, QUICK)
    return {case: one for case, (one,) in found.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return _launched(tmp_path_factory.mktemp("two"), 2, QUICK)


def _assert_same(want: dict[str, Any], got: list[dict[str, Any]], *, tolerance: float) -> None:
    for one in got:
        assert one["digest"] == got[0]["digest"], "every rank has the same weights"
        for number, (before, after) in enumerate(zip(want["iterations"], one["iterations"], strict=True)):
            if number:  # the weights differ by rounding, and so do means over images
                before, after = (part | {"selector": dict(part["selector"])} for part in (before, after))
                for name, curve in before["selector"].pop("curves", {}).items():
                    assert after["selector"]["curves"][name] == pytest.approx(curve, abs=3e-6), name
                after["selector"].pop("curves", None)
            for name in ("rewards", "advantages", "selector", "pairs_trained", "samples_dropped", "forwards_sampled"):
                assert after[name] == before[name], name
            for name in ("loss", "ratio"):
                assert after[name] == pytest.approx(before[name], rel=1e-3 if number else 1e-4, abs=1e-6), name
        for number, (before, after) in enumerate(zip(want["gradients"], one["gradients"], strict=True)):
            norm, apart = math.hypot(*before), math.dist(before, after)
            assert norm > 0
            reach = tolerance if number == 0 else 100 * tolerance  # the weights differ from the first update on
            assert apart <= reach * norm
        # Adam's first steps divide a gradient by itself, so that its rounding shows in weights where it is nothing.
        assert one["weights"] == pytest.approx(want["weights"], rel=1e-3, abs=3e-5)


@pytest.mark.parametrize("case", TOYS)
def test_an_algorithm_learns_the_same_on_two_processes(alone: Any, two: Any, case: str) -> None:
    _assert_same(alone[case], two[case], tolerance=1e-13)


def test_graphs_are_replayed_on_every_process(alone: Any, two: Any) -> None:
    assert all(one["is_replayed"] for one in (alone["graphs"], *two["graphs"]))


@pytest.mark.parametrize("case", [case for case in QUICK if case in RUNS])
def test_a_run_is_the_same_on_two_processes(alone: Any, two: Any, case: str) -> None:
    _assert_same(alone[case], two[case], tolerance=1e-5)
    assert two[case][0]["sharing"] == "each process has the whole model"


def test_pairs_are_dealt_out_evenly_and_what_it_cost_is_told(two: Any) -> None:
    for case in ("dpok", "NaN", "whole samples"):
        told = [iteration["imbalance"] for iteration in two[case][0]["iterations"]]
        assert max(told) > 0, "so rows had to move"
    for iteration in two["scenes"][0]["iterations"]:
        assert len(iteration["ranks"]) == 2
        for rank in iteration["ranks"]:
            assert rank["bytes_sent"] > 0
            assert rank["exchange_seconds"] > 0
            assert set(rank["seconds"]) == {"rollout", "reward", "sensing", "update"}
    assert two["scenes"][1]["iterations"] == two["scenes"][0]["iterations"], "every rank tells the same"


def test_a_model_in_parts_learns_the_same(alone: Any, tmp_path: Path) -> None:
    cases = ["scenes", "scenes-flow"]
    for case, found in _launched(tmp_path, 2, cases, **FSDP).items():
        _assert_same(alone[case], found, tolerance=1e-5)
        assert found[0]["sharing"].startswith("FSDP2: each process has a share of")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("environment", [{}, FSDP], ids=["whole", "fsdp2"])
def test_every_case_is_the_same_on_two_and_four_processes(tmp_path: Path, size: int, environment: dict) -> None:
    cases = [*RUNS, *([] if environment else TOYS)]
    want = _launched(tmp_path / "alone", 1, cases)
    for case, found in _launched(tmp_path / "several", size, cases, **environment).items():
        _assert_same(want[case][0], found, tolerance=1e-13 if case in TOYS else 1e-5)
