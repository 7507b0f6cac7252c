"""Captions and prompt files: a grammar that reads what it writes, a split that never moves, mistakes named by line."""

import itertools
from pathlib import Path

import pytest

from adascope_fast import prompts
from adascope_fast.prompts import scenes
from adascope_fast.prompts.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, Scene

# Every 43rd held-out caption in alphabetical order, written down once: the published models have never seen them.
PINNED = [
    "a large blue circle on a grey background",
    "a large red circle at the left on a beige background",
    "a small orange cross on a white background",
    "three large orange squares on a white background",
]


def test_every_combination_is_said_once_and_read_back():
    every = scenes.every_scene()
    combinations = len(SIZES) * len(COLOURS) * len(SHAPES) * len(BACKGROUNDS)
    assert len(every) == combinations * (1 + len(POSITIONS) + 2) == 1536
    assert len({scene.caption for scene in every}) == 1536
    for scene in every:
        assert scenes.parse(scene.caption) == scene


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        ("two small red circles on a grey background", Scene(2, "small", "red", "circle", "grey")),
        (
            "a large blue square at the left on a white background",
            Scene(1, "large", "blue", "square", "white", "left"),
        ),
        ("three large green crosses on a beige background", Scene(3, "large", "green", "cross", "beige")),
        ("  A small  purple triangle in the centre on a black background. ",
         Scene(1, "small", "purple", "triangle", "black", "centre")),
    ],
)  # fmt: skip
def test_captions_mean_what_they_say(caption: str, scene: Scene):
    assert scenes.parse(caption) == scene


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle",
        "four small red circles on a grey background",
        "two small red circle on a grey background",
        "a small pink circle on a grey background",
        "two small red circles at the top on a grey background",
        "a small red circle on a grey background and more",
    ],
)
def test_what_the_grammar_cannot_say_is_refused_with_the_words_it_knows(caption: str):
    with pytest.raises(ValueError, match=r"scene captions read .* colours: red, orange, .* backgrounds: white, grey"):
        scenes.parse(caption)


def test_the_split_is_disjoint_complete_and_never_moves():
    train, held_out = scenes.captions("train"), scenes.captions("held_out")
    assert (len(train), len(held_out)) == (1536 - 172, 172)
    assert set(train) | set(held_out) == {scene.caption for scene in scenes.every_scene()}
    assert not set(train) & set(held_out)
    assert sorted(held_out)[::43] == PINNED
    assert {word for caption in held_out for word in caption.split()} == {
        word for caption in train for word in caption.split()
    }, "a held-out caption combines words that training knows"


def test_the_order_of_captions_is_drawn_from_the_seed():
    assert scenes.captions("train") == scenes.captions("train", seed=0) != scenes.captions("train", seed=1)
    assert prompts.load("scenes:held_out") == scenes.captions("held_out")
    first = {scene.caption for scene in itertools.islice(scenes.every_scene(), 48)}
    assert len(first & set(scenes.captions("train")[:48])) < 12, "the first ones are not all of one kind"


@pytest.mark.parametrize("source", ["scenes:test", "scenes:all"])
def test_an_unknown_split_is_refused(source: str):
    with pytest.raises(ValueError, match="a scenes split is 'train' or 'held_out', got"):
        prompts.load(source)


def test_a_prompt_file_has_one_prompt_a_line(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n  a déjà-vu dog  \r\nüber\n", encoding="utf-8")
    assert prompts.load(str(path)) == ["a cat", "a déjà-vu dog", "über"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a prompt file has one prompt a line, .*prompts\.txt is empty; add at least one"),
        (b"\n \t\r\n\r", r"a prompt file has one prompt a line, .*prompts\.txt is empty; add at least one"),
        (b"a cat\n" + b"x" * 10_000, r"at most 2000 characters, line 2 of .*prompts\.txt has 10000; shorten it"),
        (
            b"caf\xe9\n",
            r"files are UTF-8 text, line 1 of .*prompts\.txt has the byte 0xe9, which is none; save it as UTF-8",
        ),
    ],
)
def test_a_bad_prompt_file_is_refused_by_line(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prompts.load(str(path))


@pytest.mark.parametrize("source", ["missing.txt", "scenes", "scenes:", ".", ""])
def test_a_source_that_is_no_file_is_refused(source: str):
    with pytest.raises(
        ValueError, match=r"prompts are scenes:train, .*, datasets:owner/name or a text file, got .*; check"
    ):
        prompts.load(source)


def test_the_longest_prompt_is_2000_characters():
    assert prompts.checked(" " + "x" * 2000 + " ", "--prompt") == "x" * 2000
    with pytest.raises(ValueError, match="--prompt has 2001; shorten it"):
        prompts.checked("x" * 2001, "--prompt")
