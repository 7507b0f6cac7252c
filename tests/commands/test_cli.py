"""The command line: what it prints, what it refuses in one line with exit code 2, and what it leaves untouched."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image

from adascope_fast import cli
from adascope_fast.config import Config
from adascope_fast.training.trainer import Result

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.toml")
SMALLEST = ["sampler.num_steps=4", "train.prompts_per_iteration=1", "evaluation.num_prompts=1"]
REWARDS = """
import torch

def redness(images, prompts):
    return images[:, 0].mean((1, 2))

def wrong_shape(images, prompts):
    return images

def not_a_number(images, prompts):
    return torch.full((len(prompts),), float("nan"))

def ctrl_c_in_the_second_iteration(images, prompts, calls=[]):
    calls.append(1)
    if len(calls) == 3:
        raise KeyboardInterrupt
    return redness(images, prompts)
"""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def _call(*arguments: str | Path) -> Outcome:
    """`adascope-fast ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["adascope-fast", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        cli.main()
    assert isinstance(stopped.value.code, int)
    return Outcome(stopped.value.code, out.getvalue(), err.getvalue())


def _refused(*arguments: str | Path) -> str:
    """The one line on standard error with which `arguments` are refused."""
    outcome = _call(*arguments)
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    return line


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _restore_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def reward_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder with rewards that behave and rewards that do not."""
    name = f"rewards_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(".")  # restores sys.path afterwards
    monkeypatch.chdir(tmp_path)
    return name


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run, made by the command."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    outcome = _call("train", TINY, *SMALLEST, f"run.folder={folder}")
    assert outcome.code == 0, outcome
    (folder / "printed.txt").write_text(outcome.out)
    return folder


def test_train_ends_with_what_was_gained_trained_and_spent_and_where_to_read_it(run: Path):
    gained, trained, seconds, report = (run / "printed.txt").read_text().splitlines()[-4:]
    evaluation = json.loads((run / "evaluation.json").read_text())
    before, after = evaluation["before"]["mean"], evaluation["after"]["mean"]
    assert gained.startswith(f"held-out scene_attributes: {before:.3f} -> {after:.3f} (")
    assert "no interval from one prompt" in gained
    assert trained.startswith("steps trained: ")
    assert all(part in seconds for part in ("rollout ", "reward ", "sensing ", "update "))
    assert report == f"report: {run / 'report.html'}"
    assert (run / "report.html").is_file()


def test_one_prompt_has_no_interval(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    before = {"mean": 0.5, "low": math.nan, "high": math.nan, "num_images": 4}
    gain = {"mean": 0.25, "low": math.nan, "high": math.nan}
    after = before | {"mean": 0.75}
    cli._print(Result(before, after, gain, 0.5, {"run": 1.0}, tmp_path, tmp_path / "report.html"), Config())
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "held-out scene_attributes: 0.500 -> 0.750 (+0.250, no interval from one prompt, 4 pictures)"


def test_an_existing_run_is_left_alone_without_overwrite(run: Path):
    before = _files(run)
    line = _refused("train", TINY, *SMALLEST, f"run.folder={run}")
    assert f"continue it with --resume {run}, replace it with --overwrite" in line
    assert _files(run) == before


def test_overwrite_does_not_remove_what_is_no_run(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "holds no config.toml" in _refused("train", TINY, f"run.folder={tmp_path}", "--overwrite")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_sample_draws_the_trained_adapter_beside_the_base(run: Path, tmp_path: Path):
    caption = "a large red circle on a grey background"
    arguments = ("sample", run, "--prompt", caption, "--prompt", caption, "--num", "3", "--steps", "2")
    first = _call(*arguments, "--out", tmp_path / "first.png")
    assert (first.code, first.out) == (0, f"{tmp_path / 'first.png'}\n")
    with Image.open(tmp_path / "first.png") as picture:
        assert picture.width > 3 * 128
        assert picture.height > 4 * 128, "a row for the base and one for the adapter, twice"
    _call(*arguments, "--out", tmp_path / "second.png")
    assert (tmp_path / "second.png").read_bytes() == (tmp_path / "first.png").read_bytes()


def test_report_is_written_again(run: Path):
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert _call("report", run).out == f"{run / 'report.html'}\n"
    assert (run / "report.html").read_text() == before


def test_explain_names_what_serves_each_operation():
    outcome = _call("explain")
    assert outcome.code == 0
    assert "transition_log_prob" in outcome.out
    assert "reference" in outcome.out


def test_ctrl_c_says_how_to_resume_and_resume_finishes(tmp_path: Path, reward_module: str):
    folder = tmp_path / "run"
    reward = f"reward.name={reward_module}:ctrl_c_in_the_second_iteration"
    outcome = _call("train", TINY, *SMALLEST, f"run.folder={folder}", reward)
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1].endswith(f"newest checkpoint with: adascope-fast train --resume {folder}")
    before = (folder / "config.toml").read_text()
    line = _refused("train", "--resume", folder, "train.learning_rate=1.0")
    assert "train.learning_rate cannot change" in line
    assert (folder / "config.toml").read_text() == before
    resumed = _call("train", "--resume", folder, "train.iterations=3")
    assert resumed.code == 0, resumed
    records = [json.loads(record) for record in (folder / "stats.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [0, 1, 2]
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train.learning_rat=1"], "unknown key train.learning_rat = 1; did you mean train.learning_rate?"),
        (["train.iterations=many"], 'train.iterations must be a whole number, got "many" (text)'),
        (["train.rollout_batch=-4"], "train.rollout_batch must be at least 1, got -4"),
        (["train.microbatch=0"], "train.microbatch must be at least 1, got 0"),
        (["model.name=no/such/model"], "model.name is scenes, scenes-flow, the folder of a saved diffusers pipeline"),
        (["model.name=no/such"], "the repository no/such could not be read"),
        (["model.name=no/such.safetensors"], "is no file here; download it to this path"),
        (["model.name=no/such.ckpt"], "model.name must not be a pickle"),
        (["reward.name=beauty"], "reward.name is one of scene_attributes, jpeg_compressibility"),
        (["reward.name=no_such_module:score"], "reward 'no_such_module:score' could not be imported"),
        (["prompts.train=no_such_file.txt"], "got 'no_such_file.txt', which is no file"),
        (["prompts.held_out=scenes:test"], "a scenes split is 'train' or 'held_out', got 'test'"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line(tmp_path: Path, arguments: list[str], line: str):
    assert line in _refused("train", TINY, f"run.folder={tmp_path / 'run'}", *arguments)
    assert not (tmp_path / "run").exists(), "nothing is written"


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
        (["report", "no/such/run"], "a run's folder holds a config.toml, 'no/such/run' does not"),
        (["pretrain", "sceens"], "pretrain makes 'scenes', 'scenes-flow' or 'scenes-clip', got 'sceens'"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
):
    monkeypatch.chdir(tmp_path)
    assert line in _refused(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "a cat\n\n", "x" * 10_000])
def test_a_bad_prompt_file_is_one_line(tmp_path: Path, content: str):
    path = tmp_path / "prompts.txt"
    path.write_text(content)
    line = _refused("train", TINY, f"run.folder={tmp_path / 'run'}", f"prompts.held_out={path}")
    assert str(path) in line
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    line = _refused("train", TINY, f"run.folder={tmp_path / 'file' / 'run'}")
    assert "run.folder must be writable" in line
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("wrong_shape", "reward 'wrong_shape' must return one number a picture, shape [2], got shape [2, 3, 64, 64]"),
        ("not_a_number", "reward 'not_a_number' must be finite, got nan for"),
        ("missing", "could not be imported"),
    ],
)
def test_a_bad_reward_function_is_one_line(tmp_path: Path, reward_module: str, function: str, line: str):
    reward = f"reward.name={reward_module}:{function}"
    assert line in _refused("train", TINY, *SMALLEST, f"run.folder={tmp_path / 'run'}", reward)


def test_a_mistake_shows_where_it_was_raised_if_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ADASCOPE_FAST_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["adascope-fast", "train"])
    with pytest.raises(ValueError, match="train needs a configuration file first"):
        cli.main()


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "adascope_fast.cli", *map(str, arguments)]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_run_that_resumes(tmp_path: Path, stop: signal.Signals):
    folder = tmp_path / "run"
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    train = _command("train", TINY, *SMALLEST, f"run.folder={folder}", "train.iterations=1000")
    process = subprocess.Popen(train, stderr=subprocess.PIPE, text=True, env=environment)
    while not (folder / "checkpoints" / "000001").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(stop)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert err.splitlines()[-1].endswith(f"newest checkpoint with: adascope-fast train --resume {folder}")
    assert "Traceback" not in err
    done = len((folder / "stats.jsonl").read_text().splitlines())
    resume = _command("train", "--resume", folder, f"train.iterations={done + 1}")
    subprocess.run(resume, check=True, env=environment)
    lines = (folder / "stats.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(done + 1))


@pytest.mark.slow
def test_a_mistake_is_one_line_of_a_real_process(tmp_path: Path):
    finished = subprocess.run(
        _command("train", TINY, f"run.folder={tmp_path / 'run'}", "train.learning_rat=1"),
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert len(finished.stderr.splitlines()) == 1
    assert "did you mean train.learning_rate?" in finished.stderr


def test_calibrate_writes_a_page_and_refuses_in_one_line(tmp_path: Path):
    out = tmp_path / "calibration"
    outcome = _call("calibrate", TINY, "--prompts", "1", "--out", out, "sampler.num_steps=5")
    assert outcome.code == 0, outcome
    assert "selector.kappa=" in outcome.out
    assert {path.name for path in out.iterdir()} == {f"calibration.{kind}" for kind in ("html", "json", "png")}
    assert _refused("calibrate", TINY, "--start", "0.7") == (
        "error: --start must be below --end, got 0.7 and 0.636; the paper has 0.106 and 0.636"
    )
    assert "is a file; choose another place" in _refused("calibrate", TINY, "--out", out / "calibration.json")
    assert "calibrate needs a configuration file first, got nothing" in _refused("calibrate")
