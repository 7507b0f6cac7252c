"""Text-to-image models: the embedded ones by name, any other by the folder of its diffusers pipeline."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from adascope_fast.backbones.adapter import LoraBackbone

EMBEDDED = ("scenes", "scenes-flow")
ASSETS = Path(__file__).parent.parent / "assets"


def folder_of(name: str) -> Path:
    """The diffusers folder of an embedded model or of a path; ValueError where there is none."""
    folder = ASSETS / name if name in EMBEDDED else Path(name)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"model.name is {', '.join(EMBEDDED)} or the folder of a saved diffusers pipeline (with model_index.json), "
            f"got {name!r}; save one with pipe.save_pretrained(folder, safe_serialization=True)"
        )
    return folder


def check(name: str) -> None:
    """ValueError unless `name` is a model that `load` knows how to read; nothing is loaded."""
    _family(_class_name(folder_of(name)))


def load(
    source: str | DiffusionPipeline,
    *,
    rank: int = 16,
    alpha: int | None = None,
    targets: list[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
) -> LoraBackbone:
    """The model with a fresh LoRA adapter. Only safetensors are read, and no code from the folder runs.

    Args:
        source: `scenes`, `scenes-flow`, the path of a diffusers folder, or a loaded pipeline (Stable Diffusion 1.x, 2.x
            or 3.x), whose dtype then stands.
        rank, alpha, targets: the adapter; alpha defaults to the rank, targets to the attention projections.
        seed: of the adapter's initial weights.
        dtype: of the frozen base weights.
        gradient_checkpointing: recompute activations in the backward pass.
    """
    if isinstance(source, DiffusionPipeline):
        pipeline, name = source, type(source).__name__
        family = _family(name)
    else:
        folder, name = folder_of(source), source
        family = _family(_class_name(folder))
        with _quiet():
            pipeline = DiffusionPipeline.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
    backbone = family(
        pipeline,
        name,
        rank=rank,
        alpha=alpha,
        targets=targets,
        seed=seed,
        gradient_checkpointing=gradient_checkpointing,
    )
    if name == "scenes-flow":
        backbone.is_t5_silent = True  # type: ignore[attr-defined]
    return backbone


@contextmanager
def _quiet() -> Iterator[None]:
    """No loading bars, and no remarks about image processors that are not used."""
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()


def _class_name(folder: Path) -> str:
    return str(json.loads((folder / "model_index.json").read_text()).get("_class_name"))


def _family(class_name: str) -> type[LoraBackbone]:
    if class_name == "StableDiffusionPipeline":
        from adascope_fast.backbones.sd import StableDiffusion

        return StableDiffusion
    if class_name == "StableDiffusion3Pipeline":
        from adascope_fast.backbones.sd3 import StableDiffusion3

        return StableDiffusion3
    raise ValueError(
        f"supported pipelines are StableDiffusionPipeline and StableDiffusion3Pipeline, got {class_name!r}; "
        f"use a model of one of these families"
    )
