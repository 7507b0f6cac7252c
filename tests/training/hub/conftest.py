"""Runs to publish, made by hand: their words are meant to break what shows them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import make_run
from safetensors.torch import save_file

from adascope_fast.config import Config

Make = Callable[..., Path]


@pytest.fixture
def made(tmp_path: Path) -> Make:
    """Makes a finished run with these settings and parts; `full` for a whole denoiser in place of an adapter."""

    def make(*overrides: str, full: bool = False, parts: dict[str, Any] | None = None) -> Path:
        run = make_run(tmp_path / "secret" / "run")
        config = Config.load(None, [f"run.folder={run}", *overrides])
        (run / "config.toml").write_text(f"# by hand in {run}\n{config.to_toml()}")
        (run / "parts.json").write_text(json.dumps({"parts": parts or {}, "changes": [], "signature": ""}))
        weights = run / "adapter" / ("unet" if full else "")
        weights.mkdir(parents=True)
        tensors = {"unet.layer.lora_A.weight": torch.ones(2, 2)}
        save_file(
            tensors, weights / ("diffusion_pytorch_model.safetensors" if full else "pytorch_lora_weights.safetensors")
        )
        if full:
            told = {"_class_name": "UNet2DConditionModel", "_name_or_path": str(tmp_path / "secret"), "sample_size": 8}
            (weights / "config.json").write_text(json.dumps(told))
        return run

    return make
