"""Which prompts are trained on and which judge: never the same, and never a set that nobody named."""

import logging
import random
from pathlib import Path

import pytest

from adascope_fast import prompts
from adascope_fast.prompts import animals, scenes
from adascope_fast.prompts.settings import SETS, Prompts

HELD_OUT = ("rabbit", "deer", "bear", "beetle", "whale", "snake", "goose", "llama", "kangaroo")
SCENES = Prompts(train="scenes:train", held_out="scenes:held_out")


def test_animals_are_the_fields_45_and_every_fifth_is_held_out():
    assert len(animals.ANIMALS) == len(set(animals.ANIMALS)) == 45
    assert prompts.load("animals:held_out") == list(HELD_OUT)
    train = prompts.load("animals:train")
    assert len(train) == 36
    assert set(train) | set(animals.HELD_OUT) == set(animals.ANIMALS)
    assert train[:5] == ["cat", "dog", "horse", "monkey", "zebra"]


@pytest.mark.parametrize("name", SETS)
def test_every_built_in_set_has_two_parts_without_a_common_prompt(name: str):
    train, held_out = prompts.load(f"{name}:train"), prompts.load(f"{name}:held_out")
    assert prompts.overlap(train, held_out) is None
    with pytest.raises(ValueError, match=f"an? {name} split is 'train' or 'held_out', got 'test'; choose"):
        prompts.load(f"{name}:test")


@pytest.mark.parametrize("seed", range(20))
def test_overlap_counts_held_out_prompts_that_are_trained_on(seed: int):
    rng = random.Random(seed)
    held_out = [f"h{index}" for index in range(rng.randint(2, 9))]
    both = rng.sample(held_out, rng.randint(0, len(held_out) - 1))
    train = [f"t{index}" for index in range(5)] + both
    said = prompts.overlap(train, held_out * 2)
    if both:
        first = next(prompt for prompt in held_out if prompt in both)
        assert said == (
            f"{len(both)} of the {len(held_out)} held-out prompts are in prompts.train too, first {first!r}: the "
            "held-out reward is not of unseen prompts; take them out of one of the two"
        )
    else:
        assert said is None
    with pytest.raises(ValueError, match=f"got {len(held_out)} that are all in prompts.train, first 'h0'; take them"):
        prompts.overlap(train + held_out, held_out)


def test_lists_take_the_place_of_what_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert prompts.chosen(SCENES, train=["a"], held_out=["b "]) == (["a"], ["b"])
    caption = scenes.captions("train")[0]
    assert prompts.chosen(SCENES, train=[caption])[1] == scenes.captions("held_out")
    (tmp_path / "mine.txt").write_text("a\nb\n")
    named = Prompts(train="animals:train", held_out=str(tmp_path / "mine.txt"))
    with caplog.at_level(logging.WARNING):
        assert prompts.chosen(named, train=["b", "c"], held_out=["a", "b"]) == (["b", "c"], ["a", "b"])
    assert "1 of the 2 held-out prompts are in prompts.train too" in caplog.text


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        (
            SCENES,
            {"train": ["a cat"]},
            "must be 2 or more and leave one to train on, got 0.1 of the 1 different ones of",
        ),
        (SCENES, {"train": []}, "train_prompts needs at least one prompt, got an empty list"),
        (SCENES, {"train": ["a", "a\nb"]}, r"train_prompts\[1\] has the control character U\+000A"),
        (SCENES, {"train": "a cat", "held_out": ["b"]}, "train_prompts is a list of prompts, got one text, 'a cat'"),
        (SCENES, {"train": ["a"], "held_out": ["a"]}, "never trained on, got 1 that are all in prompts.train"),
        (Prompts(), {}, "prompts.train must be named where model.name is no embedded model"),
        (Prompts(), {"train": ["a"]}, "got 0.1 of the 1 different ones of train_prompts; add prompts, or name others"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: Prompts, given: dict, message: str):
    with pytest.raises(ValueError, match=message):
        prompts.chosen(settings, **given)


def test_captions_that_the_scenes_reward_cannot_judge_are_counted():
    known = scenes.captions("train")[:3]
    scenes.refuse_others(known, "prompts.train")
    with pytest.raises(ValueError, match=r"got 2 others in prompts.train, first 'cat'; choose another reward"):
        scenes.refuse_others([*known, "cat", "dog"], "prompts.train")


@pytest.mark.parametrize(("key", "value"), [("held_out_share", 0.2), ("seed", 3)])
def test_how_to_divide_is_refused_where_nothing_is_divided(key: str, value: float):
    settings = SCENES.model_copy(update={key: value})
    with pytest.raises(ValueError, match=rf"^prompts\.{key} says which .*, got {value} with the held-out prompts sc"):
        prompts.named(settings)
    with pytest.raises(ValueError, match="with the held-out prompts held_out_prompts; remove it"):
        prompts.chosen(settings, train=["a"], held_out=["b"])
    train, held_out = prompts.chosen(settings, train=[f"mine {index}" for index in range(20)])
    assert len(train) + len(held_out) == 20
