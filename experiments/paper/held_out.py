"""Measure the held-out reward of kept weights: all arms by this code, on the same captions and noise, without guidance.

    python experiments/paper/held_out.py FAMILY RUN [RUN ...] --captions FILE [--samples N]

Each run folder gets `held_out-NAME.jsonl`, NAME that of the captions' file: a line for each point of `points.jsonl`
with the score of every image, [captions, samples]. Points that are there already are not measured again. Without
weights (`base` in place of a run) the model itself is measured: its adapter is zero.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # a script finds what lies beside it, and no more
from experiments.paper.arms import FAMILIES, Family  # noqa: E402

LORA_RANK = 4
SEED = 12345


class Judge:
    """A family's model with its reward, ready to take any arm's weights."""

    def __init__(
        self, family: Family, captions: Sequence[str], *, samples: int, num_steps: int, batch: int = 64
    ) -> None:
        import torch

        from adascope_fast import backbones, rewards
        from adascope_fast.config import Config

        torch.set_num_threads(1)
        config = Config.load(None, [f"model.name={family.model}", f"model.lora_rank={LORA_RANK}"])
        self.backbone = backbones.load(config.model.name, **config.model.options())
        self.schedule = self.backbone.schedule(num_steps, kind="auto", eta=None, noise_level=None, shift=None)
        self.reward = rewards.load(Config.load(None, ["reward.name=scene_attributes"]).reward)
        self.captions, self.samples, self.batch = list(captions), samples, batch

    def scores(self, weights: Path | None) -> list[list[float]]:
        """Of each image of each caption; None: of the base model, whose adapter is zero."""
        from safetensors.torch import load_file

        from adascope_fast.training.evaluation import evaluate

        if weights is not None:
            self.backbone.load_adapter_tensors(load_file(weights))
        found = evaluate(
            self.backbone, self.schedule, self.reward, self.captions,
            samples_per_prompt=self.samples, guidance_scale=1.0, seed=SEED, batch=self.batch,
            num_shown=0,
        )  # fmt: skip
        return [[round(score, 6) for score in row] for row in found.scores.tolist()]


def file_of(run: Path, captions: Path) -> Path:
    """Where the scores of a run on these captions lie."""
    return run / f"held_out-{captions.stem}.jsonl"


def points_of(run: Path) -> list[dict[str, Any]]:
    """The points of a run; the base has one, before training."""
    if run.name == "base":
        return [{"iteration": 0, "cpu_seconds": 0.0, "pairs": 0, "images": 0}]
    return _lines(run / "points.jsonl")


def measured(run: Path, captions: Path) -> list[dict[str, Any]] | None:
    """The points of a run with their scores; None where one is missing."""
    known = {line["iteration"]: line["scores"] for line in _lines(file_of(run, captions))}
    points = points_of(run)
    if not points or any(point["iteration"] not in known for point in points):
        return None
    return [point | {"scores": known[point["iteration"]]} for point in points]


def measure(judge: Judge, run: Path, captions: Path) -> None:
    """What is missing of a run."""
    run.mkdir(parents=True, exist_ok=True)
    file = file_of(run, captions)
    known = _lines(file)
    file.write_text("".join(json.dumps(line) + "\n" for line in known))  # without a line that a kill cut short
    for point in points_of(run):
        iteration = point["iteration"]
        if iteration in {line["iteration"] for line in known}:
            continue
        weights = run / "weights" / f"{iteration:05d}.safetensors" if iteration else None
        scores = judge.scores(weights)
        with file.open("a") as lines:
            lines.write(json.dumps({"iteration": iteration, "scores": scores}) + "\n")


def _lines(file: Path) -> list[dict[str, Any]]:
    """Whole lines of a file that may end in the middle of one."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def main() -> None:
    """Measure every run that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--captions", type=Path, required=True, help="a file with one a line")
    parser.add_argument("--samples", type=int, default=2, help="images of each caption")
    parser.add_argument("--num-steps", type=int, help="denoising steps; absent: the family's")
    chosen = parser.parse_args()
    family = FAMILIES[chosen.family]
    captions = chosen.captions.read_text(encoding="utf-8").splitlines()
    judge = Judge(family, captions, samples=chosen.samples, num_steps=chosen.num_steps or family.num_steps)
    # The base first: no weights have been loaded then.
    for run in sorted(chosen.runs, key=lambda run: run.name != "base"):
        measure(judge, run, chosen.captions)


if __name__ == "__main__":
    main()
