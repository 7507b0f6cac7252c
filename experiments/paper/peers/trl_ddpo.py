"""TRL 0.23.1's DDPOTrainer as shipped, the last release that has it, in TRL's own environment.

Only options of its own are set: the common setting, its per-prompt statistics, and `train_batch_size`, whose number
decides the optimiser steps of an epoch (it accumulates over the steps of a batch). Its text encoder is given the names
that its transformers knows, without which it trains on random text.
"""

import tempfile
from itertools import chain
from pathlib import Path
from sys import path
from typing import Any

import torch
from accelerate import PartialState
from loop import Setting, scene_attributes, train
from peft.utils import get_peft_model_state_dict

path.insert(0, str(Path(__file__).parents[3] / "bench" / "baselines"))
from transformers_4 import for_transformers_4  # pyright: ignore[reportMissingImports]
from trl import (  # pyright: ignore[reportMissingImports]
    DDPOConfig,
    DDPOTrainer,
    DefaultDDPOStableDiffusionPipeline,
)


def main() -> None:
    """Train once."""
    setting = Setting.of_arguments()
    torch.manual_seed(setting.seed)
    PartialState(cpu=True)  # its logger needs one before the pipeline is loaded
    reward, waiting, seen = scene_attributes(), iter(()), []

    def score(images: torch.Tensor, prompts: tuple[str, ...], metadata: Any) -> tuple[torch.Tensor, dict]:
        scores = reward(images, list(prompts))
        seen.append(scores.mean().item())
        return scores, {}

    config = DDPOConfig(
        log_with=None,
        seed=setting.seed,
        mixed_precision="no",
        accelerator_kwargs={"cpu": True},
        save_freq=1_000_000_000,
        sample_num_steps=setting.num_steps,
        sample_eta=setting.noise,
        sample_guidance_scale=setting.guidance_scale,
        sample_batch_size=setting.images,
        sample_num_batches_per_epoch=1,
        train_batch_size=setting.images // setting.updates,
        train_gradient_accumulation_steps=1,
        train_learning_rate=setting.learning_rate,
        train_clip_range=setting.clip_range,
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_buffer_size=setting.buffer_size,
        per_prompt_stat_tracking_min_count=setting.min_count,
    )
    with tempfile.TemporaryDirectory() as work:
        pipeline = DefaultDDPOStableDiffusionPipeline(
            str(for_transformers_4(Path(setting.model), Path(work) / "model"))
        )
        trainer = DDPOTrainer(config, score, lambda: (next(waiting), {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)
    step = 0

    def iterate(captions: list[str]) -> tuple[int, float]:
        nonlocal waiting, step
        waiting = chain(captions)
        step = trainer.step(1, step)
        return setting.images * setting.num_steps, seen[-1]

    train(setting, iterate, lambda: get_peft_model_state_dict(pipeline.unet))


if __name__ == "__main__":
    main()
