"""What `Trainer` takes: names, paths, pipelines and configurations, prompts as one list, settings as arguments."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_runs import TINY, redness

from adascope_fast import Trainer
from adascope_fast.config import Config
from adascope_fast.training.starting import start_of

PROMPTS = [f"a large {colour} {shape}" for colour in ("red", "green", "blue", "white") for shape in "abcde"]


def test_a_name_a_reward_and_prompts_are_a_training(tmp_path: Path):
    small: dict[str, Any] = {
        "run__folder": tmp_path / "run",
        "train__iterations": 1,
        "train__prompts_per_iteration": 1,
        "sampler__num_steps": 4,
        "evaluation__samples_per_prompt": 1,
    }
    result = Trainer("scenes", reward="jpeg_compressibility", prompts=PROMPTS, quiet=True, **small).train()
    assert result.reward == "jpeg_compressibility"
    assert result.after["num_images"] == 2
    parts = json.loads((tmp_path / "run" / "parts.json").read_text())
    assert parts["parts"]["train_prompts"]["is_given"] is True


def test_a_name_is_a_model_with_the_defaults_of_everything_else():
    assert start_of("scenes-flow", {}).config == Config.of({"model": {"name": "scenes-flow"}})


def test_a_path_is_a_configuration():
    assert start_of(TINY, {}).config == start_of(str(TINY), {}).config == Config.load(TINY)


def test_a_pipeline_is_trained_with_the_defaults():
    pipeline = SimpleNamespace(components={"unet": None})
    start = start_of(pipeline, {"train__iterations": 3})
    assert start.pipeline is pipeline
    assert start.config == Config.of({"train": {"iterations": 3}})


def test_settings_replace_those_of_a_configuration():
    config = Config.load(TINY)
    start = start_of(config, {"train__iterations": 3, "log__trackers": ("wandb",), "run__folder": Path("runs/x")})
    assert start.config == config.changed(["train.iterations=3", "log.trackers=['wandb']", "run.folder=runs/x"])
    assert start_of(config, {}).config is config


def test_a_setting_is_taken_as_it_is_and_not_as_toml():
    assert start_of("scenes", {"run__folder": "3"}).config.run.folder == "3"
    with pytest.raises(ValueError, match=r'train\.iterations must be a whole number, got "3"'):
        start_of("scenes", {"train__iterations": "3"})


def test_another_choice_leaves_out_the_keys_of_the_one_before():
    config = Config.of({"selector": {"name": "adascope", "kappa": 0.5}})
    assert start_of(config, {"selector__name": "every_step"}).config.selector.name == "every_step"


def test_a_table_is_reached_by_more_names():
    parts = {"jpeg_compressibility": 1.0, "scene_attributes": 2.0}
    start = start_of("scenes", {"reward__parts": parts}, reward="mixed")
    assert start.config.reward.name == "mixed"
    changed = start_of(start.config, {"reward__parts__scene_attributes": 3.0}).config.reward
    assert changed.model_dump()["parts"] == parts | {"scene_attributes": 3.0}


def test_a_function_is_the_reward_and_a_name_is_that_of_the_configuration():
    assert start_of("scenes", {}, reward=redness).reward is redness
    named = start_of("scenes", {"reward__clip": "scenes-clip"}, reward="clip_similarity")
    assert named.reward is None
    assert named.config.reward.model_dump()["clip"] == "scenes-clip"


def test_prompts_are_those_to_train_on_and_others_are_held_out_besides():
    assert start_of("scenes", {}, prompts=PROMPTS).train_prompts == PROMPTS
    whole = start_of("scenes", {}, prompts=PROMPTS, held_out_prompts=["another"])
    assert (whole.train_prompts, whole.held_out_prompts) == (PROMPTS, ["another"])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"first": "sd155"}, "a configuration is a .toml file, or a preset: .*; got 'sd155', did you mean sd15"),
        ({"first": 3}, "Trainer takes a Config, the name or path .*, got int; for example"),
        ({"first": "scenes", "settings": {"iterations": 3}}, "such as train__iterations=5 .*, got iterations=; name"),
        ({"first": "scenes", "settings": {"train__iteratons": 3}}, "unknown key train.iteratons = 3; did you mean"),
        ({"first": "scenes", "prompts": "a cat"}, "prompts is a list of texts, got 'a cat'; put it into a list"),
        ({"first": "scenes", "prompts": PROMPTS, "train_prompts": PROMPTS}, "got both; leave one out"),
        ({"first": SimpleNamespace(components={}), "pipeline": object()}, "a pipeline is given once"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, Any], line: str):
    given = {"settings": {}} | given
    with pytest.raises(ValueError, match=line):
        start_of(given.pop("first"), given.pop("settings"), **given)
