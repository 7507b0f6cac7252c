"""Folders of images as `judge` compares them, and its server."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image

from adascope_fast.judging import Comparison, arms_of, compare
from adascope_fast.judging.pages import MOST_BYTES, comparing
from adascope_fast.judging.questions import QUESTIONS
from adascope_fast.judging.results import votes_in
from adascope_fast.serving import Aside

PROMPTS = ["a small red circle", "two blue crosses", "a green square on white"]
TOKEN = "0123456789abcdef"


def write_arm(folder: Path, prompts: Sequence[str] = PROMPTS, *, seeds: Sequence[int] = (0, 1), shade: int = 0) -> Path:
    """A folder with an image of noise for each prompt and seed, other ones for another `shade`."""
    folder.mkdir(parents=True)
    lines = []
    for place, prompt in enumerate(prompts):
        for seed in seeds:
            random = np.random.default_rng([shade, place, seed])
            name = f"{place:04}_{seed}.png"
            PIL.Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name)
            lines.append(json.dumps({"file_name": name, "prompt": prompt, "seed": seed}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def arms(tmp_path: Path, names: Sequence[str] = ("quokka", "zebra"), *, shade_from: int = 0, **more: Any) -> list[Path]:
    """One such folder for each name."""
    return [write_arm(tmp_path / name, shade=shade_from + place, **more) for place, name in enumerate(names)]


def comparison_of(paths: Sequence[Path], *, num: int | None = None, seed: int = 0) -> Comparison:
    return compare(arms_of(paths), num=num, seed=seed)


@contextmanager
def served(
    comparison: Comparison, out: Path, num_questions: int = len(QUESTIONS)
) -> Iterator[tuple[str, httpx.Client]]:
    """The address with the token, and a client that has it."""
    comparison.keep_in(out)
    app = comparing(comparison, QUESTIONS[:num_questions], votes_in(out))
    server = Aside(app, host="127.0.0.1", port=0, token=TOKEN, most_bytes=MOST_BYTES)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    try:
        with httpx.Client(base_url=server.address, headers=headers) as client:
            yield f"{server.address}/?token={TOKEN}", client
    finally:
        server.stop()
