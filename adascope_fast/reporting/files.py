"""A run's folder, read as it may be found: stopped at any moment, damaged, or none. Nothing here imports torch."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LEFT = ("config.toml", "run.json", "stats.jsonl", "checkpoints")
"""What a run leaves in its folder, any of it: the rest may be lost."""


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, by what a run leaves there; its configuration may be lost."""
    return any((folder / name).exists() for name in LEFT)


def no_run(folder: Path) -> str:
    """What to say of a folder that is no run."""
    return f"a run's folder holds a config.toml, {str(folder)!r} does not; check the path"


def text_of(path: Path) -> str:
    """The text of a file, empty if it is not there; bytes that are not UTF-8 are replaced."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def json_object(text: str) -> dict[str, Any]:
    """The JSON object that a text is; empty if it is none, as of a file cut short by a kill."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def records(text: str) -> list[dict[str, Any]]:
    """The iterations that the lines of a log record, in their order; a line that is none is left out."""
    found = [json_object(line) for line in text.split("\n")]
    return [record for record in found if isinstance(record.get("iteration"), int)]


def mapping(value: Any) -> Mapping[str, Any]:
    """A value of a JSON object that should be an object itself; empty where it is none."""
    return value if isinstance(value, Mapping) else {}


def number_of(record: Mapping[str, Any], key: str) -> float:
    """A number of a record, NaN where there is none."""
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else math.nan
