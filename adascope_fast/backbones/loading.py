"""Text-to-image models: the embedded ones by name, any other by its diffusers folder, file or repository.

One file a family, imported when a model of it is loaded.
"""

import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from adascope_fast.backbones.base import Options, PipelineBackbone
from adascope_fast.backbones.sources import ASSETS as ASSETS
from adascope_fast.backbones.sources import EMBEDDED as EMBEDDED
from adascope_fast.backbones.sources import PUBLISHED as PUBLISHED
from adascope_fast.backbones.sources import Source, described, locate
from adascope_fast.loading import quiet

FAMILIES = {
    "StableDiffusionPipeline": ("sd", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("sdxl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3"),
    "FluxPipeline": ("flux", "Flux"),
}


def folder_of(name: str) -> Path:
    """The diffusers folder of an embedded model or of a path; ValueError where there is none."""
    return Path(locate(name).place)


def check(name: str, *, base: str | None = None, revision: str | None = None) -> None:
    """ValueError unless `name` is a model that `load` knows how to read and RL can train; no weights are read."""
    source = locate(name, base=base, revision=revision)
    family = family_of(source.class_name)
    source.index(family)
    family.refuse(source.json(f"{family.denoiser_name}/config.json"))


def outline(
    name: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    quantize: str = "none",
    device: str = "meta",
    **options: Any,
) -> PipelineBackbone:
    """The model from its JSON files alone, for measurements; its other arguments are those of `load`.

    On the meta device it has shapes and no numbers, on any other random weights; it has no tokenizers, so it cannot
    encode, its weights are not quantised, and text encoders that would be offloaded are on the meta device. Of files
    that are there, what is damaged is refused as `load` does; a folder may be of JSON files alone. The repositories
    of `PUBLISHED` are described in this package, and no network is asked unless a revision is named.
    """
    from adascope_fast.backbones.meta import outline as outline_of

    known = described(name) if is_described(name, base=base, revision=revision) else None
    found = known or locate(name, base=base, revision=revision, variant=variant)
    family = family_of(found.class_name)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if known is None:
        _examine(found, family, Options(**options), wanted)
    return _silenced(outline_of(found, family, Options(**options), wanted, device))


def is_described(name: str, *, base: str | None = None, revision: str | None = None) -> bool:
    """Whether `outline` takes the JSON files in this package, and asks no network."""
    return name in PUBLISHED and base is None and revision is None and not Path(name).exists()


def load(
    source: str | DiffusionPipeline,
    *,
    base: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    quantize: Literal["none", "nf4", "int8"] = "none",
    adapter: Path | None = None,
    told: Callable[[str], None] | None = None,
    **options: Any,
) -> PipelineBackbone:
    """The model, ready to be trained. Only safetensors are read, and no code beside them runs.

    Args:
        source: `scenes`, `scenes-flow`, a diffusers folder, a .safetensors file, a Hugging Face repository, or a loaded
            pipeline of one of these families, whose dtype then stands.
        base: for a single file, the folder or repository that describes it and has what it lacks.
        revision: of a repository.
        variant: of the weights' files, such as "fp16".
        dtype: of the frozen weights; trained ones are float32.
        quantize: bitsandbytes' 4-bit or 8-bit base weights of the denoiser.
        adapter: a LoRA in diffusers' format that is added to the weights of a `source` on disk first.
        told: called with the name of each part before it is read.
        options: fields of `backbones.base.Options`: `train`, `lora_rank`, `lora_targets`, `resolution`, `seed`, ...
    """
    made = Options(**options)
    if isinstance(source, DiffusionPipeline):
        name = type(source).__name__
        return family_of(name)(source, name, made)
    found = locate(source, base=base, revision=revision, variant=variant)
    family = family_of(found.class_name)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    tokenizers = _examine(found, family, made, wanted)
    pipeline = found.open(family, wanted, quantize, tokenizers, told)
    if adapter is not None:
        add_adapter(pipeline, adapter)
    return _silenced(family(pipeline, source, made))


def add_adapter(pipeline: Any, folder: Path) -> None:
    """Add a LoRA's weights, all of them, to those of the pipeline's models.

    Raises:
        ValueError: the folder holds none in safetensors, or one that is not of these models.
    """
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    if len(files) != 1 or files[0].suffix != ".safetensors":
        raise ValueError(
            f"an adapter is a LoRA's .safetensors file, or a folder that holds one, got {str(folder)!r}"
            f"{f' with {len(files)} of them' if folder.is_dir() else ''}; name the file"
        )
    try:
        with quiet():
            pipeline.load_lora_weights(
                files[0].parent, weight_name=files[0].name, use_safetensors=True, adapter_name="added"
            )
            named = [name for name in load_file(files[0]) if name.endswith(_FIRST_MATRICES)]
    except Exception as error:  # of diffusers and peft, whatever does not fit
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"the adapter {str(folder)!r} could not be read: {why}; save it again with pipe.save_lora_weights"
        ) from None
    found = sum(
        "added" in getattr(module, "lora_A", {})
        for part in pipeline.components.values()
        if isinstance(part, nn.Module)
        for module in part.modules()
    )
    if found != len(named) or not named:
        raise ValueError(
            f"the adapter {str(folder)!r} must be one of this model, and of its {len(named)} layers {found} are found "
            f"in it; name the model that it was trained on"
        )
    pipeline.fuse_lora(adapter_names=["added"])
    pipeline.unload_lora_weights()


_FIRST_MATRICES = ("lora_A.weight", "lora_down.weight", "lora.down.weight")


def _examine(source: Source, family: type[PipelineBackbone], options: Options, dtype: torch.dtype) -> dict[str, Any]:
    """The tokenizers of a source that can be built, run and read, as far as can be told without its weights.

    An embedded model is not looked at: it is part of this package.
    """
    from adascope_fast.backbones.meta import outline as outline_of
    from adascope_fast.backbones.meta import rehearse

    if source.name in EMBEDDED:
        return {}
    simple = options.model_copy(update={"attention": "sdpa", "keep_reference": False, "offload_text_encoders": False})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model itself will give them
        backbone = outline_of(source, family, simple, dtype, "meta")
    rehearse(backbone)
    return source.examine(family, backbone.pipeline)


def _silenced(backbone: PipelineBackbone) -> PipelineBackbone:
    """The T5 of `scenes-flow` says nothing, which its backbone makes use of."""
    if backbone.name == "scenes-flow":
        backbone.is_t5_silent = True  # type: ignore[attr-defined]
    return backbone


def family_of(class_name: str) -> type[PipelineBackbone]:
    """The backbone class of a diffusers pipeline class; ValueError for one that there is none for."""
    if class_name not in FAMILIES:
        raise ValueError(
            f"supported pipelines are {', '.join(FAMILIES)}, got {class_name!r}; use a model of one of these families"
        )
    module, name = FAMILIES[class_name]
    return getattr(import_module(f"adascope_fast.backbones.{module}"), name)
