"""The host's share of a call, in two checkouts: ratios of pairs, and a run of this checkout against itself."""

import importlib.util
import json
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).parents[2]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_host", CHECKOUT / "bench" / "kernels" / "host.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


host = _load()


def test_a_ratio_is_of_the_two_times_of_a_round() -> None:
    """The machine was ten times as slow in the last rounds: the ratio of the medians would be 2, and is 0.5 in each."""
    row = host._row("step", "whole", [(10.0, 5.0), (20.0, 10.0), (100.0, 50.0), (200.0, 100.0), (40.0, 40.0)])
    assert row["ratio"] == 0.5
    assert (row["ratio_low"], row["ratio_high"]) == (0.5, 0.75)
    assert (row["before_us"], row["after_us"]) == (40.0, 40.0)
    assert "| step | whole | 40.0 | 40.0 | 0.50 | 0.50 to 0.75 |" in host.table([row])
    assert host.comparison([row, row | {"share": "ours"}]).count("| step | 40 | 40 | 0.50 (0.50 to 0.75) |") == 1


def test_the_readme_shows_the_committed_times() -> None:
    result = json.loads(host.RESULTS.read_text(encoding="utf-8"))
    assert host.comparison(result["rows"]) in (CHECKOUT / "kernels" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_a_checkout_is_as_fast_as_itself() -> None:
    rows = host.measure([CHECKOUT, CHECKOUT], rounds=6)
    assert {row["share"] for row in rows} == set(host.SHARES)
    assert len(rows) == 2 * len({row["operation"] for row in rows})
    for row in rows:
        assert row["before_us"] > 1
        assert 1 / 3 < row["ratio"] < 3
