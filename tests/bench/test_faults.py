"""`make faults` finds what it is for: a small program with one flaw at a time, and the same program without."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from adascope_fast.config import Config, ConfigError

CHECKOUT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("small_program.py")
RESULTS = CHECKOUT / "bench" / "results" / "faults.json"
# Each flaw of the small program: the part that finds it, what it is called, and counts that are enough.
DAMAGED = ("damages", "--damages", "16")
FLAWS = {
    "traceback": ("traceback", *DAMAGED),
    "silent": ("silent", *DAMAGED),
    "lost": ("lost", *DAMAGED),
    "wordless": ("wordless", *DAMAGED),
    "unnamed": ("unnamed", *DAMAGED),
    "died": ("died", *DAMAGED),
    "hung": ("hung", *DAMAGED, "--longest", "4"),
    "stuck": ("stuck", "kills", "--kills", "8"),
    "forgetful": ("silent", "kills", "--kills", "8"),
    "two_writers": ("silent", "writers", "--longest", "4"),
    "disturbed": ("disturbed", "writers"),
    "status": ("silent", "signals"),
    "signals": ("died", "signals"),
    "exits": ("silent", "rewards", "--rewards", "100"),
    "in_place": ("silent", "rewards", "--rewards", "100"),
    "nan": ("silent", "rewards", "--rewards", "100"),
    "mute": ("silent", "rewards", "--rewards", "100"),
}


def _faults(out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "bench.faults.run", "--quick", "--out", str(out), "--only", *options]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    finished = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=600)
    assert out.is_file(), finished.stderr
    return finished.returncode, json.loads(out.read_text())


def _small(flaw: str) -> list[str]:
    return ["--program", f"{sys.executable} {PROGRAM} {flaw}"]


def test_a_program_without_a_flaw_withstands_everything(tmp_path: Path):
    parts = ["kills", "damages", "disk", "signals", "writers"]
    code, results = _faults(tmp_path / "faults.json", *parts, *_small("none"))
    assert (code, results["failures"]) == (0, [])
    assert {row["area"] for row in results["table"]} == {"SIGKILL", "damaged file", "disk", "signal", "two writers"}
    kills = [row for row in results["table"] if row["area"] == "SIGKILL"]
    assert sum(row["times"] for row in kills) == results["counts"]["kills"]


@pytest.mark.slow
@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_is_found(tmp_path: Path, flaw: str):
    outcome, *options = FLAWS[flaw]
    code, results = _faults(tmp_path / "faults.json", *options, *_small(flaw))
    assert code == 1
    assert outcome in {failure["outcome"] for failure in results["failures"]}, results["failures"]


@pytest.mark.slow
def test_the_program_withstands_a_few_faults(tmp_path: Path):
    code, results = _faults(tmp_path / "faults.json", "kills", "damages", "rewards", "disk", "signals", "writers")
    assert (code, results["failures"]) == (0, [])


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of `bench.faults`, by its name."""
    monkeypatch.syspath_prepend(str(CHECKOUT))
    return lambda name: import_module(f"bench.faults.{name}")


def _setting(faults: Any, work: Path, flaw: str = "none") -> Any:
    program = faults("program").Program(tuple(_small(flaw)[1].split()))
    return faults("runs").Setting(program, work, 0, {}, 0.0, 0.0)


def test_a_configuration_is_accepted_refused_by_key_or_a_failure(
    faults: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checked = faults("checked")
    given = [("", []), ("[train]\niterations = 3\n", ["run.seed=4"]), ("[train]\nwings = 3\n", []), ("= 3", [])]
    given = [({"config.toml": text}, overrides) for text, overrides in given]
    rows = checked.load_all(_setting(faults, tmp_path), given, 0)
    assert [row.outcome for row in rows] == ["accepted", "accepted", "refused", "refused"]

    def load(path: Path, overrides: list[str]) -> None:
        raise errors.pop()

    errors = [KeyError("x"), ConfigError("something is wrong")]
    monkeypatch.setattr(Config, "load", load)
    rows = checked.load_all(_setting(faults, tmp_path), given[:2], 1)
    assert [row.outcome for row in rows] == ["unnamed", "traceback"]
    assert all(row.failed and "configuration" in row.detail for row in rows)


def test_configurations_go_through_the_command_line_too(faults: Any, tmp_path: Path):
    checked, texts = faults("checked"), ["", "odd = 3\n"]
    found = {
        flaw: [
            checked.plan(_setting(faults, tmp_path / flaw, flaw), index, {"config.toml": text}, [])[0].outcome
            for index, text in enumerate(texts)
        ]
        for flaw in ("none", "traceback", "unnamed")
    }
    assert found == {
        "none": ["accepted", "refused"],
        "traceback": ["accepted", "traceback"],
        "unnamed": ["accepted", "unnamed"],
    }


def test_what_no_shell_can_write_is_read_here_alone(faults: Any):
    given = [({}, [override]) for override in ("a.b=1", "a.b=\0", "a.b=\ud800", "a.b=é")]
    assert faults("checked").sample(9, 0, given) == [0, 3]


def test_missing_configurations_are_a_failure_not_a_silence(faults: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bench.faults.configurations", None)
    assert faults("checked").configurations(0, 3) == []
    assert all(row.failed for row in faults("run").no_configurations())


@pytest.mark.parametrize(
    ("name", "whole", "damaged", "edited"),
    [
        ("stats.jsonl", b'{"a": 1}\n', b'{"a": 3}\n', True),
        ("stats.jsonl", b'{"a": 1}\n{"a": 2}\n', b'{"a": 1}\n', False),
        ("config.toml", b"[run]\nseed = 0\n", b"[run]\nseed = 1\n", True),
        ("config.toml", b"[run]\nseed = 0\n", b"[run]\nreed = 0\n", False),
        ("config.toml", b"[run]\nseed = 0\n", b"[run]\nseed = \xff\n", False),
        ("evaluation.json", b'{"mean": 0.5}', b'{"mean": "x"}', False),
        ("evaluation.json", b'{"mean": 0.5}', None, False),
        ("checkpoints/000003/state.json", b'{"next_iteration": 3}', b'{"next_iteration": 2}', False),
        ("samples/after.png", b"1", b"2", False),
    ],
)
def test_only_a_text_with_its_keys_and_types_counts_as_edited(
    faults: Any, name: str, whole: bytes, damaged: bytes | None, edited: bool
):
    assert faults("damage")._as_written(name, whole, damaged) is edited


def test_tensors_are_compared_by_content(faults: Any, tmp_path: Path):
    hash_of, path = faults("runs").hash_of, tmp_path / "state.safetensors"
    hashes = []
    for value, note in ((1.0, "a"), (1.0, "b"), (2.0, "a")):
        save_file({"x": np.full(3, value, np.float32)}, path, metadata={"note": note})
        hashes.append(hash_of(path))
    assert hashes[0] == hashes[1] != hashes[2]
    path.write_bytes(path.read_bytes()[:-1])
    assert hash_of(path) not in hashes


def test_the_page_has_the_table_of_the_results(faults: Any):
    table = faults("run").table
    page = (CHECKOUT / "docs" / "faults.md").read_text(encoding="utf-8")
    results = json.loads(RESULTS.read_text())
    assert table(results) in page, "paste what `make faults` printed into docs/faults.md"
    assert results["date"] in page
