"""What the embedded models draw: the measure on drawings, and the published figures on the shipped weights."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adascope_fast import backbones
from adascope_fast.pretraining.drawing import draw
from adascope_fast.prompts.scenes import Scene

FOLDER = Path(__file__).parents[2] / "experiments" / "embedded_models"
PUBLISHED = json.loads((FOLDER / "results" / "pictures.json").read_text())


@pytest.fixture(scope="module")
def experiment() -> Any:
    spec = importlib.util.spec_from_file_location("experiment_pictures", FOLDER / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_outline_is_one_of_the_four_shapes_whichever_the_caption_asks_for(experiment: Any):
    scene = Scene(1, "large", "red", "square", "white", "centre")
    right, blank = draw([scene], 3)[0], torch.full((3, 64, 64), 0.9)
    blob = blank.clone()
    blob[:, 20:44, 28:36] = torch.tensor([0.8, 0.1, 0.1])[:, None, None]  # thrice as high as wide: stretched too far
    asked = [scene.caption, scene.caption, scene.caption, replace(scene, shape="circle").caption]
    found = experiment.judged(torch.stack([right, blank, blob, right]), asked)
    assert found["outlines"] == 0.5, "both squares"
    assert found["shape"] == 0.25, "one of them was asked for"
    assert found["background"] == 1.0


def test_the_autoencoder_gives_back_most_shapes(experiment: Any):
    """The ceiling of any denoiser: on one picture a caption; a standard error is 0.03."""
    assert experiment.ceiling(0.0, 1)["shape"] == pytest.approx(PUBLISHED["autoencoder"]["noise 0.0"]["shape"], abs=0.1)
    assert experiment.ceiling(3.0, 1)["shape"] < 0.3, "from latents that are mostly noise"


@pytest.mark.slow
@pytest.mark.parametrize("name", backbones.EMBEDDED)
def test_the_shipped_models_draw_as_published_and_leave_room_for_rl(experiment: Any, name: str):
    published = PUBLISHED["models"][name]["guidance 1"]
    found = experiment.of_model(name, 1.0, 1)  # 172 pictures: a standard error of at most 0.038
    assert found.keys() == published.keys()
    for key, value in found.items():
        assert value == pytest.approx(published[key], abs=0.13 if key != "position" else 0.17), key  # of 101 captions
    assert 0.40 < found["mean"] < 0.80
