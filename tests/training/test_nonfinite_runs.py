"""Runs in which something is not finite: counted and told, or stopped with exit code 1; nothing of it is exported."""

import json
import math
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from command_line import call
from diffusers import DiffusionPipeline
from small_runs import CAPTIONS, TINY, lines_of
from torch import Tensor

from adascope_fast import backbones
from adascope_fast.config import Config
from adascope_fast.training.monitoring.nonfinite import NonFinite
from adascope_fast.training.run_folder import RunFolder
from adascope_fast.training.trainer import Trainer

SMALLEST = ["sampler.num_steps=4", "evaluation.num_prompts=2", "train.learning_rate=0.01"]


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    assert images.isfinite().all(), "no reward sees what is not finite"
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def _config(folder: Path, *overrides: str) -> Config:
    return Config.load(TINY, [*SMALLEST, f"run.folder={folder}", *overrides])


def _status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


@pytest.fixture
def diverging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates with a learning rate that no configuration may have."""
    monkeypatch.setattr("adascope_fast.training.trainer.rates_of", lambda config: lambda number: 1e38)


@pytest.mark.usefixtures("diverging")
@pytest.mark.parametrize(
    "overrides",
    [
        ["train.iterations=5"],
        ["train.iterations=2"],
        ["train.iterations=1"],
        ["train.iterations=5", "algorithm.name=awm"],
        ["train.iterations=5", "train.update=one_pass", "selector.mask_source=previous"],
        ["model.train=full", "train.iterations=5"],
    ],
    ids=["many", "two", "one", "awm", "one_pass", "full"],
)
def test_a_run_that_diverges_fails_and_exports_nothing(tmp_path: Path, overrides: list[str]):
    folder = tmp_path / "run"
    outcome = call("train", TINY, *SMALLEST, f"run.folder={folder}", *overrides)
    assert outcome.code == 1, outcome
    line = outcome.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "lower train.learning_rate (0.01)" in line
    assert "finite" in line
    assert not (folder / "adapter").exists()
    run = _status(folder)
    assert (run["status"], run["reason"]) == ("failed", line.removeprefix("error: "))
    page = (folder / "report.html").read_text()
    assert run["reason"].split(";")[0] in page
    assert "failed after" in page
    assert "All images, updates, log-probabilities and ratios were finite" not in page or len(lines_of(folder)) < 2


def _pipeline_with_a_nan() -> Any:
    pipeline: Any = DiffusionPipeline.from_pretrained(backbones.folder_of("scenes"))
    with torch.no_grad():
        pipeline.unet.conv_out.weight[0, 0, 0, 0] = math.nan
    return pipeline


def test_a_model_that_draws_nothing_finite_is_told_before_it_is_trained(tmp_path: Path):
    folder = tmp_path / "run"
    with pytest.raises(FloatingPointError, match="after 0 iterations none of the 4 held-out images is finite; lower"):
        Trainer(_config(folder), reward=redness, pipeline=_pipeline_with_a_nan(), quiet=True).train()
    assert _status(folder)["status"] == "failed"
    assert not (folder / "stats.jsonl").exists()


class Flaky:
    """Makes images of a trainer's model not finite, those with these numbers, counted from 0 over the whole run."""

    def __init__(self, trainer: Trainer, bad: set[int]) -> None:
        self.bad, self.seen = bad, 0
        trainer.prepare()
        decode = trainer.backbone.decode

        def decode_badly(_: Any, latents: Tensor) -> Tensor:
            images = decode(latents).clone()
            rows = [row - self.seen for row in self.bad if self.seen <= row < self.seen + len(latents)]
            self.seen += len(latents)
            images[rows] = math.nan
            return images

        trainer.backbone.decode = MethodType(decode_badly, trainer.backbone)
        trainer.prepare = lambda: None


BEFORE, ITERATION = 4, 4  # images of an evaluation, and of an iteration


def test_what_is_left_out_is_counted_and_told(tmp_path: Path):
    """An image of the first evaluation, and one of iteration 1."""
    folder = tmp_path / "run"
    trainer = Trainer(_config(folder), reward=redness, quiet=True)
    Flaky(trainer, {1, BEFORE + ITERATION + 2})
    result = trainer.train()
    assert [line["samples_dropped"] for line in lines_of(folder)] == [0, 1]
    assert (result.samples_dropped, result.updates_skipped) == (1, 0)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert (evaluation["before"]["num_not_finite"], evaluation["after"]["num_not_finite"]) == (1, 0)
    scores = evaluation["before"]["scores"]
    assert scores[0][1] is None
    known = [[score for score in row if score is not None] for row in scores]
    assert result.before["mean"] == pytest.approx(sum(sum(row) / len(row) for row in known) / len(known))
    gains = [
        [new - old for new, old in zip(*rows, strict=True) if old is not None]
        for rows in zip(evaluation["after"]["scores"], scores, strict=True)
    ]
    assert result.difference["mean"] == pytest.approx(sum(sum(row) / len(row) for row in gains) / len(gains))
    page = (folder / "report.html").read_text()
    assert "Not finite, and left out: 1 images of the training, 1 images of the evaluations." in page


def test_stop_stops_at_the_first(tmp_path: Path):
    folder = tmp_path / "run"
    trainer = Trainer(_config(folder, "train.on_nonfinite=stop"), reward=redness, quiet=True)
    Flaky(trainer, {BEFORE + ITERATION + 2})
    with pytest.raises(
        FloatingPointError, match=r"iteration 1 has 1 of 4 images and 0 of 1 updates that are not finite"
    ):
        trainer.train()
    assert len(lines_of(folder)) == 2
    assert _status(folder)["status"] == "failed"
    assert not (folder / "adapter").exists()


@pytest.mark.parametrize("stop_after", [1, 2])
def test_iterations_without_a_finite_update_stop_the_run_only_in_a_row(tmp_path: Path, stop_after: int):
    """Iterations 1 and 3 have no finite image: one at a time."""
    folder = tmp_path / "run"
    config = _config(folder, "train.iterations=5", f"train.stop_after={stop_after}")
    trainer = Trainer(config, reward=redness, quiet=True)
    Flaky(trainer, {BEFORE + number * ITERATION + row for number in (1, 3) for row in range(ITERATION)})
    if stop_after == 1:
        with pytest.raises(
            FloatingPointError, match=r"1 iterations in a row \(train.stop_after\) made no finite update"
        ):
            trainer.train()
        return
    trainer.train()
    lines = lines_of(folder)
    assert [line["samples_dropped"] for line in lines] == [0, 4, 0, 4, 0]
    assert [line["reward_mean"] is None for line in lines] == [False, True, False, True, False]
    assert (folder / "adapter").is_dir()


def test_iterations_in_a_row_are_counted_across_a_resume(tmp_path: Path):
    folder = tmp_path / "run"
    records = [{"updates_skipped": 1, "samples_dropped": 4}] * 2
    watch = NonFinite(_config(folder), records)
    with pytest.raises(FloatingPointError, match="3 iterations in a row"):
        watch.add({"iteration": 2, "updates_skipped": 1, "samples_dropped": 4, "nonfinite": 0})


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "run"
    trainer = Trainer(_config(folder), reward=redness, quiet=True)
    trainer.prepare()
    trainer.prepare = lambda: None
    done = trainer._progress.done

    def spoil(*arguments: Any) -> None:
        done(*arguments)
        with torch.no_grad():
            trainer.backbone.trainable_parameters()[0].fill_(math.inf)

    monkeypatch.setattr(trainer._progress, "done", spoil)
    with pytest.raises(FloatingPointError, match=r"(weights must be finite, and adapter\.|none of the .* is finite)"):
        trainer.train()
    assert [path.name for path in (folder / "checkpoints").glob("0*")] == ["000001"]
    assert not (folder / "adapter").exists()


def test_images_that_are_not_finite_are_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "run"
    Trainer(_config(folder), reward=redness, train_prompts=CAPTIONS, quiet=True).train()
    monkeypatch.setattr(
        backbones.PipelineBackbone, "decode", lambda self, latents: torch.full((len(latents), 3, 64, 64), math.nan)
    )
    outcome = call("sample", folder, "--prompt", CAPTIONS[0], "--num", "2")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].startswith("error: images must be finite, and 2 of 2 are not")
    assert not (folder / "samples" / "sample.png").exists()


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, save = tmp_path / "run", RunFolder.save_checkpoint

    def full(self: RunFolder, number: int, *rest: Any) -> None:
        if number == 2:
            raise OSError(28, "No space left on device")
        save(self, number, *rest)

    monkeypatch.setattr(RunFolder, "save_checkpoint", full)
    outcome = call("train", TINY, *SMALLEST, f"run.folder={folder}")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == "error: [Errno 28] No space left on device"
    assert _status(folder)["status"] == "failed"
    monkeypatch.undo()
    assert call("train", "--resume", folder).code == 0
