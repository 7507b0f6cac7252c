"""A trained model as a plain diffusers pipeline."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from adascope_fast.config import ConfigError
from adascope_fast.loading import follow_umask, quiet
from adascope_fast.training.draw import load_run


def merge(run: Path, folder: Path, *, dtype: str | None = None, pipeline: DiffusionPipeline | None = None) -> None:
    """Write the run's whole pipeline, its adapter added to the weights, for `DiffusionPipeline.from_pretrained`.

    Args:
        dtype: of the written weights; the run's `model.dtype` by default. A small change of a weight can be lost in
            bfloat16 or float16; "float32" loses none.
        pipeline: the one that the run was made with, where that was passed in Python; it becomes the trained one.

    Raises:
        ConfigError: `folder` is there already, or `run` is not a run.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"merge never replaces what is there, and {str(folder)!r} exists; name another folder")
    changes: dict[str, Any] = {"quantize": "none"} | ({"dtype": dtype} if dtype else {})
    config, backbone = load_run(run, pipeline=pipeline, **changes)
    backbone.weights.merge()
    # `Module.to`, since diffusers' own warns of modules kept in float32 even where its list of them is empty.
    nn.Module.to(backbone.denoiser, getattr(torch, dtype or config.model.dtype))
    with quiet():
        backbone.pipeline.save_pretrained(folder, safe_serialization=True)
    follow_umask(folder)
