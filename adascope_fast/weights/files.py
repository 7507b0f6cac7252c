"""Published files in, safetensors out: a name and a tensor for each weight, and nothing else.

A pickle is opened with `weights_only`: tensors, numbers and containers, never code.
"""

import json
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHTS = "model.safetensors"
ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
INSIDE = ("state_dict", "model", "params")
"""Where the weights are in a file that has more than them."""


def parted(files: Sequence[Path]) -> tuple[Path, list[Path]]:
    """The one file of weights, and the others; ValueError unless there is exactly one."""
    found = [file for file in files if file.suffix.lower() in ENDINGS]
    if len(found) != 1:
        raise ValueError(
            f"import-weights takes one file of weights ({', '.join(ENDINGS)}), got {len(found)} in "
            f"{', '.join(file.name for file in files)}; name the one"
        )
    return found[0], [file for file in files if file is not found[0]]


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The weights of a file by name, without the `module.` of data-parallel training; ValueError where it has none."""
    with path.open("rb") as file:  # what the system refuses is not the file's fault
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle, which is refused below
            found: Any = _read(path, is_zip=is_zip)
    except torch.OutOfMemoryError:
        raise
    except pickle.UnpicklingError as error:
        why = " ".join(str(error).split())
        is_code = "weights_only" in why or "Unsupported" in why
        got = "a pickle that would run code" if is_code else f"one that cannot be read ({why[:100]})"
        raise ValueError(f"{path} must be a file of weights alone, got {got}; download the publisher's again") from None
    except Exception as error:  # a damaged file raises whatever its reader trips over
        why = " ".join(str(error).split())[:100] or type(error).__name__
        raise ValueError(
            f"{path} must be a file of weights, got one that cannot be read ({why}); download it again"
        ) from None
    for name in INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} must hold weights by name, got {type(found).__name__} without; name the publisher's")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _read(path: Path, *, is_zip: bool) -> Any:
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def refuse_others(path: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]) -> None:
    """ValueError where names or shapes of weights are not those that are wanted."""
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    shaped = [name for name, shape in wanted.items() if name in tensors and tuple(tensors[name].shape) != tuple(shape)]
    wrong = {"lacks": missing, "has besides": unknown, "has in another shape": shaped}
    told = [f"{word} {_some(names)}" for word, names in wrong.items() if names]
    if told:
        raise ValueError(f"{path} must have the weights of its kind, and {' and '.join(told)}; name the publisher's")


def save(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write `model.safetensors`; ValueError for a weight that is not finite."""
    from safetensors.torch import save_file

    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"weights must be finite, and {name} is not; download the file again")
    own = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    save_file(own, str(folder / WEIGHTS), metadata={"format": "pt"})


def save_processor(side: int, folder: Path) -> None:
    """Write the preprocessor_config.json of OpenAI's CLIP for images of `side` pixels."""
    described = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(described, indent=2) + "\n")


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def shapes_of(named: Mapping[str, Tensor], path: Path, what: str) -> Callable[[str, int], tuple[int, ...]]:
    """A function of a weight's name and its number of dimensions that gives its shape.

    It raises ValueError where there is none such.

    Args:
        what: what the file at `path` must have, for that error.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        value = named.get(name)
        if value is None or value.ndim != dimensions:
            raise ValueError(f"{path} must have {what}, and lacks {name}")
        return tuple(value.shape)

    return shape


def layers_of(named: Mapping[str, Tensor], start: str) -> int:
    """How many layers have weights whose names begin with `start` and the layer's number."""
    return len({name.removeprefix(start).partition(".")[0] for name in named if name.startswith(start)})
