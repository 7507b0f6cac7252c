"""Callbacks: what they are told, how they end a run, and that nothing of theirs reaches the training."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import CAPTIONS, SMALLEST, TINY, lines_of, redness

from adascope_fast import Callback, HeldOut, Trainer
from adascope_fast.config import Config
from adascope_fast.training.monitoring.callbacks import Callbacks


def _trainer(folder: Path, *callbacks: Any, iterations: int = 2) -> Trainer:
    overrides = [*SMALLEST, f"run.folder={folder}", f"train.iterations={iterations}", "evaluation.every=1"]
    config = Config.load(TINY, overrides)
    lists: dict[str, Any] = {"train_prompts": CAPTIONS[:1], "held_out_prompts": CAPTIONS[1:]}
    return Trainer(config, reward=redness, callbacks=callbacks, quiet=True, **lists)


class Witness(Callback):
    """Keeps what it is told, and answers "stop" to one of them."""

    def __init__(self, stop_at: str = "") -> None:
        self.stop_at, self.told, self.evaluations = stop_at, [], []

    def on_iteration(self, record: Any) -> Any:
        return self._answer(f"iteration {record['iteration']}")

    def on_evaluation(self, evaluation: HeldOut) -> Any:
        self.evaluations.append(evaluation)
        return self._answer(f"evaluation {evaluation.name} after {evaluation.iteration}")

    def on_checkpoint(self, path: Path) -> Any:
        assert (path / "state.json").is_file()
        return self._answer(f"checkpoint {path.name}")

    def _answer(self, occasion: str) -> str | None:
        self.told.append(occasion)
        return "stop" if occasion == self.stop_at else None


WHOLE = [
    "evaluation before after 0",
    "iteration 0",
    "evaluation None after 1",
    "checkpoint 000001",
    "iteration 1",
    "checkpoint 000002",
    "evaluation after after 2",
]


def test_a_callback_is_told_what_the_run_folder_says(tmp_path: Path):
    witness = Witness()
    result = _trainer(tmp_path / "run", witness).train()
    assert witness.told == WHOLE
    first, last = witness.evaluations[0], witness.evaluations[-1]
    assert (first.summary["mean"], last.summary["mean"]) == (result.before["mean"], result.after["mean"])
    assert (first.prompts, first.columns, first.images.shape) == (CAPTIONS[1:], 1, (1, 3, 64, 64))


@pytest.mark.parametrize("occasion", ["iteration 0", "evaluation None after 1", "checkpoint 000001"])
def test_a_callback_ends_the_run_whole(tmp_path: Path, occasion: str):
    """With its checkpoint, its last evaluation and its adapter, and it can be resumed."""
    witness = Witness(occasion)
    _trainer(tmp_path / "run", witness, iterations=3).train()
    told = [one for one in WHOLE[:4] if occasion != "iteration 0" or "None" not in one]
    assert witness.told == [*told, "evaluation after after 1"]
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (described["status"], described["stopped_by"]) == ("finished", "callback Witness")
    assert (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    assert len(lines_of(tmp_path / "run")) == 1
    _trainer(tmp_path / "run", iterations=2).resume()
    assert [record["iteration"] for record in lines_of(tmp_path / "run")] == [0, 1]
    assert "stopped_by" not in json.loads((tmp_path / "run" / "run.json").read_text())


class Meddler(Callback):
    def on_iteration(self, record: Any) -> None:
        record.clear()

    def on_evaluation(self, evaluation: HeldOut) -> None:
        evaluation.images.zero_()


def test_nothing_that_a_callback_does_to_what_it_is_told_reaches_the_run(tmp_path: Path):
    _trainer(tmp_path / "run", Meddler(), witness := Witness()).train()
    assert all(evaluation.images.std() > 0 for evaluation in witness.evaluations)
    assert [record["iteration"] for record in lines_of(tmp_path / "run")] == [0, 1]


class Checkpoints:
    """No subclass, and one method alone."""

    def on_checkpoint(self, path: Path) -> None:
        self.path = path


def test_an_object_with_one_of_the_methods_will_do(tmp_path: Path):
    callbacks = Callbacks([one := Checkpoints()])
    callbacks.on_iteration({})
    callbacks.on_checkpoint(tmp_path)
    assert one.path == tmp_path
    assert callbacks.stopped_by is None


@pytest.mark.parametrize(("wrong", "got"), [(Checkpoints, "the class Checkpoints"), (print, "builtin_function")])
def test_what_is_no_callback_is_refused(wrong: Any, got: str):
    with pytest.raises(ValueError, match=f"a callback is an object with one of the methods .*, got {got}"):
        Callbacks([wrong])


class Wrong(Callback):
    def on_iteration(self, record: Any) -> Any:
        return record["answer"] if record else 1 / 0


def test_a_callback_that_fails_or_answers_otherwise_is_told_by_its_name():
    with pytest.raises(ValueError, match=r"callback Wrong raised ZeroDivisionError: .*test_callbacks.py:\d+ \(on_iter"):
        Callbacks([Wrong()]).on_iteration({})
    with pytest.raises(ValueError, match='on_iteration of callback Wrong must return "stop" or None, got False'):
        Callbacks([Wrong()]).on_iteration({"answer": False})


def test_a_method_that_is_never_called_is_told(caplog: pytest.LogCaptureFixture):
    class Mistyped(Witness):
        def on_iteratoin(self, record: Any) -> None: ...

    Callbacks([Mistyped()])
    assert caplog.messages == [
        "callback Mistyped has a method on_iteratoin, which is never called; those that are called are on_iteration, "
        "on_evaluation, on_checkpoint"
    ]
    given: Any = Mistyped()
    with pytest.raises(ValueError, match=r"^callbacks is a list of them, got Mistyped; put it into a list"):
        Callbacks(given)
