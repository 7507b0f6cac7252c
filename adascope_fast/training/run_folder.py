"""The folder of a run: what is written when, so that it can be resumed after a kill at any moment.

`config.toml` (resolved), `parts.json` (what the run was made of besides), `stats.jsonl` (a line an iteration),
`evaluation.json`, `samples/`, `checkpoints/NNNNNN/`, `adapter/` (diffusers LoRA format), `run.json` (status, versions,
cost), `report.html`. A checkpoint also has the configuration and the evaluation as they were, and beside it lies a copy
of the log.
"""

import json
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import ValidationError
from torch import Tensor

from adascope_fast.config import Config, ConfigError
from adascope_fast.config.sources import read_toml
from adascope_fast.engine.acceleration import peak_memory
from adascope_fast.reporting.files import is_run, json_object, no_run, records, text_of
from adascope_fast.serving.settings import Asking
from adascope_fast.training import checkpoint
from adascope_fast.training.checkpoint import Checkpoint
from adascope_fast.training.lock import contents, locked, not_writable, refuse_taken
from adascope_fast.training.monitoring import best

PLACES = {"run.folder", "model.name", "prompts.train", "prompts.held_out", "algorithm.preferences", "reward.url"}
PLACES |= {"rollout.url"}
"""Where things are: they may have been moved, and `origin` sees to it that they are the same."""
MAY_CHANGE = {"train.iterations", "train.device", "train.keep_checkpoints"} | PLACES
MAY_CHANGE |= {"log.trackers", "log.project", "log.run_name", "log.prometheus"}
MAY_CHANGE |= {"reward.host", "reward.port"}
MAY_CHANGE |= {f"{section}.{key}" for section in ("reward", "rollout") for key in Asking.model_fields}
MAY_CHANGE |= {"rollout.max_drift"}
"""What a resumed run may have otherwise than before."""
PACKAGES = ("adascope-fast", "torch", "triton", "diffusers", "transformers", "accelerate", "peft")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Started:
    """A run that was started: its configuration, and its newest whole checkpoint if it has one."""

    config: Config
    checkpoint: Checkpoint | None


class RunFolder:
    """A run's files. `create` makes a new one, `open` continues one; one process has it at a time, until `close`."""

    def __init__(self, path: Path, held: ExitStack) -> None:
        self.path, self._held = path, held
        self._log_copy = checkpoint.LogCopy(path / "stats.jsonl")
        earlier = _json(path / "run.json")
        self._seconds, self._peak = (_number(earlier.get(key)) for key in ("seconds_total", "peak_memory_mb"))
        self._date = earlier.get("date") or f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"

    @classmethod
    def check(cls, config: Config, *, overwrite: bool) -> None:
        """ConfigError if `create` would replace what it must not, or another process has the run."""
        refuse_taken(Path(config.run.folder), overwrite=overwrite)
        path = Path(config.run.folder)
        if path.is_dir():
            with locked(path):
                pass

    @classmethod
    def create(cls, config: Config, *, overwrite: bool, heading: str = "") -> Self:
        """A new folder with its `config.toml`; an existing run is replaced only if asked.

        Args:
            heading: comment lines of `config.toml`.
        """
        refuse_taken(Path(config.run.folder), overwrite=overwrite)
        path, held = Path(config.run.folder), ExitStack()
        try:
            path.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(path))
            refuse_taken(Path(config.run.folder), overwrite=overwrite)  # another process may have begun it meanwhile
            for old in contents(path):
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            (path / "samples").mkdir()
            write_whole(path / "config.toml", heading + config.to_toml())
        except OSError as error:
            held.close()
            raise not_writable(path, error.strerror) from None
        except ConfigError:
            held.close()
            raise
        return cls(path, held)

    @classmethod
    def open(cls, path: Path) -> Self:
        """The folder of a run that was started before."""
        if not is_run(path):
            raise ConfigError(no_run(path))
        held = ExitStack()
        try:
            held.enter_context(locked(path))
            (path / "samples").mkdir(exist_ok=True)
        except OSError as error:
            held.close()
            raise ConfigError(
                f"run.folder must be writable, {str(path)!r} is not ({error.strerror}); give access, or copy it"
            ) from None
        return cls(path, held)

    def close(self) -> None:
        """Let other processes have the run."""
        self._held.close()

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def write_config(self, config: Config) -> None:
        """Replace `config.toml`, all but its heading, if it says something else."""
        path = self.path / "config.toml"
        text = text_of(path)
        heading = "".join(
            takewhile(lambda line: line.startswith("#") or not line.strip(), text.splitlines(keepends=True))
        )
        if text != heading + config.to_toml():
            write_whole(path, heading + config.to_toml())

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one iteration to `stats.jsonl`; what is not finite is null there."""
        with (self.path / "stats.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(record), allow_nan=False) + "\n")

    def stats(self) -> list[dict[str, Any]]:
        """The logged iterations. A line cut short by a kill is ignored."""
        return records(text_of(self.path / "stats.jsonl"))

    def save_checkpoint(
        self, next_iteration: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], config: Config, keep: int
    ) -> Path:
        """Write the state from which `next_iteration` can start, with what else the run has so far; older ones go.

        Raises:
            FloatingPointError: the tensors are not finite.
            OSError: it cannot be written; the one before it is whole.
        """
        folder = self.path / "checkpoints"
        told = {"evaluation": self.read("evaluation.json"), "config": config.to_toml()}
        state = {"next_iteration": next_iteration, **state, **told}
        checkpoint.save(folder / f"{next_iteration:06d}", tensors, state, self._log_copy)
        for old in (*checkpoint.numbered(folder)[:-keep], *checkpoint.numbered(self.path / best.FOLDER)[:-1]):
            shutil.rmtree(old, ignore_errors=True)
        return folder / f"{next_iteration:06d}"

    def restore(self, found: Checkpoint | None) -> None:
        """Put log and evaluation back to what they were at a checkpoint: what came later will be made again."""
        write_whole(self.path / "stats.jsonl", "" if found is None else found.log)
        if found is not None:
            self.write("evaluation.json", found.state["evaluation"])

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; empty if it is not there, or is no longer JSON."""
        return _json(self.path / name)

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Replace a JSON file of the folder in one go; what is not finite is null there."""
        write_whole(self.path / name, json.dumps(plain(values), indent=1, allow_nan=False))

    def describe(
        self, status: str, device: torch.device, seconds: float, chosen: Mapping[str, str], **more: Any
    ) -> None:
        """Write `run.json`: status, start, command, machine, versions, commit, peak memory, seconds, what was chosen.

        Args:
            seconds: of this process; those of the processes before it are added.
            more: what else there is to say.
        """
        on_gpu, peak = device.type == "cuda", peak_memory(device)
        kind = f"{platform.machine()} {'CPU' if device.type == 'cpu' else device.type}"
        self.write(
            "run.json",
            {
                "status": status,
                **more,
                "date": self._date,
                "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                "device": torch.cuda.get_device_name() if on_gpu else f"{kind}, {os.cpu_count()} cores",
                "versions": {"python": platform.python_version(), **versions()},
                "commit": _commit(),
                "peak_memory_mb": max(round(peak / 2**20), round(self._peak)),
                "seconds_total": round(self._seconds + seconds, 1),
                "acceleration": dict(chosen),
            },
        )


class NoFolder:
    """What the other processes of a run have in place of its folder, which the first one writes: nothing is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def close(self) -> None:
        """Nothing is held."""

    def __getattr__(self, name: str) -> Any:
        if not hasattr(RunFolder, name):
            raise AttributeError(name)
        return lambda *_, **__: None


def load_config(folder: Path) -> Config:
    """The configuration of a run; ConfigError where the folder is none, or an earlier version's.

    Checkpoints are read only where `config.toml` is lost; `load_run_files` also compares the two.
    """
    try:
        return _config(folder)
    except ConfigError:
        return load_run_files(folder).config


def load_run_files(folder: Path) -> Started:
    """Configuration and newest whole checkpoint of a run. Nothing is written.

    A `config.toml` that is lost or can no longer be read is taken from the checkpoint, which a warning says.

    Raises:
        ConfigError: the folder is no run, or an earlier version's; no checkpoint is whole; `config.toml` is another
            than that of the checkpoint, in more than may change.
    """
    if not is_run(folder):
        raise ConfigError(no_run(folder))
    try:
        config = _config(folder)
    except ConfigError as error:
        found = None
        with suppress(ConfigError):
            found = checkpoint.newest(folder / "checkpoints")
        if found is None:
            raise
        logger.warning("%s; the configuration in the newest checkpoint is used", error)
        return Started(Config.of(without_effect(tomllib.loads(found.state["config"]))), found)
    found = checkpoint.newest(folder / "checkpoints")
    if found is not None:
        before = Config.of(without_effect(tomllib.loads(found.state["config"])))
        if changed := differences(before, config) - MAY_CHANGE:
            raise ConfigError(
                f"{folder / 'config.toml'} must say what the run was made with, and {', '.join(sorted(changed))} "
                f"{'is' if len(changed) == 1 else 'are'} another than in its checkpoint; undo the change, or remove "
                f"the file: the checkpoint has it too"
            )
    return Started(config, found)


def refuse_another(before: Config, after: Config) -> None:
    """ConfigError where `after` changes what a resumed run must repeat."""
    changed = differences(before, after)
    if changed - MAY_CHANGE:
        raise ConfigError(
            f"a resumed run repeats the one left alone, so {', '.join(sorted(changed - MAY_CHANGE))} cannot "
            f"change; only {', '.join(sorted(MAY_CHANGE - {'run.folder'}))} can, or start a new run"
        )


def differences(old: Config, new: Config) -> set[str]:
    """`section.key` of what differs between two configurations; of a section with another choice, the choice alone."""
    found: set[str] = set()
    one_by_section, other_by_section = old.model_dump(), new.model_dump()
    for section in other_by_section:  # None where the selector senses nothing
        one, other = one_by_section[section] or {}, other_by_section[section] or {}
        keys = {key for key in one | other if one.get(key) != other.get(key)}
        found |= {f"{section}.{key}" for key in keys & {"name", "kind"} or keys}
    return found


def _config(folder: Path) -> Config:
    path = folder / "config.toml"
    if not path.is_file():
        raise ConfigError(no_run(folder))
    values = without_effect(read_toml(path))
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


def without_effect(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a run without those that have no effect, which earlier versions took and this one refuses."""
    sections = {name: dict(section) if isinstance(section, dict) else section for name, section in values.items()}
    model, train = (sections.get(name) for name in ("model", "train"))
    if isinstance(model, dict) and model.get("train") == "full":
        model.pop("lora_rank", None)
    if isinstance(train, dict) and isinstance(kept := train.get("best_worst_k"), int):
        group = train.get("samples_per_prompt", 0)
        if isinstance(group, int) and 2 * kept >= group:
            del train["best_worst_k"]
    return sections


def _made_by(folder: Path) -> str:
    """The version and commit of `run.json`, in words."""
    run = _json(folder / "run.json")
    versions, commit = run.get("versions"), run.get("commit")
    version = versions.get("adascope-fast") if isinstance(versions, dict) else None
    if not version and not commit:
        return "the version that made it"
    return f"that version ({version or 'unknown'}{f', commit {commit}' if commit else ''})"


def write_whole(path: Path, text: str) -> None:
    """Replace a file of a run in one go."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is not there, cannot be read, or holds none."""
    try:
        return json_object(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def _number(value: Any) -> float:
    is_one = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_one else 0.0


def plain(value: Any) -> Any:
    """The same for JSON, which has no numbers that are not finite: null in their place."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


@cache
def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """The version of each package that is installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    # With its build, as in 2.14.1+cu130, which not every installation's metadata names.
    return found | {"torch": str(torch.__version__)}


@cache
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
