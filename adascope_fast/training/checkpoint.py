"""Folders of safetensors and JSON that are either whole or absent: training state survives a kill at any moment.

Unlike accelerate's `save_state` nothing is pickled: optimizer moments are named tensors. Each folder has SHA256SUMS, so
that what was damaged later is found, named and left alone, and the one before it is used. The run's log is not in it
but beside it, once: a checkpoint says how much of it there was, and costs the same however long the run has been.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adascope_fast.config import ConfigError
from adascope_fast.loading import aligned, follow_umask
from adascope_fast.loading import load_optimizer_tensors as load_optimizer_tensors
from adascope_fast.loading import optimizer_tensors as optimizer_tensors
from adascope_fast.loading import prefixed as prefixed
from adascope_fast.loading import select as select

SUMS = "SHA256SUMS"
TENSORS, STATE, LOG = "state.safetensors", "state.json", "stats.jsonl"

logger = logging.getLogger(__name__)


class NotFiniteError(FloatingPointError):
    """A tensor that was to be written is not finite; `name` says which."""

    def __init__(self, name: str) -> None:
        super().__init__(f"a checkpoint must be finite, and {name} is not")
        self.name = name


class LogCopy:
    """A copy of a run's log beside its checkpoints, written on from where it ends."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._length, self._sum = 0, hashlib.sha256()

    def extend(self, folder: Path) -> dict[str, Any]:
        """The length and the SHA-256 of the log, of which `folder` then has the same.

        Where less is left than was copied before, all is copied again.
        """
        copy = folder / LOG
        self._log.touch()
        copy.touch()
        if min(self._log.stat().st_size, copy.stat().st_size) < self._length:
            self._length, self._sum = 0, hashlib.sha256()
        with self._log.open("rb") as file:
            file.seek(self._length)
            new = file.read()
        with copy.open("r+b") as file:
            file.seek(self._length)
            file.truncate()
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        self._sum.update(new)
        self._length += len(new)
        return {"bytes": self._length, "sha256": self._sum.hexdigest()}


@dataclass(frozen=True)
class Checkpoint:
    """What was read of a checkpoint: tensors on the CPU in memory of their own, JSON state, and the run's log."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    log: str
    digest: str = ""
    """SHA-256 of the file of its tensors."""

    @property
    def next_iteration(self) -> int:
        """The iteration to continue with."""
        return self.state["next_iteration"]


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], log: LogCopy | None = None) -> None:
    """Write the files of a checkpoint into `folder`, replacing it in one rename.

    Args:
        log: what is copied beside `folder`, as far as it has come.

    Raises:
        NotFiniteError: a tensor is not finite; nothing is written.
        OSError: it could not be written; what was there before is whole.
    """
    if name := not_finite(tensors):
        raise NotFiniteError(name)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial / TENSORS)
        told = {**state} if log is None else {**state, "log": log.extend(folder.parent)}
        (partial / STATE).write_text(json.dumps(told, allow_nan=False), encoding="utf-8")
        sums = [f"{digest(partial / name)}  {name}\n" for name in (TENSORS, STATE)]
        (partial / SUMS).write_text("".join(sums), encoding="utf-8")
        follow_umask(partial)
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"the checkpoint {folder} could not be written ({reason(error)}); the one before it is whole: make room "
            f"or give access, then continue the run with --resume"
        ) from None


def load(folder: Path) -> Checkpoint:
    """A checkpoint as it was written; ValueError that names the file where it is not."""
    sums = _sums(folder)
    for name in dict.fromkeys((TENSORS, STATE, *sums)):
        try:
            is_same = digest(folder / name) == sums.get(name)
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({reason(error)})") from None
        if not is_same:
            raise ValueError(f"{name} is not what was written, its SHA-256 differs")
    tensors = aligned(load_file(folder / TENSORS))
    if name := not_finite(tensors):
        raise ValueError(f"{TENSORS} has numbers that are not finite, in {name}")
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return Checkpoint(tensors, state, _log(folder, state, sums), sums[TENSORS])


def _log(folder: Path, state: Mapping[str, Any], sums: Mapping[str, str]) -> str:
    """The log at a checkpoint, from the copy beside it or the run's own; in the folders of earlier versions its own."""
    if LOG in sums:
        return (folder / LOG).read_text(encoding="utf-8")
    if (told := state.get("log")) is None:
        return ""
    for path in (folder.parent / LOG, folder.parents[1] / LOG):
        with suppress(OSError), path.open("rb") as file:
            found = file.read(told["bytes"])
            if hashlib.sha256(found).hexdigest() == told["sha256"]:
                return found.decode("utf-8")
    raise ValueError(f"neither {folder.parent / LOG} nor {folder.parents[1] / LOG} has what was logged until then")


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint below `folder`; None if there are none. Damaged ones are named in warnings.

    Raises:
        ConfigError: there are some, and none is whole.
    """
    damaged: list[str] = []
    for path in reversed(numbered(folder)):
        try:
            found = load(path)
        except ValueError as error:
            damaged.append(f"{path}: {error}")
            continue
        for line in damaged:
            logger.warning("damaged checkpoint left out, %s; %s is used", line, path)
        return found
    if damaged:
        raise ConfigError(
            f"a run continues from a whole checkpoint, and {'; '.join(damaged)}; "
            f"restore the files, or start again with --overwrite"
        )
    return None


def numbered(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first, whole or not; their names are numbers."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.isascii() and path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The name of a tensor with numbers that are not finite, "" if all are; waits for the device once."""
    kept = {name: value for name, value in tensors.items() if value.is_floating_point() and value.numel()}
    by_device: dict[torch.device, list[str]] = {}
    for name, value in kept.items():
        by_device.setdefault(value.device, []).append(name)
    for names in by_device.values():
        flags = torch.stack([kept[name].isfinite().all() for name in names]).tolist()
        for name, is_finite in zip(names, flags, strict=True):
            if not is_finite:
                return name
    return ""


def digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: Exception) -> str:
    """What an error of the system says, without its number and its file."""
    return (getattr(error, "strerror", None) or " ".join(str(error).split()))[:200]


def _sums(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{SUMS} cannot be read ({reason(error)})") from None
    return {name: value for value, _, name in (line.partition("  ") for line in lines)}
