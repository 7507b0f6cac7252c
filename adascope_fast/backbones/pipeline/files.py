"""A pipeline's files before anything is loaded: which parts are there, and whether what is there can be read.

Every error names the file or the component. What is not seen: a changed byte within the numbers of a weights' file,
for which safetensors has no checksum; and, before the weights are read, a changed name of one of them.
"""

import inspect
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open

from adascope_fast.backbones.pipeline.keys import defaults_of, refuse_absurd
from adascope_fast.loading import quiet

NEVER_RUN = ("safety_checker", "feature_extractor", "image_encoder")
"""Components of a pipeline that need not be there: they judge finished images, or see images."""
AGAIN = "save or download it again"
MUCH = 2**26  # numbers that would take noticeable memory before a shape is compared
WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)[^.]*(?P<variant>\.[^.]+)?\.safetensors")


def read_json(path: Path, told: str) -> dict[str, Any]:
    """A JSON object; ValueError that says which file, by `told`, and what is wrong."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{told} must be JSON, got {error!s:.100}; download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{told} must be a JSON object, got {values!r:.50}; download it again")
    return values


def refuse_missing_parts(name: str, index: Mapping[str, Any], parts: Mapping[str, tuple[str, ...]], may_lack: set[str]):
    """ValueError where `model_index.json` does not name the classes that a family is made of.

    Args:
        name: of the model, as the user gave it.
        parts: the classes that each component may have.
        may_lack: components that may be null, all of them together.
    """
    for key, entry in index.items():
        is_pair = isinstance(entry, list) and len(entry) == 2
        if isinstance(entry, (list, dict)) and key[0] != "_" and not (is_pair and _is_class(entry)):
            raise ValueError(
                f"{key} in model_index.json of {name!r} must be [library, class] or [null, null], got {entry!r:.60}; "
                f"{AGAIN}"
            )
    lacking = {part for part in parts if not _named(index, part)}
    if lacking - may_lack or (lacking and lacking != may_lack):
        part = sorted(lacking - may_lack or may_lack - lacking)[0]
        together = f" with {', '.join(sorted(lacking))} absent" if not lacking - may_lack else ""
        raise ValueError(
            f"{name!r} is not a whole pipeline, its model_index.json must name a {part}{together}, got "
            f"{index.get(part)!r:.40}; {AGAIN}"
        )
    for part, classes in parts.items():
        if part not in lacking:
            library, class_name = index[part]
            found = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), class_name, None)
            if library not in ("diffusers", "transformers") or not is_one_of(found, classes):
                raise ValueError(
                    f"the {part} of {name!r} must be a {' or '.join(classes)}, got {library}.{class_name} in "
                    f"model_index.json; use a model of one of these classes"
                )


def is_one_of(found: Any, classes: tuple[str, ...]) -> bool:
    """Whether a class is one of those named, or is made of one."""
    return isinstance(found, type) and bool({base.__name__ for base in found.__mro__} & set(classes))


def _is_class(entry: Any) -> bool:
    return entry == [None, None] or all(isinstance(one, str) for one in entry)


def _named(index: Mapping[str, Any], part: str) -> bool:
    entry = index.get(part)
    return isinstance(entry, list) and entry[0] is not None


def build(name: str, part: str, class_name: str, config: Mapping[str, Any]) -> Any:
    """A model or scheduler from its configuration, on the device that is set; ValueError that names the component."""
    file = f"scheduler/{part}_config.json" if part == "scheduler" else f"{part}/config.json"
    told = f"{file} of {name!r}"
    is_diffusers = hasattr(diffusers, class_name)
    mark = "_class_name" if is_diffusers else "model_type"
    if not isinstance(config.get(mark), str):
        raise ValueError(f"{told} must name its {mark}, got {config.get(mark)!r:.40}; download it again")
    model_class = getattr(diffusers if is_diffusers else transformers, class_name)
    defaults = defaults_of(model_class) if is_diffusers else _defaults_of_transformers(model_class.config_class)
    refuse_absurd(defaults, config, told)
    try:
        with quiet():
            if is_diffusers:
                return model_class.from_config(config)
            return model_class(model_class.config_class.from_dict(dict(config)))
    except Exception as error:
        raise ValueError(f"the {part} of {name!r} cannot be built from {file}: {reason_of(error)}; {AGAIN}") from None


def _defaults_of_transformers(config_class: Any) -> dict[str, Any]:
    defaults = config_class().to_dict()
    own = {one for base in config_class.__mro__ for one in inspect.signature(base).parameters if base is not object}
    return {key: value for key, value in defaults.items() if key in own and key not in ("architectures", "id2label")}


def reason_of(error: BaseException) -> str:
    """The class and the first words of an error, in one short line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words:.160}" if words else type(error).__name__


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The .safetensors files of a model that are read: those of the variant where there are any."""
    found = [(path, match["variant"]) for path in sorted(folder.glob("*.safetensors"))
             if (match := WEIGHTS.fullmatch(path.name))]  # fmt: skip
    chosen = [path for path, of in found if variant is not None and of and of.startswith(f".{variant}")]
    return chosen or [path for path, of in found if of is None]


def num_weights(path: Path, told: str) -> int:
    """Numbers that a .safetensors file holds, by its header; ValueError where it is damaged."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{told} cannot be read as safetensors, {reason_of(error)}; download it again") from None


def refuse_damaged_weights(name: str, folder: Path, part: str, variant: str | None, model: torch.nn.Module) -> None:
    """ValueError where the files of a component are damaged, or hold far less than its config.json describes."""
    files = weight_files(folder / part, variant)
    for index in sorted((folder / part).glob("*.safetensors.index*.json")):
        told = f"{part}/{index.name} of {name!r}"
        shards = read_json(index, told).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{told} must have a weight_map of names and files, got {shards!r:.40}; download it again")
    held = sum(num_weights(path, f"{part}/{path.name} of {name!r}") for path in files)
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if files and described > 2 * held + MUCH:  # below, what is missing is named when the weights are read
        raise ValueError(
            f"the {part} of {name!r} must have all its weights, and its files hold {held} numbers where "
            f"{part}/config.json describes {described}; {AGAIN}"
        )


def read_tokenizer(name: str, folder: Path, part: str, class_name: str) -> Any:
    """A tokenizer whose files are whole; ValueError that names the file."""
    place = folder / part
    for path in sorted(place.glob("*.json")):
        values = read_json(path, f"{part}/{path.name} of {name!r}")
        if not values and path.name != "added_tokens.json":
            raise ValueError(f"{part}/{path.name} of {name!r} must not be empty, got {{}}; download it again")
    if not (place / "tokenizer_config.json").is_file():
        raise ValueError(
            f"{name!r} is not a whole pipeline, it has no {part}/tokenizer_config.json; save or download it again"
        )
    plain = (place / "vocab.json").is_file() and (place / "merges.txt").is_file()
    if not (plain or any((place / file).is_file() for file in ("tokenizer.json", "spiece.model"))):
        raise ValueError(
            f"{name!r} is not a whole pipeline, {part} has neither tokenizer.json nor vocab.json with merges.txt nor "
            f"spiece.model; save or download it again"
        )
    if plain:
        _refuse_damaged_merges(name, place, part)
    try:
        with quiet():
            return getattr(transformers, class_name).from_pretrained(str(place))
    except Exception as error:
        files = ", ".join(sorted(path.name for path in place.iterdir()))
        raise ValueError(
            f"the {part} of {name!r} cannot be read from its files ({files}): {reason_of(error)}; download it again"
        ) from None


def _refuse_damaged_merges(name: str, place: Path, part: str) -> None:
    """Every token of CLIP's vocabulary but letters and special ones is the sum of two others, by merges.txt."""
    told = f"{part}/merges.txt of {name!r}"
    try:
        lines = (place / "merges.txt").read_text(encoding="utf-8").split("\n")
    except ValueError as error:
        raise ValueError(f"{told} must be text, got {error!s:.80}; download it again") from None
    pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    sums = {"".join(pair) for pair in pairs}
    vocabulary = read_json(place / "vocab.json", f"{part}/vocab.json of {name!r}")
    unmade = [
        token
        for token in vocabulary
        if len(token.removesuffix("</w>")) > 1 and not token.startswith("<|") and token not in sums
    ]
    unknown = [total for total in sums if total not in vocabulary]
    if any(len(pair) != 2 for pair in pairs) or unmade or unknown:
        example = (unmade or unknown or [" ".join(next(pair for pair in pairs if len(pair) != 2))])[0]
        raise ValueError(f"{told} and vocab.json must make the same tokens, got {example!r:.40}; download them again")


def refuse_other_tokenizer(name: str, part: str, tokenizer: Any, encoder: Any) -> None:
    """ValueError where a tokenizer gives ids, or numbers of tokens, that its encoder has no place for."""
    rows = encoder.config.vocab_size
    if not 3 <= len(tokenizer) <= rows:
        raise ValueError(
            f"the {part} of {name!r} must have the tokens of its text encoder, at most {rows}, got {len(tokenizer)}; "
            f"{AGAIN}"
        )
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if positions is not None and tokenizer.model_max_length > positions:
        raise ValueError(
            f"model_max_length in {part}/tokenizer_config.json of {name!r} must be at most the {positions} positions "
            f"of its text encoder, got {tokenizer.model_max_length:g}; set it to {positions}, or download it again"
        )
