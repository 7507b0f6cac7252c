"""`adascope-fast rollout-server` as a process: what it prints, and what a training does when it is killed."""

import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from command_line import TINY, call, refused
from reward_servers import TOKEN
from rollout_servers import drawing_of
from safetensors.torch import load_file
from server_processes import server_process
from small_runs import SMALLEST, lines_of, redness

from adascope_fast import Config, Trainer
from adascope_fast import remote_rollout as remote_rollouts
from adascope_fast.training import origin, trust
from adascope_fast.training.run_folder import load_config

VARIABLE = "ADASCOPE_FAST_ROLLOUT_TOKEN"
SAME = ("reward_mean", "reward_std", "loss", "grad_norm", "rollout_drift_max")


def _config(folder: Path, *more: str) -> Config:
    settings = [*SMALLEST, "train.iterations=4", "train.samples_per_prompt=4", "train.rollout_batch=2"]
    return Config.load(Path(TINY), [*settings, f"run.folder={folder}", *more])


@pytest.mark.slow
def test_a_training_waits_for_a_server_that_was_killed_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    Trainer(_config(tmp_path / "local"), reward=redness, quiet=True).train()
    monkeypatch.setenv(VARIABLE, TOKEN)
    killed: list[int] = []
    with server_process("rollout-server", TINY, "--port", "0", variable=VARIABLE, token=TOKEN) as (first, printed):
        found = re.search(r'^url = "(http://127\.0\.0\.1:(\d+))"$', printed, re.MULTILINE)
        assert found
        assert TOKEN not in printed
        url, port, finished = found[1], int(found[2]), threading.Event()

        def kill_and_restart() -> None:
            stats = tmp_path / "remote" / "stats.jsonl"
            while not stats.exists() or not stats.read_text():
                time.sleep(0.005)
            first.send_signal(signal.SIGKILL)
            first.wait()
            killed.append(len(lines_of(tmp_path / "remote")))
            with server_process("rollout-server", TINY, "--port", str(port), variable=VARIABLE, token=TOKEN):
                finished.wait(120)

        thread = threading.Thread(target=kill_and_restart)
        thread.start()
        try:
            config = _config(tmp_path / "remote", "rollout.name=remote", f"rollout.url={url}")
            Trainer(config, reward=redness, quiet=True).train()
        finally:
            finished.set()
            thread.join()
    assert killed[0] < 4, "in the middle of the run"
    told = [record.getMessage() for record in caplog.records if url in record.getMessage()]
    assert [line for line in told if line.endswith("it is waited for, 600 s at most")]
    one, other = ([{key: line[key] for key in SAME} for line in lines_of(tmp_path / n)] for n in ("local", "remote"))
    assert one == other
    mine, theirs = (load_file(next((tmp_path / n).glob("adapter/*.safetensors"))) for n in ("local", "remote"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_resumed_run_may_find_its_server_elsewhere_but_not_go_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(VARIABLE, TOKEN)
    run, keys = tmp_path / "run", ["rollout.name=remote", "train.iterations=1", f"run.folder={tmp_path / 'run'}"]
    config = Config.load(Path(TINY), SMALLEST)
    with drawing_of(config) as (url, _):
        assert call("train", TINY, *SMALLEST, *keys, f"rollout.url={url}").code == 0
    with drawing_of(config) as (url, _):
        resumed = call("train", "--resume", run, "train.iterations=2", f"rollout.url={url}", "rollout.patience=5.0")
        assert resumed.code == 0, resumed
    assert load_config(run).rollout.model_dump()["url"] == url
    assert trust.is_signed(load_config(run), origin.read(run)[2]), "it is this user's at the new address, too"
    assert len(lines_of(run)) == 2
    assert "rollout.name cannot change" in refused("train", "--resume", run, "rollout.name=local")


def test_the_digest_is_that_of_the_model_whatever_draws_it():
    told = call("rollout-server", TINY, "--digest")
    assert told.code == 0
    assert re.fullmatch(r"[0-9a-f]{64}\n", told.out)
    same = ["acceleration.channels_last=off", "model.attention=sdpa", "run.seed=5", "train.rollout_batch=1"]
    assert call("rollout-server", TINY, *same, "--digest").out == told.out
    for other in ("model.lora_rank=8", "model.train=full", "model.name=scenes-flow", "model.lora_alpha=7"):
        assert call("rollout-server", TINY, other, "--digest").out != told.out, other


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "rollout-server needs a configuration file first, got nothing; for example"),
        ([TINY, "model.nme=a"], "unknown key model.nme"),
        ([TINY, "--host", "192.0.2.1"], "listens at an address of this machine and a free port"),
        (["no.toml"], "no.toml"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str):
    assert re.search(said, refused("rollout-server", *arguments))


def test_a_token_that_is_too_short_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "short")
    assert "at least 16 printable ASCII characters without spaces, got 5" in refused("rollout-server", TINY)


def test_without_fastapi_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for module in ("adascope_fast.remote_rollout.server", "adascope_fast.serving.desk"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delattr(remote_rollouts, "server", raising=False)
    assert "pip install 'adascope-fast[serve]'" in refused("rollout-server", TINY)
