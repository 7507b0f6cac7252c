"""`train`: what it prints, what it refuses in one line, what it leaves untouched, and how a stopped run goes on."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import SMALLEST, TINY, call, refused

from adascope_fast.commands.train import outcome
from adascope_fast.config import Config
from adascope_fast.training.run_folder import differences
from adascope_fast.training.trainer import Result

REWARDS = """
import os, signal
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

def sigterm_in_the_second_iteration(images, prompts, calls=[], times=1):
    calls.append(1)
    for _ in range(times if len(calls) == 3 else 0):
        os.kill(os.getpid(), signal.SIGTERM)
    return redness(images, prompts)

def two_in_the_second_iteration(images, prompts, calls=[]):
    return sigterm_in_the_second_iteration(images, prompts, calls, 2)
"""


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def reward_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder with rewards that behave and rewards that do not."""
    name = f"rewards_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(".")  # restores sys.path afterwards
    monkeypatch.chdir(tmp_path)
    return name


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


def test_one_prompt_has_no_interval(tmp_path: Path):
    before = {"mean": 0.5, "low": math.nan, "high": math.nan, "num_images": 4}
    gain = {"mean": 0.25, "low": math.nan, "high": math.nan}
    after = before | {"mean": 0.75}
    result = Result(before, after, gain, 0.5, {"run": 1.0}, tmp_path, tmp_path / "report.html", "redness", 0, 0)
    first = outcome(result).splitlines()[0]
    assert first == "held-out redness: 0.500 -> 0.750 (+0.250, no interval from one prompt, 4 images)"


def test_an_existing_run_is_left_alone_without_overwrite(run: Path):
    before = _files(run)
    line = refused("train", TINY, *SMALLEST, f"run.folder={run}")
    assert f"continue it with --resume {run}, replace it with --overwrite" in line
    assert _files(run) == before


def test_overwrite_does_not_remove_what_is_no_run(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "holds no config.toml" in refused("train", TINY, f"run.folder={tmp_path}", "--overwrite")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_ctrl_c_says_how_to_resume_and_resume_finishes(tmp_path: Path, reward_module: str):
    folder = tmp_path / "run"
    reward = f"reward.name={reward_module}:ctrl_c_in_the_second_iteration"
    stopped = call("train", TINY, *SMALLEST, f"run.folder={folder}", reward)
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1].endswith(f"newest checkpoint with: adascope-fast train --resume {folder}")
    before = (folder / "config.toml").read_text()
    line = refused("train", "--resume", folder, "train.learning_rate=1.0")
    assert "train.learning_rate cannot change" in line
    line = refused("train", "--resume", folder, "reward.name=jpeg_compressibility")
    assert "so reward.name cannot change" in line
    assert (folder / "config.toml").read_text() == before
    resumed = call("train", "--resume", folder, "train.iterations=3")
    assert resumed.code == 0, resumed
    records = [json.loads(record) for record in (folder / "stats.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [0, 1, 2]
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("function", "every", "logged", "saved"),
    [
        ("sigterm_in_the_second_iteration", 3, 2, ["000002"]),
        ("sigterm_in_the_second_iteration", 1, 1, ["000001"]),
        ("two_in_the_second_iteration", 3, 1, []),
    ],
    ids=["its end is far", "its beginning is saved", "told twice"],
)
def test_sigterm_lets_an_iteration_end_that_would_be_lost(
    tmp_path: Path,
    reward_module: str,
    capfd: pytest.CaptureFixture[str],
    function: str,
    every: int,
    logged: int,
    saved: list[str],
):
    """It ends at once where the iteration began at a checkpoint, or where the signal comes again."""
    folder = tmp_path / "run"
    settings = [f"run.folder={folder}", "train.iterations=4", f"train.checkpoint_every={every}"]
    stopped = call("train", TINY, *SMALLEST, *settings, f"reward.name={reward_module}:{function}")
    assert stopped.code == 143
    assert stopped.err.splitlines()[-1].endswith(f"newest checkpoint with: adascope-fast train --resume {folder}")
    told = "told to stop: the run ends after this iteration, with a checkpoint; again: at once\n"
    assert capfd.readouterr().err == (told if every > 1 else "")
    assert len((folder / "stats.jsonl").read_text().splitlines()) == logged
    assert [path.name for path in (folder / "checkpoints").glob("0*")] == saved
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert call("train", "--resume", folder).code == 0
    assert len((folder / "stats.jsonl").read_text().splitlines()) == 4


def test_what_differs_between_two_configurations_is_named():
    def between(old: list[str], new: list[str]) -> set[str]:
        return differences(Config.load(None, old), Config.load(None, new))

    assert between([], []) == set()
    assert between(["selector.name=every_step"], ["selector.name=every_step"]) == set(), "without sensing"
    assert between([], ["train.iterations=3", "selector.kappa=0.5"]) == {"train.iterations", "selector.kappa"}
    assert between([], ["algorithm.name=grpo"]) == {"algorithm.name"}
    assert between([], ["selector.name=every_step"]) == {"selector.name", "sensing.kind"}
    own = "algorithm.name=module:object"
    assert between([own, "algorithm.beta=1"], [own, "algorithm.gamma=1"]) == {"algorithm.beta", "algorithm.gamma"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train.learning_rat=1"], "unknown key train.learning_rat = 1; did you mean train.learning_rate?"),
        (["train.iterations=many"], 'train.iterations must be a whole number, got "many" (text)'),
        (["train.rollout_batch=-4"], "train.rollout_batch must be at least 1, got -4"),
        (["train.microbatch=0"], "train.microbatch must be at least 1, got 0"),
        (
            ["model.name=no/such/model", "prompts.train=scenes:train"],
            "model.name is scenes, scenes-flow, the folder of a saved diffusers pipeline",
        ),
        (["model.name=no/such", "prompts.train=scenes:train"], "the repository no/such could not be read"),
        (["model.name=no/such.safetensors", "prompts.train=scenes:train"], "is no file here; download it to this path"),
        (["model.name=no/such.ckpt", "prompts.train=scenes:train"], "model.name must not be a pickle"),
        (["reward.name=beauty"], "reward.name must be one of scene_attributes, jpeg_compressibility"),
        (["reward.name=no_such_module:score"], 'reward.name = "no_such_module:score" could not be imported'),
        (["prompts.train=no_such_file.txt", "prompts.held_out=b.txt"], "got 'no_such_file.txt', which is no file"),
        (
            ["prompts.train=scenes:train", "prompts.held_out=scenes:test"],
            "a scenes split is 'train' or 'held_out', got 'test'",
        ),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line(tmp_path: Path, arguments: list[str], line: str):
    assert line in refused("train", TINY, f"run.folder={tmp_path / 'run'}", *arguments)
    assert not (tmp_path / "run").exists(), "nothing is written"


@pytest.mark.parametrize("content", ["", "\n \n", "x" * 10_000])
def test_a_bad_prompt_file_is_one_line(tmp_path: Path, content: str):
    path = tmp_path / "prompts.txt"
    path.write_text(content)
    line = refused(
        "train", TINY, f"run.folder={tmp_path / 'run'}", "prompts.train=scenes:train", f"prompts.held_out={path}"
    )
    assert str(path) in line
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    line = refused("train", TINY, f"run.folder={tmp_path / 'file' / 'run'}")
    assert "run.folder must be writable" in line
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("wrong_shape", "reward 'wrong_shape' must return one number an image, shape [2], got shape [2, 3, 64, 64]"),
        ("not_a_number", "reward 'not_a_number' must be finite, got nan for"),
        ("missing", "could not be imported"),
    ],
)
def test_a_bad_reward_function_is_one_line(tmp_path: Path, reward_module: str, function: str, line: str):
    reward = f"reward.name={reward_module}:{function}"
    assert line in refused("train", TINY, *SMALLEST, f"run.folder={tmp_path / 'run'}", reward)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_a_run_that_resumes(tmp_path: Path, stop: signal.Signals):
    folder = tmp_path / "run"
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "adascope_fast.cli", "train"]
    train = [*command, TINY, *SMALLEST, f"run.folder={folder}", "train.iterations=1000"]
    process = subprocess.Popen(train, stderr=subprocess.PIPE, text=True, env=environment)
    while not (folder / "checkpoints" / "000001").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(stop)
    _, err = process.communicate(timeout=600)
    assert process.returncode == (143 if stop == signal.SIGTERM else 130)
    assert err.splitlines()[-1].endswith(f"newest checkpoint with: adascope-fast train --resume {folder}")
    assert "Traceback" not in err
    done = len((folder / "stats.jsonl").read_text().splitlines())
    resume = [*command, "--resume", str(folder), f"train.iterations={done + 1}"]
    subprocess.run(resume, check=True, env=environment)
    lines = (folder / "stats.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(done + 1))


SIGNALLED = """
import os, runpy, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Finder())
sys.argv = ["adascope-fast", *{arguments!r}]
runpy.run_module("adascope_fast.cli", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("stop", "module"),
    [
        *((signal.SIGTERM, module) for module in ("typer", "pydantic", "torch", "diffusers")),
        *((stop, "numpy") for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)),  # torch swallows what it raises
    ],
)
def test_a_signal_while_it_loads_is_answered_in_one_line(tmp_path: Path, stop: signal.Signals, module: str):
    """It comes while a library is being imported."""
    arguments = ["train", TINY, f"run.folder={tmp_path / 'run'}"]
    code = SIGNALLED.format(module=module, number=int(stop), arguments=arguments)
    stopped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    *progress, line = stopped.stderr.splitlines()
    assert (stopped.returncode, stopped.stdout, line) == (130, "", "interrupted")
    assert progress in ([], ["loading torch and diffusers"])
    assert not (tmp_path / "run").exists()
