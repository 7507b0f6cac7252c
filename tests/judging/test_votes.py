"""Votes outlive whatever stops the process that takes them."""

import json
import os
from pathlib import Path

import pytest

from adascope_fast.judging.votes import Votes, rater_of, seconds_of

KEY = ("rater", "pair")


def _votes(folder: Path) -> Votes:
    return Votes(folder, key=KEY, fields=("choice",))


def test_the_last_vote_on_a_thing_counts_here_and_when_read_again(tmp_path: Path):
    votes = _votes(tmp_path)
    for choice in ("left", "equal"):
        votes.add({"rater": "é", "pair": 0, "choice": choice})
    votes.add({"rater": "b", "pair": 0, "choice": "right"})
    for known in (votes, _votes(tmp_path)):
        assert [vote["choice"] for vote in known] == ["equal", "right"]
        assert known.get("é", 0) == {"rater": "é", "pair": 0, "choice": "equal"}
        assert known.get("é", 1) is None
    assert len((tmp_path / "votes.jsonl").read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_was_cut_is_not_read_and_the_next_is_whole(tmp_path: Path, cut: int):
    first = _votes(tmp_path)
    first.add({"rater": "a", "pair": 0, "choice": "left"})
    first.add({"rater": "a", "pair": 1, "choice": "left"})
    path = tmp_path / "votes.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    again = _votes(tmp_path)
    assert again.get("a", 0)
    assert (again.get("a", 1) is None) == (cut > 1)  # one byte less is the line without its end
    again.add({"rater": "a", "pair": 2, "choice": "right"})
    assert [vote["pair"] for vote in _votes(tmp_path)] == ([0, 1, 2] if cut == 1 else [0, 2])


def test_lines_of_something_else_are_left_out(tmp_path: Path):
    lines = ["[]", "3", '{"rater": "a"}', '{"rater": [], "pair": 0, "choice": "left"}', "\xff", "[" * 100_000]
    whole = json.dumps({"rater": "a", "pair": 0, "choice": "left"})
    (tmp_path / "votes.jsonl").write_text("\n".join([*lines, whole]), encoding="latin-1")
    assert [vote["pair"] for vote in _votes(tmp_path)] == [0]


def test_a_vote_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    votes = _votes(tmp_path)
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    votes.add({"rater": "a", "pair": 0, "choice": "left"})
    assert len(synced) == 1

    def full(file: int, line: bytes) -> int:
        return real(file, line[:7])

    real = os.write
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="could not be written whole"):
        votes.add({"rater": "a", "pair": 1, "choice": "left"})
    assert votes.get("a", 1) is None
    monkeypatch.setattr(os, "write", real)
    votes.add({"rater": "a", "pair": 2, "choice": "left"})
    assert [vote["pair"] for vote in _votes(tmp_path)] == [0, 2]


@pytest.mark.parametrize("name", ["", "  ", "a\x00b", "x" * 41, "model:x", "Model:x", "\u202eevil"])
def test_a_name_that_cannot_be_one_is_refused(name: str):
    with pytest.raises(ValueError, match="a rater has a name of 1 to 40 characters"):
        rater_of(name)


def test_names_and_times_are_kept_in_one_form():
    assert rater_of("  Jo   É ") == "Jo É"
    assert [seconds_of(value) for value in (1.234, -1.0, 1e9, float("nan"), float("inf"))] == [1.23, 0, 86400, 0, 0]
