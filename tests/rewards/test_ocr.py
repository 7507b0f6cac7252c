"""The OCR reward: its distance by hand, and real recognition of text drawn by Pillow."""

import sys
from typing import Any

import pytest
import torch
from command_line import TINY, refused
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from adascope_fast import rewards
from adascope_fast.rewards import settings
from adascope_fast.rewards.ocr import edit_distance, likeness, text_of


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("flaw", "lawn", 2),
        ("same", "same", 0),
        ("ab", "ba", 2),
    ],
)
def test_edit_distances(one: str, other: str, distance: int):
    assert edit_distance(one, other) == distance


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("HELLO", "hello", 1.0),
        ("say hel lo world", "Hello", 1.0),  # contained, whatever else is there
        ("hallo", "hello", 0.8),  # 1 of 5
        ("", "hello", 0.0),
        ("hello", "hello world", 0.5),  # 5 of 10, the space does not count
        ("quite another text", "fly", 0.0),  # never below 0
    ],
)
def test_scores_by_hand(read: str, wanted: str, score: float):
    assert likeness(read, wanted) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "Open Late"', "openlate"),
        ("a sign that says \u201cOpen\u201d", "open"),
        ('"A" beside "B"', "a"),
        ("a cat's and a dog's sign", ""),
        ('an empty "" sign', ""),
        ('half "a quote', ""),
    ],
)
def test_the_text_is_the_first_one_in_double_quotes(prompt: str, text: str):
    assert text_of(prompt) == text


def _drawn(*lines: str) -> Tensor:
    image = Image.new("RGB", (256, 128), "white")
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((20, 15 + 50 * number), line, fill="navy", font=ImageFont.load_default(34))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(128, 256, 3).permute(2, 0, 1) / 255


def test_text_in_images_is_read():
    reward = rewards.load(settings.Ocr())
    images = torch.stack([_drawn("HELLO 42"), _drawn("OPEN", "LATE"), _drawn(), _drawn("HALLO 42")])
    prompts = ['the text "Hello 42"', 'a sign: "Open Late"', 'the text "Hello 42"', 'the text "Hello 42"']
    scores = rewards.score(reward, images, prompts)
    torch.testing.assert_close(scores, torch.tensor([1.0, 1.0, 0.0, 6 / 7]))
    torch.testing.assert_close(rewards.score(reward, images[3:], prompts[3:]), scores[3:])


def test_prompts_without_a_quoted_text_are_refused_before_anything_is_trained():
    said = refused("train", TINY, "reward.name=ocr")
    assert 'reads the text that a prompt quotes, as in a sign that says "OPEN", got ' in said
    assert "in prompts.train without, first '" in said


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    missing: Any = None
    monkeypatch.setitem(sys.modules, "rapidocr", missing)
    with pytest.raises(ValueError, match=r"pip install 'adascope-fast\[ocr\]'$"):
        rewards.load(settings.Ocr())
