"""`bench/endurance.py`: it tells what grows, and a short run has its rows."""

import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def endurance(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delitem(sys.modules, "endurance", raising=False)
    import endurance  # type: ignore[import-not-found]

    return endurance


ROW = {
    "resident_mb": 900.0,
    "open_files": 7,
    "threads": 4,
    "python_threads": 2,
    "python_objects": 500_000,
    "log_bytes_per_iteration": 1400,
    "checkpoint_bytes": 35_000,
    "files": 15,
}


@pytest.mark.parametrize("name", ROW)
def test_what_grows_in_the_second_half_is_told(endurance: Any, name: str) -> None:
    rows = endurance.Rows(10)
    early = ROW | {name: ROW[name] / 2}  # caches fill
    rows.found = [early, ROW, ROW, ROW]
    assert rows.grown() == []
    rows.found = [ROW, ROW, ROW, ROW | {name: 2 * ROW[name]}]
    (told,) = rows.grown()
    assert told == f"{name} {ROW[name]} -> {2 * ROW[name]}"


def test_a_short_run_has_its_rows(endurance: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, whole = endurance.run(24, tmp_path / "run", 12)
    assert [row["iteration"] for row in rows.found] == [12, 24]
    assert set(rows.found[1]) == {"iteration", "median_ms", "median_cpu_ms", *ROW}
    assert rows.found[1]["checkpoint_bytes"] > 1000
    assert whole["report_bytes"] > 1000
    assert capsys.readouterr().out.count("\n") == 2
