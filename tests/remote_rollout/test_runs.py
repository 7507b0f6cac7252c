"""Trainings whose images a server draws learn bit for bit what they learn by themselves."""

import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from reward_servers import TOKEN
from rollout_servers import drawing_of
from safetensors.torch import load_file
from small_runs import SMALLEST, TINY, lines_of, redness
from torch import Tensor

from adascope_fast import Config, Trainer
from adascope_fast.config import ConfigError
from adascope_fast.remote_rollout.drawing import Drawing
from adascope_fast.remote_rollout.wire import Answer, Request
from adascope_fast.rollout import PromptCache
from adascope_fast.serving import client

SAME = ("reward_mean", "reward_std", "loss", "grad_norm", "pairs_trained", "rollout_drift_max", "selector", "steps")


@pytest.fixture(autouse=True)
def _ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADASCOPE_FAST_ROLLOUT_TOKEN", TOKEN)
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.05)


def _config(folder: Path, *more: str) -> Config:
    settings = ["train.iterations=3", "train.samples_per_prompt=4", "train.updates_per_iteration=2"]
    return Config.load(TINY, [*SMALLEST, *settings, "train.rollout_batch=3", f"run.folder={folder}", *more])


def _refuse_difference(one: Path, other: Path) -> None:
    mine, theirs = ([{key: line[key] for key in SAME} for line in lines_of(folder)] for folder in (one, other))
    assert mine == theirs
    files = [sorted(folder.glob("adapter/*.safetensors")) for folder in (one, other)]
    assert [len(found) for found in files] == [1, 1]
    weights = [load_file(found[0]) for found in files]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_training_learns_what_it_learns_by_itself_though_its_server_is_started_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    Trainer(_config(tmp_path / "local"), reward=redness, quiet=True).train()
    config, scored = _config(tmp_path / "remote", "rollout.name=remote"), []
    with ExitStack() as first, ExitStack() as second:
        url, _ = first.enter_context(drawing_of(config))
        port, restarted = int(url.rpartition(":")[2]), threading.Event()

        def restart() -> None:
            time.sleep(0.3)
            second.enter_context(drawing_of(config, port=port))
            restarted.set()

        def reward(images: Tensor, prompts: list[str]) -> Tensor:
            scored.append(len(lines_of(config_folder)) if (config_folder / "stats.jsonl").exists() else 0)
            if scored.count(1) == 1 and scored[-1] == 1:  # in the second iteration, for the third
                first.close()
                threading.Thread(target=restart).start()
            return redness(images, prompts)

        config_folder = tmp_path / "remote"
        Trainer(_config(config_folder, "rollout.name=remote", f"rollout.url={url}"), reward=reward, quiet=True).train()
        assert restarted.is_set()
    _refuse_difference(tmp_path / "local", tmp_path / "remote")
    assert lines_of(tmp_path / "local")[0]["rollout_drift_max"] < 1e-4
    told = [record.getMessage() for record in caplog.records if url in record.getMessage()]
    assert len(told) == 2
    assert told[0].endswith("it is waited for, 600 s at most")
    assert "answers again, after" in told[1]
    assert TOKEN not in "".join(path.read_text() for path in config_folder.glob("*.[tj]*"))


@pytest.mark.parametrize(
    "more",
    [
        ["algorithm.name=grpo", "algorithm.initial_noise=group", "selector.name=window", "selector.window_size=2"],
        ["algorithm.name=awm", "model.name=scenes-flow", "prompts.train=scenes:train"],
    ],
    ids=["a window that moves, and starts that are shared", "an average of the weights draws"],
)
def test_other_algorithms_too(tmp_path: Path, more: list[str]):
    more = [*more, "train.iterations=2"]
    Trainer(_config(tmp_path / "local", *more), reward=redness, quiet=True).train()
    with drawing_of(_config(tmp_path, *more)) as (url, _):
        keys = ["rollout.name=remote", f"rollout.url={url}"]
        Trainer(_config(tmp_path / "remote", *more, *keys), reward=redness, quiet=True).train()
    _refuse_difference(tmp_path / "local", tmp_path / "remote")


def test_log_probs_that_are_none_of_ours_end_the_run_before_its_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn = Drawing.__call__

    def shifted(self: Drawing, request: Request) -> Answer:
        answer = drawn(self, request)
        answer.log_prob.add_(0.02)
        return answer

    monkeypatch.setattr(Drawing, "__call__", shifted)
    with drawing_of(_config(tmp_path)) as (url, _):
        config = _config(tmp_path / "run", "rollout.name=remote", f"rollout.url={url}")
        with pytest.raises(ValueError, match=r"within rollout.max_drift = 0\.01 .*, got a difference of 0\.02"):
            Trainer(config, reward=redness, quiet=True).train()
        assert not list((tmp_path / "run" / "checkpoints").glob("*"))
        config = _config(tmp_path / "other", "rollout.name=remote", f"rollout.url={url}", "rollout.max_drift=0.03")
        Trainer(config, reward=redness, quiet=True).train()


def test_another_model_is_refused_before_a_run_is_begun(tmp_path: Path):
    with drawing_of(_config(tmp_path, "model.lora_rank=8")) as (url, _):
        config = _config(tmp_path / "run", "rollout.name=remote", f"rollout.url={url}")
        with pytest.raises(ValueError, match="has another model than this training"):
            Trainer(config, reward=redness, quiet=True).train()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["train.update=one_pass", "selector.name=every_step"],
            'got train.update = "one_pass" with rollout.name = "re',
        ),
        (["sampler.tail_share=0.5", "selector.name=every_step"], "got sampler.tail_share = 0.5 with rollout.name"),
        (["sampler.kind=dpm_solver", "algorithm.name=awm"], 'got sampler.kind = "dpm_solver" with rollout.name'),
        (["algorithm.name=spo"], 'got algorithm.name = "spo" with rollout.name = "remote"; set another algorithm.name'),
        (["rollout.url=ftp://a"], "rollout.url must be http://HOST:PORT"),
        (["rollout.token_env=a-b"], "rollout.token_env must be the name of an environment variable"),
        (["rollout.max_drift=0"], "rollout.max_drift must be above 0"),
        (["rollout.parallel=0"], "rollout.parallel must be at least 1"),
    ],
)
def test_what_a_server_cannot_do_is_refused_by_name(overrides: list[str], said: str):
    with pytest.raises(ConfigError) as caught:
        Config.load(None, ["rollout.name=remote", *overrides])
    assert said in str(caught.value)


def test_a_library_user_is_told_so_too(tmp_path: Path):
    """Who builds an engine by hand has no configuration that refuses."""
    config = _config(
        tmp_path / "run", "selector.name=every_step", "train.update=one_pass", "train.updates_per_iteration=1"
    )
    trainer = Trainer(config, reward=redness, quiet=True)
    trainer.prepare()
    trainer.engine.remote = lambda *_, **__: pytest.fail("is asked")  # type: ignore[assignment]
    prompts = trainer.prompts_of(0)
    with pytest.raises(ValueError, match=r'takes each step .*, got one_pass; set rollout\.name = "local"'):
        trainer.engine.step(PromptCache(trainer.backbone)(prompts), prompts, iteration=0, seed=1)
