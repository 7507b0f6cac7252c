"""Sets of preferences small enough to be written by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CAPTIONS = [
    "a large red circle on a grey background",
    "two small blue crosses on a black background",
    "a small green square at the top on a white background",
]


def write_picture(path: Path, number: int, *, size: tuple[int, int] = (48, 48), mode: str = "RGB") -> None:
    """A picture of `size` (width, height) whose pixels tell its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def write_lines(path: Path, lines: Sequence[Mapping[str, Any] | str]) -> None:
    """A file of JSON lines; a text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))


def write_pairs(folder: Path, count: int = 4) -> Path:
    """A set of pairs of random pictures."""
    lines = []
    for number in range(count):
        names = [f"pictures/{number}{kind}.png" for kind in "ab"]
        for offset, name in enumerate(names):
            write_picture(folder / name, 2 * number + offset)
        lines.append({"prompt": CAPTIONS[number % 3], "chosen": names[0], "rejected": names[1]})
    write_lines(folder / "preferences.jsonl", lines)
    return folder


def write_judged(folder: Path, count: int = 6) -> Path:
    """A set of labelled random pictures; every third is disliked."""
    lines = []
    for number in range(count):
        write_picture(folder / f"{number}.png", number)
        lines.append({"prompt": CAPTIONS[number % 3], "image": f"{number}.png", "label": number % 3 != 2, "score": 0.5})
    write_lines(folder / "labelled.jsonl", lines)
    return folder
