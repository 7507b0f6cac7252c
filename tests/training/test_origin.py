"""What a run was made of: the same is the same, and every change of a kind that matters is seen."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from adascope_fast import backbones
from adascope_fast.algorithms.policy_gradient import grpo
from adascope_fast.config import ConfigError
from adascope_fast.rewards import ClipSimilarity, SceneAttributes
from adascope_fast.selectors.simple import StaticRange
from adascope_fast.training import origin


def red(images, prompts):
    return images[:, 0].mean((1, 2))


def scaled(images, prompts, scale=1.0):
    return red(images, prompts) * scale


def _liking(colour: str) -> Any:
    def reward(images, prompts):
        return red(images, prompts) if colour == "red" else -red(images, prompts)

    return reward


class Likes:
    """A reward with a setting, and a count that is none."""

    def __init__(self, colour: str) -> None:
        self.colour, self.num_calls = colour, 0

    def __call__(self, images, prompts):
        self.num_calls += 1
        return red(images, prompts)


@dataclass
class Weighed:
    weight: float

    def __call__(self, images, prompts):
        return self.weight * red(images, prompts)


class Judge(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(300, 1)


class Holder:
    def __init__(self, seed: int) -> None:
        self.model = Judge(seed)

    def __call__(self, images, prompts):
        return red(images, prompts)


def _compiled(body: str) -> Any:
    names: dict[str, Any] = {"__name__": "typed"}
    exec(f"def reward(images, prompts):\n    return {body}", names)
    return names["reward"]


KINDS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "function": (lambda: red, lambda: scaled),
    "lambda": (lambda: lambda images, prompts: images, lambda: lambda images, prompts: -images),
    "closure": (lambda: _liking("red"), lambda: _liking("blue")),
    "partial": (lambda: functools.partial(scaled, scale=1.0), lambda: functools.partial(scaled, scale=2.0)),
    "method": (lambda: Likes("red").__call__, lambda: Likes("blue").__call__),
    "setting": (lambda: Likes("red"), lambda: Likes("blue")),
    "dataclass": (lambda: Weighed(1.0), lambda: Weighed(2.0)),
    "network": (lambda: Judge(0), lambda: Judge(1)),
    "inside": (lambda: Holder(0), lambda: Holder(1)),
    "no source": (lambda: _compiled("images"), lambda: _compiled("images.mean()")),
    "algorithm": (lambda: grpo(clip_range=0.1), lambda: grpo(clip_range=0.2)),
    "selector": (lambda: StaticRange(start=1, end=3), lambda: StaticRange(start=1, end=4)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_ones_are_equal_and_others_are_not(kind: str):
    one, other = KINDS[kind]
    first = one()
    found = origin.of_object(first, is_given=True)
    assert origin.differences({"reward": found}, {"reward": origin.of_object(first, is_given=True)}) == []
    if kind != "lambda":  # each has a line of its own
        assert origin.differences({"reward": found}, {"reward": origin.of_object(one(), is_given=True)}) == []
    assert origin.differences({"reward": found}, {"reward": origin.of_object(other(), is_given=True)})


def test_what_a_reward_counts_is_no_change():
    reward = Likes("red")
    before = origin.of_object(reward, is_given=True)
    reward(torch.zeros(1, 3, 2, 2), ["a"])
    assert origin.of_object(reward, is_given=True) == before


def test_names_say_what_it_is():
    assert origin.of_object(red, is_given=True).name == f"{__name__}:red"
    part = origin.of_object(SceneAttributes(), is_given=False)
    assert part == origin.Part("adascope_fast.rewards.scene_attributes:SceneAttributes", "", is_given=False)
    assert origin.of_object(ClipSimilarity.load(), is_given=False).digest, "its weights"
    assert origin.of_prompts(["a cat"], is_given=True).name == "1 prompt, 'a cat' first"


def test_one_changed_prompt_is_seen():
    prompts = [f"a {number}" for number in range(500)]
    before = {"train_prompts": origin.of_prompts(prompts, is_given=False)}
    assert origin.differences(before, {"train_prompts": origin.of_prompts(list(prompts), is_given=False)}) == []
    for other in ([*prompts[:250], "another", *prompts[251:]], prompts[::-1], prompts[:-1]):
        assert origin.differences(before, {"train_prompts": origin.of_prompts(other, is_given=False)})


def _plain() -> Any:
    return DiffusionPipeline.from_pretrained(backbones.folder_of("scenes"))


def _change_weights(pipeline: Any) -> None:
    with torch.no_grad():
        pipeline.unet.conv_in.weight += 1e-3


def _change_decoder(pipeline: Any) -> None:
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.bias.fill_(1.0)


def _change_scheduler(pipeline: Any) -> None:
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type="sample")


@pytest.mark.parametrize("change", [_change_weights, _change_decoder, _change_scheduler])
def test_another_pipeline_is_seen(change: Callable[[Any], None]):
    part, pipeline = _part(_plain()), _plain()
    assert _part(pipeline) == part
    change(pipeline)
    (line,) = origin.differences({"pipeline": part}, {"pipeline": _part(pipeline)})
    assert line == "pipeline is called mine as before, but is not what it was"


def _part(pipeline: Any, dtype: torch.dtype = torch.float32) -> origin.Part:
    return origin.of_pipeline(pipeline.components, "mine", dtype, is_given=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_and_the_type_it_is_read_in_are_no_change(dtype: str):
    kept = getattr(torch, dtype)
    plain = _part(backbones.load("scenes", dtype=dtype).pipeline, kept)
    assert _part(backbones.load("scenes", dtype=dtype, lora_rank=3).pipeline, kept) == plain
    assert _part(backbones.load("scenes", dtype="float32").pipeline, kept) == plain
    assert _part(backbones.load("scenes", dtype=dtype, train="full").pipeline, kept) == plain


def test_a_moved_model_is_the_same_one():
    before = origin.Part("folder", "0123", is_given=False)
    assert origin.differences({"pipeline": before}, {"pipeline": origin.Part("elsewhere", "0123", False)}) == []
    assert origin.differences({"pipeline": before}, {"pipeline": origin.Part("folder", "0123", True)})


def test_it_is_written_and_read(tmp_path: Path):
    parts = {"reward": origin.of_object(red, is_given=True)}
    origin.write(tmp_path, parts, signature="abc", changes=["from iteration 2 on: x"])
    assert origin.read(tmp_path) == (parts, ["from iteration 2 on: x"], "abc")
    with pytest.raises(
        ConfigError, match=r"made in Python with reward=\S+:red, .* do it there: go\(Config.load\('.*'\), rew"
    ):
        origin.refuse_given(tmp_path, ["reward"], instead="go({config}, {arguments})")
    origin.refuse_given(tmp_path, ["pipeline"], instead="")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"parts": {"reward": 3}, "changes": [], "signature": ""}', '{"parts": []}']
)
def test_a_damaged_record_is_named(tmp_path: Path, text: str):
    (tmp_path / origin.FILE).write_text(text)
    with pytest.raises(ConfigError, match=rf"{origin.FILE} must say what the run was made of, and it cannot be read"):
        origin.read(tmp_path)
    (tmp_path / origin.FILE).unlink()
    with pytest.raises(ConfigError, match="No such file"):
        origin.read(tmp_path)
