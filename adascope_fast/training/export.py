"""A trained model as a plain diffusers pipeline."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from adascope_fast.loading import follow_umask, quiet
from adascope_fast.training.draw import load_run
from adascope_fast.training.lock import refuse_existing
from adascope_fast.training.monitoring.progress import Progress
from adascope_fast.training.run_folder import load_config


def merge(
    run: Path,
    folder: Path,
    *,
    dtype: str | None = None,
    pipeline: DiffusionPipeline | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the run's whole pipeline, its adapter added to the weights, for `DiffusionPipeline.from_pretrained`.

    Args:
        dtype: of the written weights; the run's `model.dtype` by default. A small change of a weight can be lost in
            bfloat16 or float16; "float32" loses none.
        pipeline: the one that the run was made with, where that was passed in Python; it becomes the trained one.
        progress: what tells how far it is; None: it is quiet.

    Raises:
        ConfigError: `folder` is there already, or `run` is not a run.
    """
    refuse_existing(folder, "merge")
    progress, kept = progress or Progress(quiet=True), load_config(run).model.dtype
    # In its own type, which tells that the model is the one that was trained, or in a wider one.
    with progress.loading(str(run)) as told:
        config, backbone = load_run(
            run, pipeline=pipeline, quantize="none", dtype="float32" if dtype == "float32" else kept, told=told
        )
    with progress.stage("adding the adapter to the weights"):
        backbone.weights.merge()
    written = getattr(torch, dtype or config.model.dtype)
    parts = [backbone.denoiser] if dtype is None else list(backbone.pipeline.components.values())
    for part in parts:
        if isinstance(part, nn.Module):
            # `Module.to`, since diffusers' own warns of modules kept in float32 even where its list of them is empty.
            nn.Module.to(part, written)
    with quiet(), progress.stage(f"writing {folder}"):
        backbone.pipeline.save_pretrained(folder, safe_serialization=True)
    follow_umask(folder)
