"""The best evaluation of a training: its weights are exported, and a training that waits for a better one ends."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from small_runs import CAPTIONS, SMALLEST, TINY, lines_of

from adascope_fast.config import Config, ConfigError
from adascope_fast.training import trainer as module
from adascope_fast.training.draw import load_run
from adascope_fast.training.evaluation import HeldOutScores
from adascope_fast.training.monitoring.best import best_of, since_best
from adascope_fast.training.trainer import Trainer


def _history(*means: float | None) -> list[dict[str, Any]]:
    return [{"iteration": iteration, "mean": mean} for iteration, mean in enumerate(means)]


def test_the_best_is_the_earliest_of_the_highest_after_training_has_begun() -> None:
    assert best_of(_history(0.9, 0.2, 0.5, 0.5, None)) == 2
    assert best_of(_history(0.9)) is None
    assert since_best(_history(0.4, 0.5, 0.3, None, 0.5)) == 3, "one without a mean is one in vain"
    assert since_best(_history(0.4, 0.3, 0.2)) == 2, "the model before training counts"
    assert since_best([]) == 0


def _run(folder: Path, scores: list[float], *overrides: str) -> Path:
    """A run whose evaluations find these scores, in their order."""
    left = iter(scores)

    def evaluated(*_: Any, **__: Any) -> HeldOutScores:
        return HeldOutScores(torch.tensor([[next(left)]]), torch.rand(1, 3, 8, 8), {}, None, 0.1)

    given = [*SMALLEST, f"run.folder={folder}", "evaluation.every=1", "log.trackers=[]", *overrides]
    trainer = Trainer(Config.load(TINY, given), train_prompts=CAPTIONS[:1], held_out_prompts=CAPTIONS[1:], quiet=True)
    with mock.patch.object(module, "evaluate", evaluated):
        trainer.train()
    assert next(left, None) is None, "no evaluation is missing"
    return folder


def _checkpoint(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    found = load_file(folder / f"checkpoints/{iteration:06d}/state.safetensors")
    return {name.removeprefix("adapter."): value for name, value in found.items() if name.startswith("adapter.")}


def test_the_weights_of_the_best_evaluation_are_exported_and_drawn_with(tmp_path: Path) -> None:
    """Before, three in between, after, and the best ones again."""
    keys = ["train.iterations=4", "evaluation.keep_best=true", "train.keep_checkpoints=9", "model.ema_decay=0"]
    folder = _run(tmp_path / "run", [0.1, 0.2, 0.7, 0.4, 0.5, 0.7], *keys)
    told = json.loads((folder / "evaluation.json").read_text())
    assert [(point["iteration"], round(point["mean"], 3)) for point in told["history"]] == [
        *((0, 0.1), (1, 0.2), (2, 0.7), (3, 0.4), (4, 0.5)),
    ]
    assert told["difference"]["mean"] == pytest.approx(0.6)
    exported = load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")
    second, last = _checkpoint(folder, 2), _checkpoint(folder, 4)
    assert sorted(value.double().sum().item() for value in exported.values()) == pytest.approx(
        sorted(value.double().sum().item() for value in second.values())
    )
    _, backbone = load_run(folder)
    drawn = backbone.adapter_tensors()
    assert all(torch.equal(drawn[name].cpu(), value) for name, value in second.items())
    assert any(not torch.equal(second[name], value) for name, value in last.items())


def test_the_last_weights_are_exported_where_they_are_the_best(tmp_path: Path) -> None:
    keys = ["train.iterations=2", "evaluation.keep_best=true", "model.ema_decay=0"]
    folder = _run(tmp_path / "run", [0.1, 0.2, 0.7], *keys)
    _, backbone = load_run(folder)
    drawn = backbone.adapter_tensors()
    assert all(torch.equal(drawn[name].cpu(), value) for name, value in _checkpoint(folder, 2).items())


def test_a_training_ends_that_waits_in_vain(tmp_path: Path) -> None:
    """0.2 is above 0.1; 0.15 and 0.2 are not above 0.2: after the second of them it ends, and is evaluated."""
    folder = _run(tmp_path / "run", [0.1, 0.2, 0.15, 0.2, 0.2], "train.iterations=9", "evaluation.patience=2")
    assert [line["iteration"] for line in lines_of(folder)] == [0, 1, 2]
    run = json.loads((folder / "run.json").read_text())
    assert (run["status"], run["stopped_by"]) == ("finished", "evaluation.patience")


@pytest.mark.parametrize("key", ["patience=2", "keep_best=true"])
def test_without_evaluations_in_between_it_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"goes by evaluations in the course of training, .* set evaluation\.every"):
        Config.load(TINY, [f"evaluation.{key}"])
