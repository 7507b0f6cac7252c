"""One AdaScope iteration of published models with random weights: seconds and peak memory by part, beside the plan.

    python bench/published.py [--models sd15 sdxl sd35-medium] [--seconds N] [--out FILE.json]

Time and memory do not depend on the weights. The models are made from adascope_fast/assets/published, and prompts are
random rows of the right shape, as text encoders are no part of an iteration's cost. Nothing is compiled, since the plan
beside it counts what eager PyTorch takes. Writes JSON after each model; a model that there is no time
for is listed as such.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from baselines import report
from baselines.common import load_reward

from adascope_fast import backbones
from adascope_fast.backbone import Condition
from adascope_fast.config import Config
from adascope_fast.planning.plan import GIB, Plan, plan
from adascope_fast.rollout import PromptCache
from adascope_fast.training.trainer import Trainer

FOLDER = Path(__file__).parents[1] / "adascope_fast" / "assets" / "published"
SHARED = [
    "model.dtype=bfloat16",
    "model.lora_rank=16",
    "model.offload_text_encoders=true",
    "sampler.num_steps=10",
    "train.prompts_per_iteration=2",
    "train.samples_per_prompt=4",
    "train.rollout_batch=8",
    "acceleration.compile=off",
    "log.trackers=[]",
]
MODELS = {
    "sd15": ["sampler.guidance_scale=5.0", "train.microbatch=8"],
    "sdxl": ["sampler.guidance_scale=5.0", "train.microbatch=8", "model.gradient_checkpointing=true"],
    "sd35-medium": [
        "sampler.guidance_scale=4.5", "train.microbatch=4", "model.resolution=512", "algorithm.name=grpo",
    ],
}  # fmt: skip
MOST_GIB = {"sd15": 24, "sdxl": 40}
LARGEST_DEVIATION = 0.10


class Peaks:
    """The most memory of each part of an iteration, with what is held throughout; zero where there is no GPU."""

    def __init__(self) -> None:
        self.gib: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Watch the block."""
        is_gpu = torch.cuda.is_available()
        if is_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        if is_gpu:
            torch.cuda.synchronize()
        self.seconds[part] = round(self.seconds.get(part, 0.0) + time.perf_counter() - start, 3)
        peak = torch.cuda.max_memory_allocated() / GIB if is_gpu else 0.0
        self.gib[part] = round(max(self.gib.get(part, 0.0), peak), 3)


def measure(folder: Path, overrides: Sequence[str], *, device: str) -> dict[str, Any]:
    """The second iteration of a model: the first makes the optimiser's state and the libraries' workspaces."""
    config = Config.load(None, [*SHARED, *overrides, f"model.name={folder}", f"train.device={device}"])
    planned = plan(config)
    trainer = Trainer(config, reward=load_reward(), train_prompts=["a"], held_out_prompts=["b"], quiet=True)
    backbone = backbones.outline(str(folder), **config.model.options(), device=device)
    backbone.encode = lambda prompts: _random_rows(backbone, len(prompts))  # type: ignore[method-assign]
    with mock.patch.object(backbones, "load", return_value=backbone):
        trainer.prepare()
    texts = [str(number) for number in range(config.train.prompts_per_iteration)]
    batch = [text for text in texts for _ in range(config.train.samples_per_prompt)]
    encoded = PromptCache(backbone)(batch)
    trainer.engine.step(encoded, batch, iteration=0, seed=0)
    peaks = Peaks()
    trainer.engine._part = peaks  # type: ignore[method-assign]
    values = trainer.engine.step(encoded, batch, iteration=1, seed=1).values
    return summary(planned, peaks, values)


def summary(planned: Plan, peaks: Peaks, values: dict[str, Any]) -> dict[str, Any]:
    """What was measured beside what was planned; GiB."""
    expected = {
        "rollout": max(planned.rollout_bytes, planned.decode_bytes) / GIB,
        "update": planned.update_bytes[planned.microbatch] / GIB,
    }
    peak, plan_peak = max(peaks.gib.values()), max(expected.values())
    return {
        "title": planned.title,
        "microbatch": planned.microbatch,
        "parameters": planned.parameters,
        "trained": planned.trained,
        "seconds": peaks.seconds | {"all": round(sum(peaks.seconds.values()), 3)},
        "fraction_trained": values["fraction_trained"],
        "planned_fraction": planned.fraction,
        "grad_norm": values["grad_norm"],
        "microbatch_used": values["microbatch"],
        "pflop_planned": sum(planned.flops.values()) / 1e15,
        "peak_gib_by_part": peaks.gib,
        "planned_gib_by_part": {name: round(value, 3) for name, value in expected.items()},
        "peak_gib": peak,
        "planned_gib": round(plan_peak, 3),
        "deviation": round(plan_peak / peak - 1, 4) if peak else None,
    }


def goals(name: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals of a model, met or not; None where nothing was measured."""
    peak, deviation = row.get("peak_gib") or None, row.get("deviation")
    found: list[dict[str, Any]] = [
        {
            "goal": f"{name}: an AdaScope iteration",
            "value": row.get("seconds", {}).get("all"),
            "met": None if peak is None else row["grad_norm"] > 0,
        }
    ]
    if name in MOST_GIB:
        met = None if peak is None else peak < MOST_GIB[name]
        found.append({"goal": f"{name}: peak under {MOST_GIB[name]} GiB", "value": peak, "met": met})
    met = None if deviation is None else abs(deviation) <= LARGEST_DEVIATION
    found.append({"goal": f"{name}: plan within 10 % of the measured peak", "value": deviation, "met": met})
    return found


def _random_rows(backbone: backbones.PipelineBackbone, count: int) -> Condition:
    return {
        name: torch.randn(count, *shape, device=backbone.device).to(backbone.dtype)
        for name, shape in backbone.condition_shape().items()
    }


def main() -> int:
    """Measure every model and write the results; 1 if one was not measured, though there is a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=600, help="start no model after these")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "published.json")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU is present: nothing was measured")
        return 0
    started, rows = time.time(), []
    for name in chosen.models:
        try:
            if time.time() - started > chosen.seconds:
                raise TimeoutError("the time was over")
            row = measure(FOLDER / name, MODELS[name], device="cuda")
        except (TimeoutError, torch.OutOfMemoryError, RuntimeError) as error:
            row = {"note": f"not measured: {' '.join(str(error).split())[:200]}"}
        gc.collect()
        torch.cuda.empty_cache()
        rows.append({"model": name, "overrides": SHARED + MODELS[name], **row, "goals": goals(name, row)})
        result = report.facts("published.py", device=torch.cuda.get_device_name()) | {"models": rows}
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(rows[-1]), flush=True)
    print(chosen.out)
    return int(any("note" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
