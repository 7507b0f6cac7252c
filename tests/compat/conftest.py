"""Tiny pipelines for the trainers of others, and a trainer on the embedded model."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import BUILDERS

from adascope_fast.backbones import ASSETS
from adascope_fast.compat.trl import (
    DDPOConfig,
    DDPOTrainer,
    DefaultDDPOStableDiffusionPipeline,
    DefaultDDPOStableDiffusionXLPipeline,
)

SMALL: dict[str, Any] = {
    "exp_name": "tests",
    "mixed_precision": "no",
    "accelerator_kwargs": {"cpu": True},
    "sample_num_steps": 3,
    "sample_batch_size": 2,
    "sample_num_batches_per_epoch": 2,
    "train_batch_size": 2,
    "train_gradient_accumulation_steps": 2,
    "save_freq": 1000,
}
PROMPTS = ("a red circle", "a blue square")


def redness(images: torch.Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> tuple[torch.Tensor, dict]:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3)), {}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline, `sd` or `sdxl`, all of its UNet's weights random."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(7)
                pipeline = BUILDERS[name]()
                for parameter in pipeline.unet.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
                pipeline.save_pretrained(root / name, safe_serialization=True)
        return root / name

    return folder


@pytest.fixture
def make_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Callable[[str], Path]
) -> Callable[..., DDPOTrainer]:
    """A trainer of a tiny pipeline, in a folder of its own; keywords are fields of the configuration."""
    monkeypatch.chdir(tmp_path)

    def make(
        *,
        model: str = "sd",
        trainer: type[DDPOTrainer] = DDPOTrainer,
        reward: Callable[..., Any] = redness,
        prompts: Callable[[], tuple[str, Any]] | None = None,
        pipeline: Any = None,
        use_lora: bool = True,
        hook: Callable[..., Any] | None = None,
        selector: Any = "every_step",
        rollout_batch: int | None = None,
        microbatch: int | None = None,
        acceleration: Any = None,
        **fields: Any,
    ) -> DDPOTrainer:
        texts = itertools.cycle(PROMPTS)
        if pipeline is None:
            kind = DefaultDDPOStableDiffusionXLPipeline if model == "sdxl" else DefaultDDPOStableDiffusionPipeline
            place = ASSETS / "scenes" if model == "scenes" else tiny_folder(model)
            pipeline = kind(str(place), use_lora=use_lora)
        made = trainer(
            DDPOConfig(**SMALL | fields),
            reward,
            prompts or (lambda: (next(texts), {"number": 1})),
            pipeline,
            hook,
            selector=selector,
            rollout_batch=rollout_batch,
            microbatch=microbatch,
            acceleration=acceleration,
        )
        pipeline.set_progress_bar_config(disable=True)
        return made

    return make
