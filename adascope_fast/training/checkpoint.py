"""Folders of safetensors and JSON that are either whole or absent: training state survives a kill at any moment.

Unlike accelerate's `save_state` nothing is pickled: optimizer moments are named tensors.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from adascope_fast.loading import aligned
from adascope_fast.loading import load_optimizer_tensors as load_optimizer_tensors
from adascope_fast.loading import optimizer_tensors as optimizer_tensors
from adascope_fast.loading import prefixed as prefixed
from adascope_fast.loading import select as select


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
