"""How weights come into a model: all of them, into memory that is aligned alike, wherever they come from.

diffusers and transformers go on where a file lacks weights: the first leaves them without numbers, the second draws
them at random. Here they are named and refused.

PyTorch's own memory starts at multiples of 64 bytes. A safetensors file is mapped, and its tensors start wherever they
lie in the file. Matrix products on a CPU (MKL's, for one) take paths that round otherwise by the address of a weight,
so without this equal weights of two files, or of a file and of memory, do not give equal bits.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adascope_fast.distributed.sharded import all_whole, copy_into

ALIGNMENT = 64  # bytes, of what PyTorch allocates on a CPU
BITSANDBYTES = "__bnb_optimizer_quant_state__"
"""The key under which bitsandbytes hides a parameter's moments from FSDP; it reads them without it too."""


def align(module: nn.Module) -> None:
    """Move each weight and buffer of `module` on the CPU that is not so aligned to memory of its own."""
    for tensor in chain(module.parameters(), module.buffers()):
        tensor.data = _aligned(tensor.data)


def aligned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, copied where they are not so aligned."""
    return {name: _aligned(tensor) for name, tensor in tensors.items()}


def _aligned(tensor: Tensor) -> Tensor:
    is_off = tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT != 0
    return tensor.clone() if is_off else tensor


def load_whole(model_class: Any, place: str | Path, part: str, **options: Any) -> Any:
    """A model by its `from_pretrained`, in safetensors, with every one of its weights.

    Args:
        model_class: a model class of diffusers or transformers.
        part: what an error calls it.
        options: of `from_pretrained`.

    Raises:
        ValueError: weights are missing, or have another shape.
        OSError: there are no files of it.
    """
    from transformers import PreTrainedModel

    if issubclass(model_class, PreTrainedModel):
        options["ignore_mismatched_sizes"] = True  # they are refused below, by name
    load: Any = model_class.from_pretrained
    with quiet():
        model, info = load(place, use_safetensors=True, output_loading_info=True, **options)
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    missing = sorted({*info["missing_keys"], *mismatched})
    # A buffer that older versions stored.
    unknown = sorted(key for key in info["unexpected_keys"] if not key.endswith("position_ids"))
    if missing:
        raise ValueError(not_whole(part, missing, unknown))
    if unknown:
        warnings.warn(f"{part} has weights that are not used, {_some(unknown)}", RuntimeWarning, stacklevel=2)
    return model


def not_whole(part: str, missing: Sequence[str], unknown: Sequence[str] = ()) -> str:
    """What to say of a model without some of its weights."""
    lacks = f"{_some(missing)} {'is' if len(missing) == 1 else 'are'}" if missing else "some are"
    advice = "save or download it again"
    if unknown:
        advice += f", or upgrade diffusers and transformers: its file has names unknown here, {_some(unknown)}"
    return f"{part} must have all its weights, and {lacks} missing or of another shape; {advice}"


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


@contextmanager
def quiet() -> Iterator[None]:
    """No loading bars, no remarks about what is not used, and no second line for what is raised as an error."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (level, has_bars) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if has_bars:
                library.enable_progress_bar()


def follow_umask(place: Path) -> None:
    """Give a file, or every file below a folder, the mode of a newly made one: safetensors writes 0600 whatever it is.

    The umask is read by setting it, so no other thread should make files meanwhile.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    for path in [place, *place.rglob("*")]:
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts as `{parameter index}.{name}` tensors; hyper-parameters are not included.

    A count that an optimiser has as a number is an integer tensor; those of torch are floating ones.
    """
    found: dict[str, Tensor] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        inner = entry.get(BITSANDBYTES, {})  # what has another shape than its parameter, apart from the rest
        for name, value in {**entry, **inner}.items():
            if name != BITSANDBYTES:
                found[f"{index}.{name}"] = torch.as_tensor(value)
    return _apart(all_whole(found))


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, each in memory of its own, which safetensors asks for: parameters share bitsandbytes' code books."""
    seen: set[int] = set()
    for name, value in tensors.items():
        if value.numel() and value.data_ptr() in seen:
            tensors[name] = value.clone()
        seen.add(value.data_ptr())
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took out; the optimizer must hold the same parameters in the same order.

    Moments get the memory layout of their parameter: a fused optimiser walks through both as they lie in memory.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            moments = torch.empty_like(parameter, dtype=value.dtype)
            copy_into(moments, value)
            value = moments
        is_number = value.ndim == 0 and not value.is_floating_point()
        state.setdefault(int(index), {})[name] = value.item() if is_number else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose name starts with `prefix.`, without it."""
    return {name.removeprefix(prefix + "."): value for name, value in tensors.items() if name.startswith(prefix + ".")}


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same entries named `prefix.name`."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}
