"""The comparison of the algorithms: all of it in small, what its table says, and which finished runs it takes."""

import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import call

from adascope_fast.config import Config
from adascope_fast.prompts import load

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def experiment() -> Any:
    spec = importlib.util.spec_from_file_location(
        "experiment_algorithms", CHECKOUT / "experiments" / "algorithms" / "algorithms.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(experiment: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script, with the commands that it starts in this process; the exit code, and what was trained."""
    monkeypatch.chdir(CHECKOUT)
    started: list[str] = []

    def inside(command: Sequence[str], log: Path, *, threads: int = 1) -> None:
        started.append(log.stem)
        outcome = call(*command[3:])
        assert outcome.code == 0, outcome

    monkeypatch.setattr(experiment.runs, "call", inside)

    def script(*arguments: str) -> tuple[Any, list[str]]:
        started.clear()
        asked = ["--work", tmp_path / "work", "--out", tmp_path / "out.json", *arguments]
        monkeypatch.setattr(sys, "argv", ["algorithms.py", *map(str, asked)])
        with pytest.raises(SystemExit) as stopped:
            experiment.main()
        return stopped.value.code, list(started)

    return script


def test_two_algorithms_are_tuned_trained_and_shown_once(experiment: Any, run: Any, tmp_path: Path):
    asked = ["--quick", "--algorithms", "reinforce", "awm", "--seeds", "3"]
    names = ["reinforce-tune-0.003", "reinforce-tune-0.01", "awm-tune-0.003", "awm-tune-0.01"]
    names += ["reinforce-original-3", "reinforce-adascope-3", "awm-original-3", "awm-adascope-3"]
    assert run(*asked) == (0, names)
    values = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["algorithm"], row["arm"]): row for row in values["rows"]}
    assert list(rows) == [(name, arm) for name in ("reinforce", "awm") for arm in ("original", "adascope")]
    for (name, _), row in rows.items():
        tuned = {one["learning_rate"]: one["after"] for one in values["tuning"] if one["algorithm"] == name}
        assert row["learning_rate"] == max(tuned, key=lambda rate: tuned[rate])
        assert row["gain"]["mean"] == pytest.approx(row["after"] - row["before"])
        assert row["forwards_sampled"] == 2 * 2 * 6, "iterations, images, steps"
    assert rows["reinforce", "original"]["rows_trained"] == 2 * 2 * 6
    assert rows["reinforce", "adascope"]["rows_trained"] < 2 * 2 * 6
    assert rows["awm", "original"]["fraction_trained"] <= 1
    table = (tmp_path / "out.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| `reinforce`", "every_step"], ["| `reinforce`", "**AdaScope**"],
        ["| `awm`", "every_step"], ["| `awm`", "**AdaScope**"],
    ]  # fmt: skip
    assert all(" | one seed | " in line for line in lines)
    assert "adascope-fast train experiments/algorithms/scenes.toml run.folder=runs/algorithms/reinforce-ori" in table

    assert run(*asked) == (0, []), "what is finished is not repeated"
    code, started = run(*asked[1:])
    assert started == []
    assert str(code).startswith("error: a finished run is taken as it is only if its settings are those asked for")
    assert "sampler.num_steps = 6 (asked for: 10)" in str(code)


def test_a_rate_of_ones_own_has_runs_of_its_own(experiment: Any, run: Any, tmp_path: Path):
    asked = ["--quick", "--algorithms", "reinforce", "--arms", "adascope", "--seeds", "3", "--stages", "run"]
    assert run(*asked, "--rate", "2e-3") == (0, ["reinforce-adascope-3-0.002"])
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["learning_rate"] == 0.002
    assert "train.learning_rate=0.002" in row["seeds"][0]["command"]


def test_runs_need_a_tuned_rate(run: Any):
    code, started = run("--quick", "--algorithms", "ddpo", "--stages", "run")
    assert started == []
    assert str(code).startswith("error: runs take the learning rate that was tuned, and ddpo has none in ")


def test_a_run_that_fails_is_told_and_the_others_go_on(
    experiment: Any, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def fails(command: Sequence[str], log: Path, *, threads: int = 1) -> None:
        raise experiment.runs.RunFailedError(f"exit code 2: {log.stem}")

    monkeypatch.setattr(experiment.runs, "call", fails)
    code, _ = run("--quick", "--algorithms", "ddpo")
    assert code == 1
    assert capsys.readouterr().err.splitlines() == [
        f"ddpo-tune-{rate}: exit code 2: ddpo-tune-{rate}" for rate in ("0.003", "0.01")
    ]


def test_a_command_that_fails_says_its_last_line(experiment: Any, tmp_path: Path):
    log = tmp_path / "run.log"
    command = [sys.executable, "-c", "print('first'); raise SystemExit('the reason')"]
    with pytest.raises(experiment.runs.RunFailedError, match=r"^exit code 1, see .*run\.log: the reason$"):
        experiment.runs.call(command, log)
    assert log.read_text() == "first\nthe reason\n"


def test_captions_that_tune_are_neither_trained_on_nor_reported(experiment: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(CHECKOUT)
    tuning = load(experiment.TUNING_CAPTIONS)
    assert len(set(tuning)) == len(tuning) == experiment.NUM_TUNING_CAPTIONS
    for entry in experiment.ALGORITHMS.values():
        tuned, reported = (
            Config.load(case.config, case.settings(Path("runs"), is_quick=False))
            for case in (
                experiment.Case(entry, "original", 9, 1e-3, is_tuning=True),
                experiment.Case(entry, "original", 0, 1e-3),
            )
        )
        assert load(tuned.prompts.held_out)[: tuned.evaluation.num_prompts] == tuning
        assert not set(tuning) & set(load(reported.prompts.held_out)[: reported.evaluation.num_prompts])
        assert not set(tuning) & set(load(reported.prompts.train))


def test_arms_differ_in_the_steps_alone_and_the_tuning_is_shorter(experiment: Any):
    for entry in experiment.ALGORITHMS.values():
        settings = {
            arm: experiment.Case(entry, arm, 0, 1e-3).settings(Path("runs"), is_quick=False) for arm in experiment.ARMS
        }
        original, adascope = (
            [item for item in settings[arm] if not item.startswith(("selector.", "sensing.", "run.folder="))]
            for arm in experiment.ARMS
        )
        assert original == adascope
        assert "selector.name=adascope" in settings["adascope"]
        assert "selector.name=adascope" not in settings["original"]
        tuning = experiment.Case(entry, "original", 9, 1e-3, is_tuning=True)
        shorter, whole = (
            Config.load(tuning.config, case.settings(Path("runs"), is_quick=False))
            for case in (tuning, experiment.Case(entry, "original", 0, 1e-3))
        )
        assert 2 * shorter.train.iterations == whole.train.iterations


def test_a_gain_is_beyond_noise_where_seeds_and_captions_agree(experiment: Any):
    """By hand: over seeds 12.7062 (Student's, one degree) x 0.1 / 2; over captions 1.96 x 0.2 sqrt(2) / sqrt(2)."""
    found = experiment.gain_of([[0.9, 1.3], [1.0, 1.4]])
    reach = math.hypot(12.7062 * 0.05, 1.959964 * 0.2)
    assert found == pytest.approx(
        {"mean": 1.15, "low": 1.15 - reach, "high": 1.15 + reach, "is_beyond_noise": True}, rel=1e-5
    )
    assert experiment.gain_of([[0.1, 0.5], [0.2, 0.6]])["is_beyond_noise"] is False
    assert experiment.gain_of([[-0.9, -1.3], [-1.0, -1.4]])["is_beyond_noise"] is True
    assert experiment.gain_of([[0.5, 0.6]]) == {"mean": 0.55, "low": None, "high": None, "is_beyond_noise": None}
