"""How far a log-probability of the update is from the one that the rollout recorded, before any parameter has moved.

    python bench/drift.py [--device cpu|cuda] [--models ...] [--changes ...] [--seconds N] [--out FILE.json]

It would be none if rollout and update rounded alike. Whoever clips a ratio to [1 - c, 1 + c] against recorded
log-probabilities clips this noise too, so c has to be well above it. Each row is one iteration of the engine, every
step of 8 images, in batches of 8, with an adapter that is not zero; the rows change one thing at a time. Told are the
largest |ratio - 1| and difference of log-probabilities, and the share of pairs beyond a clip range of 1e-4.
"""

import argparse
import json
import re
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from baselines import report
from torch import Tensor

from adascope_fast.algorithms.algorithm import Algorithm, Loss
from adascope_fast.config import Config
from adascope_fast.rollout import PromptCache
from adascope_fast.training.trainer import Trainer

CAPTIONS = [
    "a large red circle on a grey background",
    "two small blue crosses on a black background",
    "three green squares on a white background",
    "a small yellow triangle on a blue background",
]
CLIP_RANGE = 1e-4
ALIKE = [
    "algorithm.name=ddpo",
    "algorithm.advantage=batch",
    "selector.name=every_step",
    "sampler.num_steps=10",
    "model.lora_rank=4",
    f"train.prompts_per_iteration={len(CAPTIONS)}",
    "train.samples_per_prompt=2",
    "train.rollout_batch=8",
    "train.microbatch=8",
    "acceleration.fold_adapter=off",
    "acceleration.compile=off",
    "evaluation.num_prompts=1",
    "log.trackers=[]",
]
MODELS = ("scenes", "scenes-flow")
TYPES = {
    "float32": [],
    "float32, bfloat16 autocast": ["train.mixed_precision=bf16"],
    "bfloat16": ["model.dtype=bfloat16"],
    "float16": ["model.dtype=float16"],
}
CHANGES = {  # the first rows come first where time is short
    "alike": [],
    "folded adapter": ["acceleration.fold_adapter=on"],
    "microbatch 40": ["train.microbatch=40"],
    "microbatch 3": ["train.microbatch=3"],
    "rollout batch 3": ["train.rollout_batch=3"],
    "guidance 5": ["sampler.guidance_scale=5.0"],
    "gradient checkpointing": ["model.gradient_checkpointing=true"],
    "guidance 5, microbatch 40, rollout batch 3, checkpointing, folded adapter": [
        "sampler.guidance_scale=5.0",
        "train.microbatch=40",
        "train.rollout_batch=3",
        "model.gradient_checkpointing=true",
        "acceleration.fold_adapter=on",
    ],
    "compiled": ["acceleration.compile=regional"],
}


def is_measured(model: str, dtype: str, change: str, device: str) -> bool:
    """Adapters are folded in float32 alone; one small model is compiled, which takes long."""
    if change == "compiled":
        return model == "scenes-flow" and dtype == ("bfloat16" if device == "cuda" else "float32")
    return change != "folded adapter" or dtype == "float32"


def measure(model: str, overrides: list[str], *, device: str) -> dict[str, Any]:
    """The pairs of one iteration, the largest of their drifts and of |ratio - 1|, and the share beyond `CLIP_RANGE`."""
    config = Config.load(None, [*ALIKE, *overrides, f"model.name={model}", f"train.device={device}"])
    trainer = Trainer(
        config, reward=_brightness, train_prompts=CAPTIONS, held_out_prompts=["a blue circle"], quiet=True
    )
    trainer.prepare()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.backbone.trainable_parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    seen = watched(trainer.engine.algorithm)
    prompts = [caption for caption in CAPTIONS for _ in range(config.train.samples_per_prompt)]
    trainer.engine.step(PromptCache(trainer.backbone)(prompts), prompts, iteration=0, seed=0)
    names = "ratio", "log_prob", "rollout_log_prob"
    ratio, log_prob, recorded = (torch.cat([found[name] for found in seen]).double() for name in names)
    deviation, drift = (ratio - 1).abs(), (log_prob - recorded).abs()
    return {
        "pairs": len(ratio),
        "largest_log_prob_drift": drift.max().item(),
        "mean_log_prob_drift": drift.mean().item(),
        "largest_ratio_deviation": deviation.max().item(),
        "share_beyond_1e-4": (deviation > CLIP_RANGE).double().mean().item(),
    }


def watched(algorithm: Algorithm) -> list[dict[str, Tensor]]:
    """What the loss tells of its rows from here on; the first update's ratios are to what the rollout recorded too."""
    seen: list[dict[str, Tensor]] = []
    inner = algorithm.loss

    def loss(policy: Any, rows: Any, *, is_on_policy: bool, scale: float) -> Loss:
        found = inner(policy, rows, is_on_policy=False, scale=scale)
        seen.append(found.statistics)
        return found

    algorithm.loss = loss  # type: ignore[method-assign]
    return seen


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of the rows."""
    lines = [
        "| model | type | changed | largest abs(ratio - 1) | largest drift of log_prob | pairs beyond 1e-4 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"| {row['model']} | {row['dtype']} | {row['changed']} |"
        if "note" in row:
            lines.append(f"{name} {row['note']} | | |")
            continue
        values = row["largest_ratio_deviation"], row["largest_log_prob_drift"]
        lines.append(
            f"{name} {values[0]:.1e} | {values[1]:.1e} | {row['share_beyond_1e-4']:.0%} |".replace("0.0e+00", "0")
        )
    return "\n".join(lines)


def _brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3))


def main() -> None:
    """Measure every row and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--seconds", type=float, default=600, help="start no row after these")
    parser.add_argument("--out", type=Path, help="default: bench/results/drift_<device>.json")
    chosen = parser.parse_args()
    device = torch.cuda.get_device_name() if chosen.device == "cuda" else "no GPU used"
    gpu = re.sub(r"\W+", "_", device.lower().removeprefix("nvidia "))
    out = chosen.out or Path(__file__).parent / "results" / f"drift_{gpu if chosen.device == 'cuda' else 'cpu'}.json"
    started, rows = time.monotonic(), []
    for change, dtype, model in product(chosen.changes, TYPES, chosen.models):
        if not is_measured(model, dtype, change, chosen.device):
            continue
        overrides = TYPES[dtype] + CHANGES[change]
        row: dict[str, Any] = {"model": model, "dtype": dtype, "changed": change, "overrides": overrides}
        try:
            if time.monotonic() - started > chosen.seconds:
                raise TimeoutError("the time was over")
            AcceleratorState._reset_state(reset_partial_state=True)  # else the first row's precision is everyone's
            row |= measure(model, overrides, device=chosen.device)
        except (TimeoutError, RuntimeError) as error:  # what the device cannot do
            row["note"] = f"not measured: {' '.join(str(error).split())[:200]}"
        rows.append(row)
        print(f"{time.monotonic() - started:.0f} s", markdown([row]).splitlines()[-1], flush=True)
        result = report.facts("drift.py", device=device) | {"shared": ALIKE, "rows": _ordered(rows)}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{markdown(_ordered(rows))}\n\n{out}")


def _ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (MODELS.index(row["model"]), list(TYPES).index(row["dtype"])))


if __name__ == "__main__":
    main()
