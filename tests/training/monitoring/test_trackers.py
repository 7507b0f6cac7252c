"""What trackers are given of a run: names, numbers, images, in an order that all of them take."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import CAPTIONS, SMALLEST, TINY, lines_of, redness
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adascope_fast.config import Config
from adascope_fast.training.monitoring import trackers
from adascope_fast.training.monitoring.callbacks import HeldOut
from adascope_fast.training.monitoring.trackers import Trackers
from adascope_fast.training.trainer import Trainer


def _config(folder: Path, *overrides: str) -> Config:
    return Config.load(TINY, [*SMALLEST, f"run.folder={folder}", *overrides])


def _trainer(config: Config) -> Trainer:
    return Trainer(config, reward=redness, train_prompts=CAPTIONS[:1], held_out_prompts=CAPTIONS[1:], quiet=True)


class Recorded:
    """A tracker that keeps what it is given."""

    requires_logging_directory = False
    made: ClassVar[list["Recorded"]] = []

    def __init__(self, project: str, folder: Path | None = None, **named: str) -> None:
        self.project, self.folder, self.named, self.told = project, folder, named, []
        Recorded.made.append(self)

    def start(self) -> None:
        print("hello")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append((None, "finished"))


class WithImages(Recorded):
    def log_images(self, values: dict[str, Any], step: int, **more: Any) -> None:
        self.told.append((step, values | more))


def _recorded(monkeypatch: pytest.MonkeyPatch, name: str, kind: type[Recorded]) -> None:
    monkeypatch.setattr("adascope_fast.config.sections.find_spec", lambda module: True)
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, name, type(name, (kind,), {"name": name}))
    monkeypatch.setattr(Recorded, "made", [])


def test_tensorboard_is_given_the_numbers_and_images_of_a_run(tmp_path: Path):
    _trainer(_config(tmp_path / "run", "log.trackers=['tensorboard']", "evaluation.every=1")).train()
    (events,) = (tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    logged = accumulator.Scalars("reward_mean")
    assert [(point.step, point.value) for point in logged] == [
        (record["iteration"], pytest.approx(record["reward_mean"])) for record in lines_of(tmp_path / "run")
    ]
    assert "seconds/rollout" in accumulator.Tags()["scalars"]
    assert [point.step for point in accumulator.Scalars("held_out/mean")] == [0, 1, 2]
    images = accumulator.Images("held_out/images")
    with Image.open(tmp_path / "run" / "samples" / "before.png") as before:
        assert [(image.step, image.width, image.height) for image in images] == [(at, *before.size) for at in range(3)]


def test_steps_never_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """wandb leaves out what comes at a step before the last one."""
    _recorded(monkeypatch, "wandb", WithImages)
    _trainer(_config(tmp_path / "run", "log.trackers=['wandb']", "evaluation.every=1")).train()
    (made,) = Recorded.made
    *told, last = made.told
    assert last == (None, "finished")
    kinds = [(step, next(key for key in ("reward_mean", "held_out/mean", "held_out/images") if key in values))
             for step, values in told]  # fmt: skip
    evaluation = ["held_out/mean", "held_out/images"]
    expected = [(0, evaluation), (0, ["reward_mean"]), (1, evaluation), (1, ["reward_mean"]), (2, evaluation)]
    assert kinds == [(step, kind) for step, names in expected for kind in names]
    assert all(np.isfinite(value) for step, values in told for key, value in values.items() if key != "held_out/images")


@pytest.mark.parametrize(
    ("tracker", "argument"),
    [("wandb", "name"), ("trackio", "name"), ("swanlab", "experiment_name"), ("mlflow", "run_name"), ("aim", None)],
)
def test_trackers_have_a_project_and_the_name_of_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tracker: str,
    argument: str | None,
):
    _recorded(monkeypatch, tracker, Recorded)
    Trackers(_config(tmp_path / "first", f"log.trackers=['{tracker}']"))
    Trackers(_config(tmp_path / "first", f"log.trackers=['{tracker}']", "log.project=shapes", "log.run_name=second"))
    told = [(made.project, made.named) for made in Recorded.made]
    names = [{argument: name} if argument else {} for name in ("first", "second")]
    assert told == list(zip(("adascope-fast", "shapes"), names, strict=True))
    assert Recorded.made[0].settings["train.learning_rate"] == 0.01
    assert capsys.readouterr().out == "", "standard output is the command's result"


def test_a_name_that_no_tracker_takes_is_refused():
    for change, which in (
        ("project=shapes", "a tracker other than tensorboard"),
        ("run_name=first", "one of clearml, "),
    ):
        with pytest.raises(ValueError, match=f"log.{change.split('=')[0]} is for {which}"):
            Config.load(None, [f"log.{change}"]).log.examine()
        Config.load(None, ["log.trackers=[]", f"log.{change}"]).log.examine()


@pytest.mark.parametrize(("tracker", "shape"), [("wandb", (1,)), ("clearml", ()), ("mlflow", None)])
def test_images_come_as_one_in_the_form_that_a_tracker_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, shape: tuple[int, ...] | None
):
    _recorded(monkeypatch, tracker, Recorded if shape is None else WithImages)
    summary = {"mean": 0.5, "low": float("nan"), "attributes": {"colour": 0.25}, "spread": {"contrast": 1.0}}
    images = torch.stack([torch.full((3, 4, 4), value / 6) for value in range(6)])
    followers = Trackers(_config(tmp_path, f"log.trackers=['{tracker}']"))
    followers.on_evaluation(HeldOut(3, None, summary, images, ["a", "b", "c"]))
    (step, numbers), *shown = Recorded.made[0].told
    assert (step, numbers) == (3, {"held_out/mean": 0.5, "held_out/attributes/colour": 0.25})
    if shape is None:
        assert not shown
        return
    pixels = shown[0][1]["held_out/images"]
    assert (pixels.shape[:-3], pixels.shape[-1]) == (shape, 3)
    assert set(np.unique(pixels).tolist()) >= {0, 42, 85, 128, 170, 212}


@pytest.mark.parametrize(("tracker", "step"), [("no_such_tracker", "choose among tensorboard"), ("clearml", "pip ins")])
def test_a_tracker_that_is_not_installed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, step: str
):
    monkeypatch.setattr("adascope_fast.config.sections.find_spec", lambda name: name == "tensorboard" or None)
    with pytest.raises(ValueError, match=rf"log.trackers are installed ones \(tensorboard\), got '{tracker}'; {step}"):
        _trainer(_config(tmp_path / "run", f"log.trackers=['tensorboard', '{tracker}']")).train()
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_this_accelerate_has_not_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(trackers.LOGGER_TYPE_TO_CLASS, "trackio")
    with pytest.raises(ValueError, match="got 'trackio'; upgrade accelerate"):
        Trackers(_config(tmp_path, "log.trackers=['trackio']"))
