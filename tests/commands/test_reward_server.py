"""`adascope-fast reward-server` as a process: what it prints, and what a training does when it is killed."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from command_line import TINY, call, refused
from reward_servers import TOKEN, serving
from safetensors.torch import load_file
from server_processes import server_process
from small_runs import SMALLEST, lines_of, redness
from torch import Tensor

from adascope_fast import Config, Trainer
from adascope_fast.rewards import Remote
from adascope_fast.rewards import remote as remote_reward

VARIABLE = "ADASCOPE_FAST_REWARD_TOKEN"
JUDGE = """import time

def redness(images, prompts):
    time.sleep({pause})
    images = images.double()  # so that the layout of the images moves no sum by a rounding
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
"""


@contextmanager
def _server(folder: Path, *, pause: float, port: int = 0, token: str = "") -> Iterator[tuple[subprocess.Popen, str]]:
    """A server process of the reward above, once it serves, and all that it printed."""
    (folder / "judge.py").write_text(JUDGE.format(pause=pause))
    arguments = ("reward-server", "judge:redness", "--port", str(port))
    with server_process(*arguments, variable=VARIABLE, token=token, cwd=folder) as found:
        yield found


def _settings(folder: Path, *more: str) -> list[str]:
    return [*SMALLEST, "train.iterations=3", "train.samples_per_prompt=4", f"run.folder={folder}", *more]


def test_a_training_waits_for_a_server_that_was_killed_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    local = Config.load(TINY, _settings(tmp_path / "local"))
    Trainer(local, reward=lambda images, prompts: redness(images.double(), prompts), quiet=True).train()
    monkeypatch.setenv(VARIABLE, TOKEN)
    killed: list[int] = []
    with _server(tmp_path, pause=0.2, token=TOKEN) as (first, printed):
        found = re.search(r'^url = "(http://127\.0\.0\.1:(\d+))"$', printed, re.MULTILINE)
        assert found
        assert TOKEN not in printed
        url, port = found[1], int(found[2])
        finished = threading.Event()

        def kill_and_restart() -> None:
            stats = tmp_path / "remote" / "stats.jsonl"
            while not stats.exists() or not stats.read_text():
                time.sleep(0.01)
            time.sleep(0.1)
            first.send_signal(signal.SIGKILL)
            first.wait()
            killed.append(len(lines_of(tmp_path / "remote")))
            with _server(tmp_path, pause=0.2, port=port, token=TOKEN):
                finished.wait(60)

        thread = threading.Thread(target=kill_and_restart)
        thread.start()
        try:
            keys = ["reward.name=remote", f"reward.url={url}"]
            Trainer(Config.load(TINY, _settings(tmp_path / "remote", *keys)), quiet=True).train()
        finally:
            finished.set()
            thread.join()
    assert killed in ([1], [2]), "in the middle of the run"
    told = [record.getMessage() for record in caplog.records if url in record.getMessage()]
    assert len(told) == 2
    assert told[0].endswith("it is waited for, 600 s at most")
    assert "answers again, after" in told[1]
    same = ("reward_mean", "reward_std", "loss", "grad_norm")
    one, other = (
        [{key: line[key] for key in same} for line in lines_of(tmp_path / name)] for name in ("local", "remote")
    )
    assert one == other
    weights = [next((tmp_path / name).rglob("adapter*/*.safetensors"), None) for name in ("local", "remote")]
    assert weights[0] is not None
    assert weights[1] is not None
    mine, theirs = load_file(weights[0]), load_file(weights[1])
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert TOKEN not in "".join(path.read_text() for path in (tmp_path / "remote").glob("*.[tj]*"))


def test_an_interrupted_server_answers_what_it_works_on(tmp_path: Path):
    with _server(tmp_path, pause=1.0) as (process, printed):
        lines = printed.splitlines()
        token = lines[0].removeprefix(f"export {VARIABLE}=")
        assert len(token) == 32
        assert lines[1:3] == ["[reward]", 'name = "remote"']
        remote = Remote(lines[3].removeprefix('url = "').removesuffix('"'), token=token)
        threading.Timer(0.4, process.send_signal, (signal.SIGTERM,)).start()
        images = torch.rand(2, 3, 8, 8)
        assert torch.equal(remote(images, ["a", "b"]), redness(images.double(), []).float())
        assert process.wait(10) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "interrupted\n"


def test_a_resumed_run_notices_another_reward_behind_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def dull(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -redness(images, list(prompts))

    monkeypatch.setenv(VARIABLE, TOKEN)
    run = tmp_path / "run"
    keys = ["reward.name=remote", "train.iterations=1"]
    with serving(redness) as url:
        assert call("train", TINY, *_settings(run, *keys, f"reward.url={url}")).code == 0
    with serving(dull, digest="second") as url:
        line = refused("train", "--resume", run, "train.iterations=2", f"reward.url={url}")
        assert "reward is called a reward of a server as before, but is not what it was" in line
    with serving(redness) as url:  # the same elsewhere
        resumed = call("train", "--resume", run, "train.iterations=2", f"reward.url={url}", "reward.patience=5.0")
        assert resumed.code == 0, resumed
    assert len(lines_of(run)) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "reward-server needs a reward first, got nothing; for example: adascope-fast reward-server"),
        (["reward.clip=a"], "reward-server needs a reward first, got 'reward.clip=a'"),
        (["beauty"], 'reward.name must be one of scene_attributes, jpeg_compressibility, .* got "beauty"'),
        (["no_such_module:score"], 'reward.name = "no_such_module:score" could not be imported'),
        (["clip_similarity", "reward.clp=a"], "unknown key reward.clp"),
        (["clip_similarity", "train.iterations=3"], "takes the keys of its reward, reward.key=value, got 'train"),
        (["clip_similarity", "reward.name=mixed"], "takes the keys of its reward"),
        (["jpeg_compressibility", "--device", "tpu"], "--device is auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["jpeg_compressibility", "--host", "192.0.2.1"], "listens at an address of this machine and a free port"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str):
    assert re.search(said, refused("reward-server", *arguments))


def test_a_token_that_is_too_short_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "short")
    line = refused("reward-server", "jpeg_compressibility")
    assert "at least 16 printable ASCII characters without spaces, got 5" in line


def test_without_fastapi_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "adascope_fast.rewards.remote.server", raising=False)
    monkeypatch.delattr(remote_reward, "server", raising=False)
    assert "pip install 'adascope-fast[serve]'" in refused("reward-server", "jpeg_compressibility")
