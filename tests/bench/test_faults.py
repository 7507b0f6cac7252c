"""`make faults` finds what it is for: a small program with one flaw at a time, and the same program without."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


def test_the_page_has_the_table_of_the_results():
    sys.path.insert(0, str(CHECKOUT))
    try:
        from bench.faults.run import table
    finally:
        sys.path.remove(str(CHECKOUT))
    page = (CHECKOUT / "docs" / "faults.md").read_text(encoding="utf-8")
    results = json.loads(RESULTS.read_text())
    assert table(results) in page, "paste what `make faults` printed into docs/faults.md"
    assert results["date"] in page
