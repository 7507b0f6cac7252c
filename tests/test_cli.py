"""The entry point: a mistake is one line on standard error with exit code 2, and costs no import of torch."""

import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from command_line import TINY, call, refused

from adascope_fast import cli


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train"], "train needs a configuration file first, got nothing"),
        (["train", "train.iterations=3"], "train needs a configuration file first, got 'train.iterations=3'"),
        (["train", "configs/no_such.toml"], "a configuration file must exist, got configs/no_such.toml"),
        (["train", "--resume", "no/such/run"], "--resume names the folder of a run (with config.toml)"),
        (["sample", "no/such/run", "--prompt", "a cat"], "a run's folder holds a config.toml, 'no/such/run' does not"),
        (["sample", "no/such/run"], "sample needs at least one --prompt, got none"),
        (["sample", "no/such/run", "--prompt", "  "], "a prompt has at least one character, --prompt is empty"),
        (["sample", "no/such/run", "--prompt", "x" * 10_000], "--prompt has 10000; shorten it"),
        (["push", "no/such/run", "me/shapes"], "a run's folder holds a config.toml, 'no/such/run' does not"),
        (["report", "no/such/run"], "a run's folder holds a config.toml, 'no/such/run' does not"),
        (["pretrain", "sceens"], "pretrain makes 'scenes', 'scenes-flow' or 'scenes-clip', got 'sceens'"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
):
    monkeypatch.chdir(tmp_path)
    assert line in refused(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_shows_where_it_was_raised_if_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ADASCOPE_FAST_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["adascope-fast", "train"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(ValueError, match="train needs a configuration file first"):
        cli.main()


@pytest.mark.slow
def test_a_mistake_is_one_line_of_a_real_process(tmp_path: Path):
    command = [sys.executable, "-m", "adascope_fast.cli", "train", TINY]
    command += [f"run.folder={tmp_path / 'run'}", "train.learning_rat=1"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert len(finished.stderr.splitlines()) == 1
    assert "did you mean train.learning_rate?" in finished.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["train", TINY, "train.learning_rat=1"], ["push", "none", "me/shapes"]],
)
def test_neither_help_nor_a_mistake_waits_for_torch(arguments: list[str]):
    program = (
        "import sys\nfrom adascope_fast import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    print('torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "False False"


def test_the_version_is_told():
    outcome = call("--version")
    assert (outcome.code, outcome.out) == (0, f"adascope-fast {version('adascope-fast')}\n")


@pytest.mark.parametrize(("name", "meant"), [("trian", "train"), ("pretain", "pretrain"), ("evalute", "evaluate")])
def test_a_mistyped_command_is_told_what_was_meant(name: str, meant: str):
    outcome = call(name)
    assert outcome.code == 2
    assert re.search(rf"No such command '{name}'. Did you mean .*'{meant}'", outcome.err)
