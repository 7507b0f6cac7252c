"""A pipeline from its JSON files alone: on the meta device every shape and no number, elsewhere random weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from adascope_fast.backbones.base import Options, PipelineBackbone
from adascope_fast.backbones.pipeline.files import build, reason_of
from adascope_fast.backbones.sources import Source, index_entries
from adascope_fast.loading import quiet


def outline(
    source: Source, family: type[PipelineBackbone], options: Options, dtype: torch.dtype, device: str
) -> PipelineBackbone:
    """The backbone of `source` without its weights and tokenizers."""
    index = source.index(family)
    family.refuse(source.json(f"{family.denoiser_name}/config.json"))
    components: dict[str, Any] = {}
    with quiet():
        for name, (library, class_name) in index_entries(index):
            is_part = name in family.parts and not name.startswith("tokenizer")
            is_away = options.offload_text_encoders and name.startswith("text_encoder")
            place = "meta" if is_away else device
            components[name] = _component(source, name, class_name, dtype, place) if is_part and library else None
        settings = {name: value for name, value in index.items() if name[0] != "_" and name not in components}
        try:
            pipeline = getattr(diffusers, source.class_name)(**components, **settings)
        except Exception as error:
            raise ValueError(
                f"{source.name!r} cannot be built from model_index.json: {reason_of(error)}; download it again"
            ) from None
        return family(pipeline, source.name, options)


def rehearse(backbone: PipelineBackbone) -> None:
    """ValueError, naming the component, where an outline on the meta device cannot predict or decode.

    Its configurations then do not fit each other, which would otherwise show only after the weights are loaded.
    """
    sample = torch.empty(1, *backbone.latent_shape, device="meta")
    condition = {
        name: torch.empty(1, *shape, dtype=backbone.dtype, device="meta")
        for name, shape in backbone.condition_shape().items()
    }
    uses: dict[str, Callable[[], Tensor]] = {
        backbone.denoiser_name: lambda: backbone.predict(sample, torch.empty(1, device="meta"), condition),
        "vae": lambda: backbone.decode(sample),
    }
    for part, use in uses.items():
        try:
            with torch.no_grad():
                output = use()
        except Exception as error:
            raise ValueError(
                f"the {part} of {backbone.name!r} cannot run with what {part}/config.json says: {reason_of(error)}; "
                f"correct it, or download it again"
            ) from None
        side = backbone.resolution
        wanted = tuple(sample.shape) if part != "vae" else (1, 3, side, side)
        if tuple(output.shape) != wanted:
            raise ValueError(
                f"the {part} of {backbone.name!r} must give {list(wanted)}, got {list(output.shape)} with what "
                f"{part}/config.json says; correct it, or download it again"
            )


def _component(source: Source, name: str, class_name: str, dtype: torch.dtype, device: str) -> Any:
    if name == "scheduler":
        return build(source.name, name, class_name, source.json("scheduler/scheduler_config.json"))
    config = source.json(f"{name}/config.json")
    # A large model is not made in float32 first; on the meta device that would cost nothing.
    with torch.device(device), _default_type(torch.float32 if device == "meta" else dtype):
        model: nn.Module = build(source.name, name, class_name, config)
    return model.to(dtype)


@contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
