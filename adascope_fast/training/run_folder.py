"""The folder of a run: what is written when, so that it can be resumed after a kill at any moment.

`config.toml` (resolved), `stats.jsonl` (a line an iteration), `evaluation.json`, `samples/`, `checkpoints/NNNNNN/`,
`adapter/` (diffusers LoRA format), `run.json` (status, versions, cost), `report.html`.
"""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from adascope_fast.config import Config, ConfigError
from adascope_fast.config.sources import read_toml
from adascope_fast.training import checkpoint

PACKAGES = ("adascope-fast", "torch", "triton", "diffusers", "transformers", "accelerate", "peft")


class RunFolder:
    """A run's files. `create` makes a new one, `open` continues one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def check(config: Config, *, overwrite: bool) -> None:
        """ConfigError if `create` would replace what it must not; nothing is written."""
        path = Path(config.run.folder)
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            if not overwrite:
                raise ConfigError(
                    f"a run never replaces what is there, and run.folder = {str(path)!r} exists; "
                    f"continue it with --resume {path}, replace it with --overwrite, or set run.folder"
                )
            if not (path / "config.toml").is_file():
                raise ConfigError(
                    f"--overwrite replaces runs only, and {str(path)!r} holds no config.toml; choose another run.folder"
                )

    @classmethod
    def create(cls, config: Config, *, overwrite: bool) -> "RunFolder":
        """A new folder with its `config.toml`; an existing run is replaced only if asked."""
        cls.check(config, overwrite=overwrite)
        path = Path(config.run.folder)
        try:
            if path.exists():
                shutil.rmtree(path)
            (path / "samples").mkdir(parents=True)
            _write(path / "config.toml", config.to_toml())
        except OSError as error:
            raise ConfigError(
                f"run.folder must be writable, {str(path)!r} is not ({error.strerror}); set run.folder to another place"
            ) from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of a run that was started before, by this version."""
        load_config(path)
        (path / "samples").mkdir(exist_ok=True)
        return cls(path)

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one iteration to `stats.jsonl`."""
        with (self.path / "stats.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def stats(self, *, before: int | None = None) -> list[dict[str, Any]]:
        """The logged iterations; `before` leaves out those from that one on. A line cut short by a kill is ignored."""
        path = self.path / "stats.jsonl"
        records = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if before is None or record["iteration"] < before:
                records.append(record)
        return records

    def save_checkpoint(
        self, next_iteration: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int
    ) -> None:
        """Write the state from which `next_iteration` can start; older ones beyond `keep` go."""
        folder = self.path / "checkpoints"
        checkpoint.save(folder / f"{next_iteration:06d}", tensors, {"next_iteration": next_iteration, **state})
        for old in checkpoint.numbered(folder)[:-keep]:
            shutil.rmtree(old)

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest whole checkpoint; the statistics logged after it are dropped, since they will be made again."""
        found = checkpoint.numbered(self.path / "checkpoints")
        tensors, state = checkpoint.load(found[-1]) if found else ({}, {"next_iteration": 0})
        kept = self.stats(before=state["next_iteration"])
        _write(self.path / "stats.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        return (tensors, state) if found else None

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder, empty if it is not there."""
        path = self.path / name
        return json.loads(path.read_text()) if path.is_file() else {}

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Replace a JSON file of the folder in one go."""
        _write(self.path / name, json.dumps(values, indent=1))

    def describe(self, status: str, device: torch.device, seconds: float, chosen: Mapping[str, str]) -> None:
        """Write `run.json`: status, command, machine, versions, commit, peak memory, seconds, and what was chosen."""
        on_gpu = device.type == "cuda"
        peak = (
            torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        self.write(
            "run.json",
            {
                "status": status,
                "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                "device": torch.cuda.get_device_name()
                if on_gpu
                else f"{platform.machine()} CPU, {os.cpu_count()} cores",
                "versions": {"python": platform.python_version(), **_versions()},
                "commit": _commit(),
                "peak_memory_mb": round(peak / 2**20),
                "seconds_total": round(seconds, 1),
                "acceleration": dict(chosen),
            },
        )


def load_config(folder: Path) -> Config:
    """The configuration of a run; ConfigError where the folder is none, or an earlier version's."""
    path = folder / "config.toml"
    if not path.is_file():
        raise ConfigError(f"a run's folder holds a config.toml, {str(folder)!r} does not; check the path")
    values = read_toml(path)
    try:
        Config.model_validate(values)
    except ValidationError as error:
        unknown = [problem for problem in error.errors() if problem["type"] == "extra_forbidden"]
        if unknown:  # a run writes the keys that its version has, and no others
            first, *_, last = unknown[0]["loc"]
            raise ConfigError(
                f"the run in {str(folder)!r} was made by an earlier version of adascope-fast, whose config.toml has "
                f"{first}.{last} where this one has not; finish it with {_made_by(folder)}, or start a new run"
            ) from None
    return Config.of(values)


def _made_by(folder: Path) -> str:
    """The version and commit of `run.json`, in words."""
    run = RunFolder(folder).read("run.json")
    version, commit = run.get("versions", {}).get("adascope-fast"), run.get("commit")
    if not version and not commit:
        return "the version that made it"
    return f"that version ({version or 'unknown'}{f', commit {commit}' if commit else ''})"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    # With its build, as in 2.14.1+cu130, which not every installation's metadata names.
    return found | {"torch": str(torch.__version__)}


def _commit() -> str:
    """The commit of the checkout that this package runs from, empty if it runs from an installation."""
    here = Path(__file__).parents[1]
    if not (here.parent / ".git").exists():
        return ""
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
