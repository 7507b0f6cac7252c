"""Screenshots of the judge's page for the documentation: `python tests/judging/screenshots.py`.

The images are drawn, not sampled: right ones, and ones of another colour.
"""

import json
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from arms_to_judge import TOKEN, comparison_of, served
from browser import opened

from adascope_fast.judging.pages import MOST_BYTES, rating
from adascope_fast.judging.ratings import Ratings, Stopped
from adascope_fast.pretraining.drawing import draw
from adascope_fast.prompts import scenes
from adascope_fast.serving import Aside

OUT = Path(__file__).parents[2] / "docs" / "images"
PROMPTS = ["two large red circles on a white background", "a small blue cross at the top on a grey background"]
OTHERS = ["two large yellow circles on a white background", "a large blue cross at the top on a grey background"]
DESKTOP, PHONE = {"width": 1000, "height": 780}, {"width": 360, "height": 640}


def _drawn(captions: list[str], seed: int) -> np.ndarray:
    """Pixels [n, h, w, 3] of 8 bits, four times as large as they are drawn."""
    images = draw([scenes.parse(caption) for caption in captions], seed)
    large = torch.nn.functional.interpolate(images, scale_factor=4, mode="bicubic").clamp(0, 1)
    return (large * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _write(folder: Path, captions: list[str], seed: int) -> Path:
    folder.mkdir()
    lines = []
    for place, image in enumerate(_drawn(captions, seed)):
        PIL.Image.fromarray(image).save(folder / f"{place}.png")
        lines.append(json.dumps({"file_name": f"{place}.png", "prompt": PROMPTS[place]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def pairs(name: str, **how: Any) -> None:
    """The page that compares."""
    with tempfile.TemporaryDirectory() as place:
        paths = [_write(Path(place) / "a", PROMPTS, 3), _write(Path(place) / "b", OTHERS, 4)]
        with served(comparison_of(paths), Path(place) / "out") as (address, _), opened(**how) as page:
            page.goto(f"{address}&as=JO")
            page.wait_for_selector("[data-ready]")
            page.screenshot(path=OUT / name)


def stars(name: str, **how: Any) -> None:
    """The page that a training waits for."""
    with tempfile.TemporaryDirectory() as place:
        ratings = Ratings(Path(place), question="semantic_alignment", votes_per_image=1)
        ratings.stage("iteration 3 of 20")
        images = np.concatenate([_drawn([caption], seed) for seed, caption in enumerate([PROMPTS[0], OTHERS[0]] * 2)])
        waiting = threading.Thread(target=_wait, args=(ratings, images))
        waiting.start()
        server = Aside(rating(ratings), host="127.0.0.1", port=0, token=TOKEN, most_bytes=MOST_BYTES)
        with opened(**how) as page:
            page.goto(f"{server.address}/?token={TOKEN}&as=JO")
            page.wait_for_selector("[data-ready]")
            page.keyboard.press("5")
            page.wait_for_selector("[aria-pressed=true]")
            page.screenshot(path=OUT / name)
        ratings.stop()
        server.stop()
        waiting.join()


def _wait(ratings: Ratings, images: np.ndarray) -> None:
    try:
        ratings.ask(images, [PROMPTS[0]] * len(images))
    except Stopped:
        return


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    pairs("judge.png", viewport=DESKTOP)
    pairs("judge_phone.png", viewport=PHONE, has_touch=True, is_mobile=True, color_scheme="dark")
    stars("judge_reward.png", viewport={"width": 1000, "height": 580})
