"""A set of preferences on disk: what is read, how pictures come to the model's size, and one line for each mistake."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from preference_sets import CAPTIONS, write_judged, write_lines, write_pairs, write_picture

from adascope_fast.preferences import files
from adascope_fast.preferences.files import read_judged, read_pairs


def test_pairs_are_read_in_the_order_of_their_lines(tmp_path: Path):
    found = read_pairs(write_pairs(tmp_path, 4))
    assert found.prompts == [*CAPTIONS, CAPTIONS[0]]
    assert [record.chosen.path.name for record in found.records] == [f"{number}a.png" for number in range(4)]
    assert [record.rejected.path.name for record in found.records] == [f"{number}b.png" for number in range(4)]
    assert found.name == f"4 pairs, {CAPTIONS[0]!r} first"


def test_labels_are_read_and_pairs_are_labels_too(tmp_path: Path):
    found = read_judged(write_judged(tmp_path / "labelled", 4))
    assert [one.is_liked for one in found.records] == [True, True, False, True]
    assert found.name == f"4 labelled pictures, {CAPTIONS[0]!r} first"
    pairs = read_judged(write_pairs(tmp_path / "pairs", 2))
    told = [(one.prompt, one.image.path.name, one.is_liked) for one in pairs.records]
    assert told == [
        (CAPTIONS[0], "0a.png", True),
        (CAPTIONS[0], "0b.png", False),
        (CAPTIONS[1], "1a.png", True),
        (CAPTIONS[1], "1b.png", False),
    ]


def test_a_picture_is_its_middle_square_averaged(tmp_path: Path):
    """Twice as high and twice as fine as wanted: rows 2 to 5 of 8, each 2 x 2 pixels about their mean."""
    pixels = np.arange(8 * 4 * 3, dtype=np.uint8).reshape(8, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    write_picture(tmp_path / "1.png", 1)
    write_lines(tmp_path / "preferences.jsonl", [{"prompt": CAPTIONS[0], "chosen": "0.png", "rejected": "1.png"}])
    image = read_pairs(tmp_path).records[0].chosen
    assert np.array_equal(image.pixels(4), pixels[2:6])
    half = image.pixels(2)
    want = pixels[2:6].astype(float).reshape(2, 2, 2, 2, 3).mean((1, 3))
    assert np.abs(half - want).max() <= 4, "the filter is a triangle, a little wider than a mean of four"
    assert half.shape == (2, 2, 3)


def test_kinds_of_pictures_and_what_is_transparent(tmp_path: Path):
    for number, (name, mode) in enumerate({"a.jpg": "L", "b.webp": "RGB", "c.png": "P"}.items()):
        write_picture(tmp_path / name, number, mode=mode)
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    lines = [
        {"prompt": CAPTIONS[0], "chosen": "a.jpg", "rejected": "b.webp"},
        {"prompt": CAPTIONS[0], "chosen": "c.png", "rejected": "clear.png", "comment": "other keys are not used"},
    ]
    write_lines(tmp_path / "preferences.jsonl", lines)
    found = read_pairs(tmp_path)
    assert (found.records[1].rejected.pixels(8) == 255).all(), "on white, and not the colour below"
    for image in (found.records[0].chosen, found.records[0].rejected, found.records[1].chosen):
        assert image.pixels(16).shape == (16, 16, 3)


def _line(**changes: Any) -> str:
    return json.dumps({"prompt": "a cat", "chosen": "0.png", "rejected": "1.png"} | changes)


PAIRS = "preferences.jsonl"
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no JSON": (lambda f: write_lines(f / PAIRS, [_line(), "{oops"]), "line 2 of {f}/preferences.jsonl must be JSON"),
    "no object": (lambda f: write_lines(f / PAIRS, ["[1]"]), "line 1 of {f}/preferences.jsonl must be an object"),
    "no prompt": (
        lambda f: write_lines(f / PAIRS, ['{"text": "a"}']),
        'line 1 of {f}/preferences.jsonl must have "prompt"',
    ),
    "empty prompt": (
        lambda f: write_lines(f / PAIRS, [_line(), "", _line(prompt=" ")]),
        "a prompt has at least one character, that of line 3 of {f}/preferences.jsonl is empty",
    ),
    "prompt is no text": (lambda f: write_lines(f / PAIRS, [_line(prompt=3)]), "a prompt is text, that of line 1"),
    "no picture named": (lambda f: write_lines(f / PAIRS, [_line(rejected=None)]), 'must have "rejected", the path of'),
    "missing file": (
        lambda f: write_lines(f / PAIRS, [_line(chosen="9.png")]),
        "each picture must be a file, '9.png' (line 1 of {f}/preferences.jsonl) is none",
    ),
    "leaves by dots": (
        lambda f: write_lines(f / PAIRS, [_line(chosen="../0.png")]),
        "(line 1 of {f}/preferences.jsonl) leaves it",
    ),
    "absolute": (lambda f: write_lines(f / PAIRS, [_line(chosen=str(f / "0.png"))]), "leaves it; move it there"),
    "leaves by a link": (
        lambda f: (
            (f / "link").symlink_to(f.parent),
            write_lines(f / PAIRS, [_line(chosen="link/set/0.png"), _line(chosen="link/x")]),
        ),
        "'link/x' (line 2 of {f}/preferences.jsonl) leaves it",
    ),
    "damaged": (
        lambda f: (f / "1.png").write_bytes((f / "1.png").read_bytes()[:2000]),
        "'1.png' (line 1 of {f}/preferences.jsonl) cannot be read",
    ),
    "no picture": (lambda f: (f / "1.png").write_text("hello"), "cannot be read (no such picture)"),
    "another format": (
        lambda f: Image.new("RGB", (40, 40)).save(f / "1.png", format="GIF"),
        "whole PNG, JPEG or WebP file",
    ),
    "16 bits": (
        lambda f: Image.fromarray(np.zeros((40, 40), np.uint16)).save(f / "1.png"),
        "8 bits a channel, '1.png' (line 1 of {f}/preferences.jsonl) has the mode I;16",
    ),
    "too long": (
        lambda f: write_picture(f / "1.png", 1, size=(120, 50)),
        "'1.png' (line 1 of {f}/preferences.jsonl) has 120 x 50",
    ),
    "twice the same": (lambda f: write_lines(f / PAIRS, [_line(rejected="0.png")]), "names '0.png' twice"),
    "scores the other way": (
        lambda f: write_lines(f / PAIRS, [_line(chosen_score=0.1, rejected_score=2)]),
        "line 1 of {f}/preferences.jsonl has 0.1 for it and 2 for the other",
    ),
    "score is no number": (lambda f: write_lines(f / PAIRS, [_line(chosen_score="good")]), '"chosen_score" of line 1'),
    "empty": (lambda f: write_lines(f / PAIRS, [""]), "a set has at least one line, {f}/preferences.jsonl is empty"),
    "no UTF-8": (lambda f: (f / PAIRS).write_bytes(b"\xff\xfe"), "{f}/preferences.jsonl must be UTF-8"),
    "no list": (lambda f: (f / PAIRS).unlink(), "pairs are listed in preferences.jsonl"),
    "labels alone": (
        lambda f: ((f / PAIRS).unlink(), write_judged(f)),
        "a folder with labelled.jsonl alone; make one with",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line_that_names_file_and_line(tmp_path: Path, name: str):
    folder = tmp_path / "set"
    for number in range(2):
        write_picture(folder / f"{number}.png", number)
    write_lines(folder / PAIRS, [_line()])
    read_pairs(folder)
    spoil, told = WRONG[name]
    spoil(folder)
    with pytest.raises(ValueError, match=re.escape(told.replace("{f}", str(folder)))) as raised:
        read_pairs(folder)
    line = str(raised.value)
    assert "\n" not in line
    assert ";" in line, "and the next step"


def test_a_label_is_true_or_false(tmp_path: Path):
    write_judged(tmp_path)
    write_lines(tmp_path / "labelled.jsonl", [{"prompt": "a", "image": "0.png", "label": 1}])
    with pytest.raises(ValueError, match=r'line 1 of .*labelled.jsonl must have "label", true or false, got 1; write'):
        read_judged(tmp_path)


@pytest.mark.parametrize("read", [read_pairs, read_judged])
def test_a_folder_that_is_none_names_the_remedy(tmp_path: Path, read: Callable):
    (tmp_path / "file").write_text("")
    for given, told in ((None, "got none"), (tmp_path / "x", "which is not there"), (tmp_path / "file", "is a file")):
        with pytest.raises(ValueError, match=rf"{told}; make one with: adascope-fast make-preferences"):
            read(given)


def test_damage_behind_the_looked_at_is_told_when_it_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_pairs(tmp_path, 2)
    path = tmp_path / "pictures" / "1b.png"
    path.write_bytes(path.read_bytes()[:2000])
    monkeypatch.setattr(files, "LOOKED_AT", 2)
    found = read_pairs(tmp_path)
    with pytest.raises(ValueError, match=r"'pictures/1b.png' \(line 2 of .*preferences.jsonl\) cannot be read"):
        found.records[1].rejected.pixels(8)


def test_a_picture_less_than_half_the_models_size_is_refused(tmp_path: Path):
    found = read_pairs(write_pairs(tmp_path, 1))
    found.refuse_small(96)
    with pytest.raises(
        ValueError, match=r"half of the model's 97 pixels, 'pictures/0a.png' \(line 1 of .* has 48 x 48"
    ):
        found.refuse_small(97)


def test_the_digest_tells_another_list_and_another_picture(tmp_path: Path):
    folder = write_pairs(tmp_path, 2)
    before = read_pairs(folder).digest
    assert read_pairs(folder).digest == before
    write_picture(folder / "pictures" / "1a.png", 77, size=(50, 50))
    changed = read_pairs(folder).digest
    assert changed != before
    write_lines(folder / "preferences.jsonl", (folder / "preferences.jsonl").read_text().splitlines()[:1])
    assert read_pairs(folder).digest not in (before, changed)


def test_reading_a_set_needs_no_torch():
    program = "import sys, adascope_fast.preferences.files as files; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
