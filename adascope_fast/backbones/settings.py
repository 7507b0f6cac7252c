"""The section `[model]`: the pipeline to train, and what of it. Nothing here imports torch."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from adascope_fast.settings import Decay, Guidance, Pixels, Section, Text, Width, only_with

EMBEDDED_NAMES = ("scenes", "scenes-flow")
"""The models inside this package, which draw the captions of `scenes:train`."""


REPOSITORY = re.compile(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?")
"""What the Hub takes as a name, which `./folder` and `../folder` are not."""


class Options(Section):
    """How a pipeline becomes a backbone."""

    train: Literal["lora", "full"] = "lora"
    """A LoRA adapter, or every weight of the denoiser."""
    lora_rank: Annotated[Width, only_with(train=["lora"])] = 16
    """Rank of the LoRA matrices."""
    lora_alpha: Annotated[Width | None, only_with(train=["lora"])] = None
    """LoRA scale is alpha / rank; absent: the rank, so the scale is 1."""
    lora_targets: Annotated[Annotated[list[Text], Field(min_length=1)] | None, only_with(train=["lora"])] = None
    """Names of the layers to adapt; absent: those that diffusers' training script of the family adapts."""
    resolution: Pixels | None = None
    """Side of the images in pixels; absent: the model's own."""
    embedded_guidance: Guidance | None = None
    """FLUX' guidance input, at no cost; absent: 3.5 for FLUX. (`sampler.guidance_scale` is a second forward there
    too.)"""
    max_sequence_length: Width | None = None
    """T5 tokens of a prompt; absent: the pipeline's own, 256 for SD3 and 512 for FLUX."""
    gradient_checkpointing: bool = False
    """Recompute the denoiser's activations in the backward pass: less memory, more time."""
    attention: Literal["sdpa", "xformers", "flash"] = "sdpa"
    """Attention: PyTorch's, xformers' or flash-attn's (FLUX only); what cannot serve falls back to sdpa with a
    warning."""
    offload_text_encoders: bool = False
    """Text encoders are on the GPU only while prompts are encoded."""


class Model(Options):
    """The pipeline to train, and what of it."""

    name: Text = "scenes"
    """`scenes` or `scenes-flow` (embedded), a diffusers folder, a .safetensors file or a Hugging Face repository."""
    base: Text | None = None
    """For a .safetensors file: folder or repository that describes it; absent: for such a file the one
    that diffusers knows it by."""
    revision: Text | None = None
    """Branch, tag or commit of a repository; absent: its main branch."""
    variant: Text | None = None
    """Which of several files of the same weights: `fp16` for `diffusion_pytorch_model.fp16.safetensors`; absent: those
    without such a word."""
    ema_decay: Decay | None = None
    """Decay of the trained weights' average, which is judged and exported; absent: 0.8 for LoRA, else 0 (none)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen weights; what is trained is always float32."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """bitsandbytes' 4-bit or 8-bit base weights of the denoiser under a LoRA adapter; needs a GPU."""

    @model_validator(mode="after")
    def _only_adapters_go_over_quantised_weights(self) -> Self:
        if self.train == "full" and self.quantize != "none":
            raise ValueError(
                f'model.train = "full" trains every weight, so model.quantize must be "none", got "{self.quantize}"; '
                f'set it to "none", or model.train = "lora"'
            )
        return self

    def examine(self) -> None:
        """ValueError where the name is none of a model; the models of the hub are not looked up."""
        refuse_misnamed(self.name, base=self.base, revision=self.revision, variant=self.variant)

    @property
    def average_decay(self) -> float:
        """`ema_decay`, or what stands for it."""
        return (0.8 if self.train == "lora" else 0.0) if self.ema_decay is None else self.ema_decay

    def options(self) -> dict[str, Any]:
        """The same as keyword arguments of `backbones.load`, but for the name and the average."""
        return {name: value for name, value in self if name not in ("name", "ema_decay")}


def refuse_misnamed(
    name: str, *, base: str | None = None, revision: str | None = None, variant: str | None = None
) -> None:
    """ValueError unless `name` is an embedded model, a pipeline's folder, a .safetensors file, or may be a repository.

    Args:
        base: for a single file, the folder or repository that describes it.
        revision: of a repository.
        variant: of the weights' files.
    """
    path = Path(name)
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(
            f"model.name must not be a pickle, which can run any code when it is read, got {name!r}; "
            f"use the .safetensors file of the same model"
        )
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ValueError(f"model.name = {name!r} is no file here; download it to this path, or correct the path")
        return
    if base is not None:
        raise ValueError(f"model.base is for a single .safetensors file, got {base!r} with {name!r}; remove it")
    if name in EMBEDDED_NAMES or (path / "model_index.json").is_file():
        if revision is not None:
            raise ValueError(
                f"model.revision is for a repository, got {revision!r} with the folder {name!r}; remove it"
            )
        weights = [] if name in EMBEDDED_NAMES else [file.name for file in path.glob("*/*.safetensors")]
        is_known = any(f".{variant}." in file or f".{variant}-" in file for file in weights)
        if variant is not None and not is_known and (weights or name in EMBEDDED_NAMES):
            raise ValueError(
                f"model.variant names files of weights, got {variant!r} and {name!r} has none called so; remove it"
            )
    elif path.exists() or not REPOSITORY.fullmatch(name):
        raise ValueError(
            f"model.name is {', '.join(EMBEDDED_NAMES)}, the folder of a saved diffusers pipeline (with "
            f"model_index.json), a .safetensors file or a Hugging Face repository (owner/name), got {name!r}; "
            f"save a pipeline with pipe.save_pretrained(folder, safe_serialization=True)"
        )
