"""A pipeline from its JSON files alone: on the meta device every shape and no number, elsewhere random weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from adascope_fast.backbones.base import Options, PipelineBackbone
from adascope_fast.backbones.sources import Source, quiet


def outline(
    source: Source, family: type[PipelineBackbone], options: Options, dtype: torch.dtype, device: str
) -> PipelineBackbone:
    """The backbone of `source` without its weights and tokenizers."""
    index = source.json("model_index.json")
    components: dict[str, Any] = {}
    with quiet():
        for name, entry in index.items():
            if isinstance(entry, list):
                library, class_name = entry
                is_part = name in ("vae", family.denoiser_name, "scheduler") or name.startswith("text_encoder")
                is_away = options.offload_text_encoders and name.startswith("text_encoder")
                place = "meta" if is_away else device
                components[name] = (
                    _component(source, name, library, class_name, dtype, place) if is_part and library else None
                )
        settings = {name: value for name, value in index.items() if name[0] != "_" and name not in components}
        return family(getattr(diffusers, source.class_name)(**components, **settings), source.name, options)


def _component(source: Source, name: str, library: str, class_name: str, dtype: torch.dtype, device: str) -> Any:
    if name == "scheduler":
        return getattr(diffusers, class_name).from_config(source.json("scheduler/scheduler_config.json"))
    config = source.json(f"{name}/config.json")
    # A large model is not made in float32 first; on the meta device that would cost nothing.
    with torch.device(device), _default_type(torch.float32 if device == "meta" else dtype):
        if library == "transformers":
            model_class = getattr(transformers, class_name)
            model: nn.Module = model_class(model_class.config_class.from_dict(config))
        else:
            model = getattr(diffusers, class_name).from_config(config)
    return model.to(dtype)


@contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
