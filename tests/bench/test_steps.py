"""`bench/steps.py`: theirs and ours are the same step, and what it writes says what was measured where."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delitem(sys.modules, "steps", raising=False)
    import steps  # type: ignore[import-not-found]

    return steps


@pytest.mark.parametrize("name", ["_ddim", "_flow"])
def test_both_give_the_same_number(steps, name: str):
    theirs, ours = getattr(steps, name)(torch.device("cpu"))
    x, m, y = (torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    torch.testing.assert_close(ours(x, m, y), theirs(x, m, y), rtol=1e-4, atol=1e-4)


def test_the_command_writes_its_figures(steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steps, "SHAPES", {"small": (8, 4, 8, 8)})
    monkeypatch.setattr(sys, "argv", ["steps.py", "--rounds", "2", "--out", str(tmp_path / "steps.json")])
    steps.main()
    told = json.loads((tmp_path / "steps.json").read_text())
    assert [row["shape"] for row in told["rows"]] == ["small", "small"]
    assert all(row["theirs_us"] > 0 and row["ours_us"] > 0 for row in told["rows"])
    assert told["torch"] == torch.__version__
