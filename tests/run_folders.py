"""Run folders as a training leaves them, made by hand, and the words of their report."""

import json
import re
from html import unescape
from pathlib import Path

import numpy as np

from adascope_fast.config import Config
from adascope_fast.reporting import save_grid, write_report
from adascope_fast.reporting.images import GAP

HOSTILE = '<script>alert(1)</script> & "quotes"'
PROMPTS = [HOSTILE, "two small red circles on a grey background", "a large blue star at the top on white"]
TILE, COLUMNS, NUM_STEPS = 64, 4, 20
SCORES = [[0.1, 0.25, None, 0.9], *[[0.5] * COLUMNS] * 47]
"""Of 48 prompts, of which the first three are shown."""


def images_of(seed: int) -> np.ndarray:
    """A grid of discs, the first prompts' rows first."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:TILE, :TILE]
    images = np.full((len(PROMPTS) * COLUMNS, 3, TILE, TILE), 0.85, np.float32)
    for image in images:
        inside = (x - random.uniform(15, 48)) ** 2 + (y - random.uniform(15, 48)) ** 2 < random.uniform(6, 16) ** 2
        image[:, inside] = random.uniform(0, 0.8, (3, 1))
    return images


def record_of(iteration: int) -> dict:
    """A line of `stats.jsonl`."""
    random = np.random.default_rng(iteration)
    start, end = 4 + 2 * random.random(len(PROMPTS)), 12 + 3 * random.random(len(PROMPTS))
    intervals = np.stack([start, end], 1).round().astype(int)
    fraction = float((intervals[:, 1] - intervals[:, 0]).mean() / NUM_STEPS)
    return {
        "iteration": iteration,
        "reward_mean": 0.5 + 0.006 * iteration + 0.02 * random.standard_normal(),
        "reward_std": 0.2,
        "loss": 1e-4 * random.standard_normal(),
        "approx_kl": 1e-6 * (1 + random.random()),
        "clipfrac": 0.2 + 0.1 * random.random(),
        "ratio_max_deviation": 2e-4 * (1 + random.random()),
        "grad_norm": 0.01 + 0.01 * random.random(),
        "fraction_trained": fraction,
        "pairs_trained": round(fraction * NUM_STEPS * 32),
        "learning_rate": 3e-4 * (1 - iteration / 60),
        "selector": {
            "intervals": intervals.tolist(),
            "prompts": PROMPTS,
            "reasons": {"ok": 2, "fallback:no_gain": 1},
            "mean_start": float(intervals[:, 0].mean()),
            "mean_end": float(intervals[:, 1].mean()),
            "curves": {
                "preference": np.linspace(0.5, 1.0, NUM_STEPS + 1).tolist(),
                "volatility": np.geomspace(0.2, 0.001, NUM_STEPS).tolist(),
            },
        },
        "steps": _by_step(iteration),
        "seconds": {"rollout": 1.5, "reward": 0.25, "sensing": 0.05, "update": 2.0, "other": 0.2},
        "nonfinite": 0,
    }


def _by_step(iteration: int) -> dict:
    """Curves that differ between early and late iterations; a step that was never trained has none."""
    gradient = [None, *np.linspace(0.02, 0.08, NUM_STEPS - 2).tolist(), None]
    return {
        "uncertainty": np.linspace(0.2, 0.01, NUM_STEPS).tolist(),
        "pairs": [0.0, *[float(iteration)] * (NUM_STEPS - 2), 0.0],
        "ratio_deviation": [None, *[1e-4 * (1 + iteration)] * (NUM_STEPS - 2), None],
        "clipfrac": [None, *np.linspace(0.1, 0.2, NUM_STEPS - 2).tolist(), None],
        "gradient_share": gradient,
    }


def make_run(folder: Path, *, iterations: int = 30) -> Path:
    """A finished run."""
    samples = folder / "samples"
    samples.mkdir(parents=True)
    (folder / "config.toml").write_text(
        Config.load(None, [f"run.folder='{HOSTILE}'", "train.iterations=30", "train.updates_per_iteration=2"]).to_toml()
    )
    (folder / "stats.jsonl").write_text("".join(json.dumps(record_of(i)) + "\n" for i in range(iterations)))
    attributes = {"colour": 0.61, "shape": 0.55, "count": 0.48}
    evaluation = {
        "reward": "scene_attributes",
        "before": {"mean": 0.5123, "low": 0.481, "high": 0.544, "num_images": 192, "attributes": attributes}
        | {"diversity": 0.25, "contrast": 0.26, "scores": SCORES},
        "after": {"mean": 0.6987, "low": 0.669, "high": 0.728, "num_images": 192, "attributes": {"colour": 0.83}}
        | {"diversity": 0.2, "contrast": 0.13},
        "difference": {"mean": 0.1864, "low": 0.151, "high": 0.222},
        "history": [
            {"iteration": 0, "mean": 0.5123, "low": 0.481, "high": 0.544},
            {"iteration": 30, "mean": 0.6987, "low": 0.669, "high": 0.728},
        ],
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    run = {
        "status": "finished",
        "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
        "device": "cpu",
        "commit": "0123abc",
        "date": "2026-11-29 19:10 UTC",
        "peak_memory_mb": 1834.2,
        "seconds_total": 171.4,
        "command": "adascope-fast train configs/quickstart.toml",
    }
    (folder / "run.json").write_text(json.dumps(run))
    save_grid(images_of(0), COLUMNS, samples / "before.png")
    save_grid(images_of(1), COLUMNS, samples / "after.png")
    (samples / "grid.json").write_text(json.dumps({"prompts": PROMPTS, "columns": COLUMNS, "tile": TILE, "gap": GAP}))
    return folder


def page_of(folder: Path) -> str:
    """The report's HTML, written anew."""
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def words_of(page: str) -> str:
    """What a reader sees of a page, without charts."""
    body = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())
