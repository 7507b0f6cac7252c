"""What is told of a run's progress, in a terminal and where there is none, and what is kept back."""

import re
import subprocess
import sys
from typing import Any

import pytest

from adascope_fast.training.monitoring import progress
from adascope_fast.training.monitoring.progress import Progress

RECORD = {"selector": {"mean_start": 1.0, "mean_end": 3.5}, "reward_mean": 0.25, "fraction_trained": 0.5}


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line at each step."""
    monkeypatch.setattr(progress, "PAUSE_S", 0.0)


def _lines(captured: Any) -> list[str]:
    assert captured.out == ""
    return [re.sub(r", \d+:\d+, (\?|\d+:\d+) left", "", line) for line in captured.err.splitlines()]


def test_a_stage_is_a_line_where_it_begins_and_one_where_it_ends(capsys: pytest.CaptureFixture[str]):
    with Progress().stage("evaluation", 30) as on_step:
        for _ in range(10):
            on_step(3)
    assert _lines(capsys.readouterr()) == ["evaluation: 0/30 step", "evaluation: 30/30 step"]


@pytest.mark.usefixtures("instant")
def test_a_long_stage_is_a_line_every_so_often(capsys: pytest.CaptureFixture[str]):
    with Progress().stage("evaluation", 3, "image") as on_step:
        for _ in range(3):
            on_step(1)
    assert _lines(capsys.readouterr()) == [f"evaluation: {count}/3 image" for count in range(4)]


def test_what_cannot_be_counted_is_named_once(capsys: pytest.CaptureFixture[str]):
    with Progress().stage("loading torch and diffusers"):
        pass
    with Progress().loading("scenes") as told:
        told("unet")
        told("unet")
        told("vae")
    expected = ["loading torch and diffusers", "loading scenes", "loading scenes: unet", "loading scenes: vae"]
    assert _lines(capsys.readouterr()) == expected


def test_an_iteration_has_no_lines_of_its_quick_parts(capsys: pytest.CaptureFixture[str]):
    shown = Progress()
    shown.start(4, 6)
    for _ in range(2):
        for name in ("rollout", "update"):
            for done in range(1, 4):
                shown.part(name, done, 3)
        shown.done(RECORD, {"dropped": "2"})
    shown.say("a hint")
    shown.close()
    last = "training: 6/6 it, reward=0.250, trained=50%, interval=[1.0, 3.5), dropped=2"
    assert _lines(capsys.readouterr()) == ["training: 4/6 it", "a hint", last]


@pytest.mark.usefixtures("instant")
def test_a_slow_part_of_an_iteration_has_lines(capsys: pytest.CaptureFixture[str]):
    shown = Progress()
    for done in range(1, 4):
        shown.part("rollout", done, 3)
    shown.part("update", 1, 2)
    shown.close()
    rollout = [f"rollout: {count}/3 step" for count in range(4)]
    assert _lines(capsys.readouterr()) == [*rollout, "update: 0/2 step", "update: 1/2 step"]


def test_quiet_says_nothing_of_its_progress(capsys: pytest.CaptureFixture[str]):
    shown = Progress(quiet=True)
    with shown.loading("scenes") as told:
        told("unet")
    with shown.stage("evaluation", 2) as on_step:
        on_step(2)
    shown.start(0, 1)
    shown.part("rollout", 1, 1)
    shown.done(RECORD)
    shown.close()
    assert capsys.readouterr() == ("", "")


def test_in_a_terminal_it_is_a_bar_that_is_taken_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress().stage("evaluation", 2) as on_step:
        on_step(2)
    written = capsys.readouterr().err
    assert "\n" not in written
    assert written.count("\r") > 1
    assert written.rsplit("\r", 2)[1].strip() == ""
    assert "evaluation:   0%|" in written


def test_it_is_read_without_torch():
    program = "import sys, adascope_fast.training.monitoring.progress\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
