"""Rewards that take (images, prompts, metadata) are handed it in trainings, in Python and in sets of preferences."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from command_line import TINY, call
from small_runs import CAPTIONS, SMALLEST
from torch import Tensor

from adascope_fast import rewards
from adascope_fast.config import Config
from adascope_fast.training import origin
from adascope_fast.training.trainer import Trainer

IMAGES = torch.rand(3, 3, 4, 4)

ASKS = """
SEEN = []

def score(images, prompts, metadata):
    SEEN.extend(zip(prompts, metadata))
    metadata[0]["changed"] = True
    return images[:, 0].mean((1, 2)) * metadata[0]["weight"]
"""


def _asking(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.tensor([float(one.get("value", -1)) for one in metadata])


def test_each_prompt_has_its_own_metadata_and_the_reward_a_copy():
    seen: list[Any] = []

    def spoils(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        seen.append(copy.deepcopy(metadata))
        for one in metadata:
            one.get("inner", []).append(3)
            one["value"] = 7
        return images[:, 0, 0, 0]

    reward = rewards.given(spoils)
    assert rewards.takes_metadata(reward)
    known = {"a": {"value": 1, "inner": []}, "b": {"value": 2}}
    rewards.hand_metadata(reward, known)
    for _ in range(2):
        rewards.score(reward, IMAGES, ["a", "c", "b"])
    assert known == {"a": {"value": 1, "inner": []}, "b": {"value": 2}}
    assert seen == [[{"value": 1, "inner": []}, {}, {"value": 2}]] * 2


def test_others_are_told_nothing():
    def plain(images: Tensor, prompts: list[str]) -> Tensor:
        return images[:, 0, 0, 0]

    reward = rewards.given(plain)
    assert not rewards.takes_metadata(reward)
    rewards.hand_metadata(reward, {"a": {}})


def test_a_mixed_reward_hands_it_to_the_parts_that_take_it():
    def plain(images: Tensor, prompts: list[str]) -> Tensor:
        return images[:, 0].mean((1, 2))

    weights = {"asking": 1.0, "plain": 1.0}
    made: Any = {"asking": _asking, "plain": plain}
    mixed: Any = rewards.Mixed(made, weights)
    assert rewards.takes_metadata(mixed)
    rewards.hand_metadata(mixed, {"a": {"value": 5}})
    assert mixed.parts(IMAGES, ["a", "b", "a"])["asking"].tolist() == [5, -1, 5]
    assert not rewards.takes_metadata(rewards.Mixed({"one": plain, "two": plain}, {"one": 1.0, "two": 1.0}))


def test_a_run_and_a_set_of_preferences_hand_over_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "asks_for_metadata.py").write_text(ASKS)
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    module: Any = importlib.import_module("asks_for_metadata")
    for name, caption, weight in (("train", CAPTIONS[0], 2.0), ("held_out", CAPTIONS[1], 3.0)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": caption, "weight": weight}) + "\n")
    keys = [f"prompts.{name}={tmp_path / name}.jsonl" for name in ("train", "held_out")]
    keys += ["reward.name=asks_for_metadata:score"]
    assert call("train", TINY, *SMALLEST, *keys, f"run.folder={tmp_path / 'run'}").code == 0
    told = {prompt: one["weight"] for prompt, one in module.SEEN}
    assert told == {CAPTIONS[0]: 2.0, CAPTIONS[1]: 3.0}
    assert all(one.keys() <= {"weight", "changed"} for _, one in module.SEEN)
    module.SEEN.clear()
    made = call("make-preferences", TINY, *SMALLEST, *keys, "--out", tmp_path / "set", "--pairs", "1")
    assert made.code == 0, made
    assert {prompt: one["weight"] for prompt, one in module.SEEN} == {CAPTIONS[0]: 2.0}
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": CAPTIONS[0], "weight": 2.5}) + "\n")
    resumed = call("train", "--resume", tmp_path / "run", "train.iterations=9")
    assert resumed.code == 2
    assert "train prompts" in resumed.err.splitlines()[-1].replace("_", " ")


class Remembering:
    name = "remembering"
    known: ClassVar[dict[str, Any]] = {}

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images[:, 0].mean((1, 2))

    def take_metadata(self, metadata: Mapping[str, Any]) -> None:
        self.known.update(metadata)


def test_lists_in_python_may_have_metadata(tmp_path: Path):
    train: Any = [{"prompt": CAPTIONS[0], "tag": "one"}, "another"]
    config = Config.load(TINY, [*SMALLEST, f"run.folder={tmp_path / 'run'}"])
    trainer = Trainer(config, reward=Remembering(), train_prompts=train, held_out_prompts=CAPTIONS[1:], quiet=True)
    assert trainer.train_prompts == [CAPTIONS[0], "another"]
    assert Remembering.known == {CAPTIONS[0]: {"tag": "one"}}


def test_metadata_that_has_changed_is_another_list_of_prompts():
    def digest(**metadata: Any) -> str:
        return origin.of_prompts(["a", "b"], is_given=False, metadata=metadata).digest

    assert digest() == origin.of_prompts(["a", "b"], is_given=False).digest == digest(c={"x": 1})
    assert len({digest(), digest(a={"x": 1}), digest(a={"x": 2}), digest(b={"x": 1})}) == 4


def test_a_reward_that_fails_over_its_metadata_is_one_line():
    class Strict(Remembering):
        def take_metadata(self, metadata: Mapping[str, Any]) -> None:
            raise KeyError("x")

    with pytest.raises(ValueError, match=r"reward 'remembering' raised KeyError"):
        rewards.hand_metadata(rewards.given(Strict()), {})
