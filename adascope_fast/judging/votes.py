"""Votes as they are given: a line each, on the disk before the next is asked; the last one on the same thing counts.

A process may be killed at any moment: a line that was cut is not read, and the next one begins on a line of its own.
"""

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = "votes.jsonl"
LONGEST_NAME = 40
OF_MODEL = "model:"
"""What the names of raters that are models begin with."""


class Votes:
    """The votes in a folder, those of earlier times with them.

    Args:
        folder: where `votes.jsonl` lies, or will.
        key: the fields that say what a vote is on; a later vote on the same replaces it.
        fields: those that it must have besides.
    """

    def __init__(self, folder: Path, *, key: tuple[str, ...], fields: tuple[str, ...] = ()) -> None:
        self.path, self._key, self._fields = folder / FILE, key, fields
        self._lock = threading.Lock()
        self._last: dict[tuple[Any, ...], dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        text = self.path.read_bytes() if self.path.is_file() else b""
        self._is_cut = bool(text) and not text.endswith(b"\n")
        for line in text.decode("utf-8", "replace").split("\n"):
            if vote := self._vote(line):
                self._last[self._place(vote)] = vote

    def add(self, vote: Mapping[str, Any]) -> None:
        """Take a vote in once it is on the disk; OSError where it cannot be written, and then it does not count."""
        line = (json.dumps(dict(vote), ensure_ascii=False) + "\n").encode("utf-8", "replace")
        with self._lock:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                line = b"\n" + line if self._is_cut else line
                self._is_cut = True
                if os.write(file, line) < len(line):
                    raise OSError(f"{self.path} could not be written whole; free some space")
                os.fsync(file)
                self._is_cut = False
            finally:
                os.close(file)
            self._last[self._place(vote)] = dict(vote)

    def get(self, *place: Any) -> dict[str, Any] | None:
        """The vote that counts on this, if there is one."""
        return self._last.get(place)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self._lock:
            return iter(list(self._last.values()))

    def _place(self, vote: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(vote[name] for name in self._key)

    def _vote(self, line: str) -> dict[str, Any] | None:
        try:
            vote = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(vote, dict) or any(name not in vote for name in self._key + self._fields):
            return None
        return vote if all(isinstance(vote[name], str | int) for name in self._key) else None


def rater_of(name: str) -> str:
    """A person's name or initials as they are kept; ValueError where they cannot be."""
    name = " ".join(name.split())
    if not name or len(name) > LONGEST_NAME or not name.isprintable() or name.lower().startswith(OF_MODEL):
        raise ValueError(
            f"a rater has a name of 1 to {LONGEST_NAME} characters that does not begin with {OF_MODEL!r}, got "
            f"{name!r:.60}; give another"
        )
    return name


def seconds_of(value: float) -> float:
    """The seconds that an answer took, as kept: no more than a day."""
    return round(min(max(value, 0.0), 86_400.0), 2) if math.isfinite(value) else 0.0
