"""Ten thousand iterations of the smallest real run: whether memory, handles, threads and files stay as they are.

    .venv/bin/python bench/endurance.py --out bench/results/endurance.json

A Stable Diffusion pipeline of a few thousand random weights; 40 prompts, 2 of them with 2 images each in an iteration;
4 steps; a checkpoint after each tenth iteration and an evaluation after each thousandth. Each thousandth iteration is a
row: resident memory, open files, threads, bytes of the log and of a checkpoint, and the median time of an iteration
since the row before, by the clock and by the processor, which a busy machine does not lengthen.
Exit code 1 where the second half of the run is not as the first was.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from adascope_fast.backbones import ASSETS
from adascope_fast.config import Config
from adascope_fast.prompts.scenes import captions
from adascope_fast.training.checkpoint import numbered
from adascope_fast.training.run_folder import RunFolder, versions
from adascope_fast.training.trainer import Trainer

SETTINGS = [
    "model.lora_rank=2",
    'model.lora_targets=["attn2.to_q", "attn2.to_v"]',
    "train.prompts_per_iteration=2",
    "train.samples_per_prompt=2",
    "train.rollout_batch=4",
    "train.checkpoint_every=10",
    "train.device=cpu",
    "sampler.num_steps=4",
    "evaluation.num_prompts=2",
    "evaluation.samples_per_prompt=2",
    "acceleration.fold_adapter=off",
    "acceleration.channels_last=off",
    "log.trackers=[]",
]
MOST_GROWTH_MB = 20
"""Of resident memory in the second half of a run: what an allocator may need, and no leak of 4 kB an iteration."""


def pipeline() -> StableDiffusionPipeline:
    """One block down, one up, latents of 8 x 8."""
    torch.manual_seed(7)
    width, tokenizer = 16, CLIPTokenizer.from_pretrained(ASSETS / "scenes" / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=width,
    )
    vae = AutoencoderKL(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    parts: dict[str, Any] = {
        "vae": vae.eval(),
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": tokenizer,
        "unet": unet.eval(),
        "scheduler": DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


class Rows:
    """A row every so many iterations, taken when one has been logged and the one before it has its checkpoint."""

    def __init__(self, every: int) -> None:
        self.every, self.found = every, list[dict[str, Any]]()
        self._times: list[tuple[float, float]] = []
        self._last = _now()

    def add(self, folder: RunFolder, iteration: int) -> None:
        """An iteration has been logged."""
        now = _now()
        self._times.append((now[0] - self._last[0], now[1] - self._last[1]))
        if (iteration + 1) % self.every == 0:
            gc.collect()
            newest = numbered(folder.path / "checkpoints")[-1:]
            row = {
                "iteration": iteration + 1,
                "resident_mb": round(_resident_mb(), 1),
                "open_files": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")),
                "python_threads": threading.active_count(),
                "python_objects": len(gc.get_objects()),
                "log_bytes_per_iteration": round((folder.path / "stats.jsonl").stat().st_size / (iteration + 1)),
                "checkpoint_bytes": sum(path.stat().st_size for one in newest for path in one.iterdir()),
                "files": sum(path.is_file() for path in folder.path.rglob("*")),
                "median_ms": round(1000 * statistics.median(wall for wall, _ in self._times), 2),
                "median_cpu_ms": round(1000 * statistics.median(cpu for _, cpu in self._times), 2),
            }
            print(json.dumps(row), flush=True)
            self.found.append(row)
            self._times.clear()
            now = _now()
        self._last = now

    def grown(self) -> list[str]:
        """What of the second half is not as the first was, in words."""
        first, last = self.found[(len(self.found) - 1) // 2], self.found[-1]
        found = [
            f"{name} {first[name]} -> {last[name]}"
            for name in ("open_files", "threads", "python_threads", "files")
            if last[name] > first[name]
        ]
        for name, most in (
            ("resident_mb", first["resident_mb"] + MOST_GROWTH_MB),
            ("python_objects", 1.01 * first["python_objects"]),
            ("checkpoint_bytes", 1.1 * first["checkpoint_bytes"]),  # it has the evaluations
            ("log_bytes_per_iteration", 1.02 * first["log_bytes_per_iteration"]),
        ):
            if last[name] > most:
                found.append(f"{name} {first[name]} -> {last[name]}")
        return found


def _now() -> tuple[float, float]:
    """Seconds of the clock, and of the processors for this process."""
    return time.perf_counter(), time.process_time()


def _resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmRSS: this needs Linux")


def run(iterations: int, folder: Path, every: int) -> tuple[Rows, dict[str, Any]]:
    """The rows, and what the end of the run took."""
    own = [f"run.folder={folder}", f"train.iterations={iterations}", f"evaluation.every={every}"]
    parts: dict[str, Any] = {"reward": redness, "pipeline": pipeline(), "train_prompts": captions("train")[:40]}
    trainer = Trainer(Config.load(None, [*SETTINGS, *own]), quiet=True, **parts)
    rows, log, marks = Rows(every), RunFolder.log, dict[str, float]()

    def logged(self: RunFolder, record: Any) -> None:
        log(self, record)
        rows.add(self, record["iteration"])
        marks["last iteration"] = time.perf_counter()

    start = time.perf_counter()
    with mock.patch.object(RunFolder, "log", logged):
        trainer.train()
    end = time.perf_counter()
    return rows, {
        "seconds": round(end - start, 1),
        "seconds_after_last_iteration": round(end - marks["last iteration"], 1),
        "report_bytes": (folder / "report.html").stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1_000, help="iterations between two rows, and two evaluations")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows, whole = run(chosen.iterations, Path(folder) / "run", chosen.every)
    told = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **versions()},
        "command": f"python bench/endurance.py --iterations {chosen.iterations} --every {chosen.every}",
        "iterations": chosen.iterations,
        **whole,
        "grown": rows.grown(),
        "rows": rows.found,
    }
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(whole | {"grown": told["grown"]}))
    sys.exit(1 if told["grown"] else 0)


if __name__ == "__main__":
    main()
