"""Runs smaller still than the smallest configuration, in Python: one prompt again and again, a reward of one's own."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

TINY = Path(__file__).parents[1] / "configs" / "tiny.toml"
CAPTIONS = ["a large red circle on a grey background", "two small blue crosses on a black background"]
SMALLEST = [
    "sampler.num_steps=4",
    "train.prompts_per_iteration=1",
    "train.learning_rate=0.01",
    "evaluation.num_prompts=1",
    "evaluation.samples_per_prompt=1",
]


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """What a run logged of its iterations."""
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """The same without what a clock has told, which no two runs share."""
    timed = ("seconds", "cpu_seconds", "sensing_share", "images_per_second", "pairs_per_second", "ranks")
    return record | dict.fromkeys(timed)
