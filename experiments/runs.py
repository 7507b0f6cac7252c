"""Runs of an experiment: each a process of its own, made once and taken as it is after that."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adascope_fast.config import Config

CHECKOUT = Path(__file__).parents[1]
TUNING_SEED = 1000
"""Of the runs that settings are tuned on, which are not reported."""
TUNING_CAPTIONS, NUM_TUNING_CAPTIONS = "experiments/algorithms/tuning_captions.txt", 32
"""What these are judged on, within the checkout: neither trained on nor reported."""
NUM_PAIRS, QUICK_PAIRS = 240, 4
"""Of a set of preferences, and of one that is as small as it can be."""


class RunFailedError(RuntimeError):
    """A training that ended with another exit code than 0; the message is one line."""


PLACES = ("run.folder", "algorithm.preferences")
"""Keys that say where something lies, and no more."""


def thresholds(config: str) -> tuple[str, ...]:
    """AdaScope's keys in a configuration of the repository."""
    section = tomllib.loads((CHECKOUT / "configs" / config).read_text(encoding="utf-8"))["selector"]
    return tuple(f"selector.{name}={value}" for name, value in section.items())


def train(folder: Path, config: Path, settings: Sequence[str], *, threads: int = 1) -> None:
    """Train once, unless it was done before with the same settings; paths in them are relative to the checkout.

    Args:
        folder: of the run; what it says lies beside it, in `FOLDER.log`.
        settings: all that it changes in the configuration.
        threads: of its process.

    Raises:
        ValueError: a finished run lies there that has other settings.
        RunFailedError: it did not end well.
    """
    if is_finished(folder):
        check_same(folder, Config.load(config, settings))
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.log"
    command = [sys.executable, "-m", "adascope_fast.cli", "train", "--overwrite", str(config), *settings]
    call(command, log, threads=threads)


def make_preferences(folder: Path, config: Path, settings: Sequence[str], num_pairs: int, kinds: Sequence[str]) -> None:
    """The base model's images in pairs, for what is trained on them, unless they are there.

    Args:
        folder: what is written; what is said lies beside it.
        settings: changes of the configuration.
        kinds: further arguments of `adascope-fast make-preferences`.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = ["make-preferences", str(config), *settings, "--out", str(partial), "--pairs", str(num_pairs), *kinds]
    call([sys.executable, "-m", "adascope_fast.cli", *command], folder.with_suffix(".log"))
    partial.rename(folder)


def call(command: Sequence[str], log: Path, *, threads: int = 1) -> None:
    """Run a command in the checkout; what it says goes to `log`."""
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=CHECKOUT)
    if done.returncode:
        said = log.read_text(errors="replace").strip().splitlines()
        raise RunFailedError(f"exit code {done.returncode}, see {log}: {said[-1] if said else 'nothing was said'}")


def is_finished(folder: Path) -> bool:
    """The report is what a run writes last."""
    return (folder / "report.html").is_file()


def check_same(folder: Path, wanted: Config) -> None:
    """A ValueError that says what differs if a finished run was made with other settings than `wanted`.

    A key that the run's file does not have, since its program did not know it, has its default.
    """
    made = _keys(Config.load(folder / "config.toml").to_toml())
    asked = _keys(wanted.to_toml())
    differing = [key for key in sorted(made.keys() | asked.keys()) if made.get(key) != asked.get(key)]
    differences = [
        f"{key} = {made.get(key, 'unset')} (asked for: {asked.get(key, 'unset')})"
        for key in differing
        if key not in PLACES
    ]
    if differences:
        raise ValueError(
            f"a finished run is taken as it is only if its settings are those asked for, and {folder} has "
            f"{', '.join(differences)}; remove it, or give another --work"
        )


def _keys(text: str) -> dict[str, Any]:
    return dict(_flat(tomllib.loads(text)))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def stats_of(folder: Path) -> list[dict[str, Any]]:
    """What a run logged of its iterations."""
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def history_of(folder: Path) -> list[dict[str, Any]]:
    """The held-out reward of a run at each evaluation, with the pairs and CPU seconds trained until then."""
    stats, points = stats_of(folder), []
    for point in json.loads((folder / "evaluation.json").read_text())["history"]:
        done = stats[: point["iteration"]]
        points.append(
            {
                "iteration": point["iteration"],
                "reward": point["mean"],
                "pairs": sum(record["pairs_trained"] for record in done),
                "cpu_seconds": sum(record["cpu_seconds"] for record in done),
            }
        )
    return points


def provenance(folders: Sequence[Path]) -> dict[str, Any]:
    """The commit, machine and versions of the runs; a list where they differ."""
    facts = [json.loads((folder / "run.json").read_text()) for folder in folders]
    found = {}
    for here, there in (("commit", "commit"), ("machine", "device"), ("versions", "versions")):
        distinct = [json.loads(text) for text in sorted({json.dumps(one[there]) for one in facts})]
        found[here] = distinct[0] if len(distinct) == 1 else distinct
    return found
