"""Folders of safetensors and JSON that are either whole or absent: training state survives a kill at any moment.

Unlike accelerate's `save_state` nothing is pickled: optimizer moments are named tensors.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adascope_fast.loading import aligned


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write `state.safetensors` and `state.json` into `folder`, replacing it in one rename."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial / "state.safetensors"
    )
    (partial / "state.json").write_text(json.dumps(state))
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU, in memory of their own) and the JSON state of a folder written by `save`."""
    return aligned(load_file(folder / "state.safetensors")), json.loads((folder / "state.json").read_text())


def numbered(folder: Path) -> list[Path]:
    """Complete checkpoints below `folder`, oldest first; their names are numbers."""
    if not folder.is_dir():
        return []
    whole = [path for path in folder.iterdir() if path.name.isdigit() and (path / "state.json").is_file()]
    return sorted(whole, key=lambda path: int(path.name))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts as `{parameter index}.{name}` tensors; hyper-parameters are not included."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, entry in state.items() for name, value in entry.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took out; the optimizer must hold the same parameters in the same order.

    Moments get the memory layout of their parameter: a fused optimiser walks through both as they lie in memory.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose name starts with `prefix.`, without it."""
    return {name.removeprefix(prefix + "."): value for name, value in tensors.items() if name.startswith(prefix + ".")}


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same entries named `prefix.name`."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}
