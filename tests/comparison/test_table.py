import csv
import io
import math

import pytest

from adascope_fast.comparison.measuring import Estimate, Line
from adascope_fast.comparison.table import as_csv, counted, not_measured, reach_of, spelled, terminal, top2

ARMS = ["base", "short", "long"]


def line(name: str, values: dict[str, float], *, higher: bool = True, counts: bool = True, why: str = "no weights"):
    estimates = {
        arm: Estimate(values[arm], values[arm] - 0.1, values[arm] + 0.1) if arm in values else Estimate(why=why)
        for arm in ARMS
    }
    return Line(name.lower(), name, f"the {name}", "preference", higher, counts, estimates)


LINES = [
    line("PS", {"base": 20.0, "short": 21.0, "long": 22.0}),
    line("FID", {"short": 5.0, "long": 9.0}, higher=False, why="it is the reference"),
    line("AES", {}, why="no weights; get them"),
    line("IR", {}, why="no weights; get them"),
    line("SE", {"base": 1.0, "short": 1.0, "long": 0.5}),
    line("contrast", {"base": 1.0, "short": 0.2, "long": 0.5}, counts=False),
]


def test_best_and_second_best_follow_the_arrow():
    assert LINES[0].ranks() == {"long": 1, "short": 2}
    assert LINES[1].ranks() == {"short": 1, "long": 2}


def test_equal_values_share_a_rank_and_one_value_has_none():
    assert LINES[4].ranks() == {"base": 1, "short": 1, "long": 2}
    assert line("x", {"base": 1.0}).ranks() == {}
    assert LINES[2].ranks() == {}


def test_top2_counts_the_papers_metrics_alone():
    assert [top2(LINES, arm) for arm in ARMS] == [1, 3, 3]
    assert counted(LINES) == 3


def test_what_no_arm_has_is_told_once_a_reason():
    assert not_measured(LINES) == [("AES, IR", "no weights; get them")]


def test_the_terminals_table_is_aligned():
    rows = [row for row in terminal(LINES, ARMS).splitlines() if not row.startswith("[")]
    heading = rows[0]
    ends = [heading.index(arm) + len(arm) for arm in ARMS]
    assert [rows[-1][:end].split()[-1] for end in ends] == ["1", "3", "3"]
    assert "22.000 ±0.1*" in rows[1]
    assert "21.000 ±0.1+" in rows[1]


def test_csv_has_every_number_in_full_and_every_reason():
    rows = list(csv.DictReader(io.StringIO(as_csv(LINES, ARMS))))
    assert len(rows) == len(LINES) * len(ARMS)
    (one,) = [row for row in rows if row["arm"] == "long" and row["metric"] == "PS"]
    assert (float(one["value"]), float(one["low"]), one["rank"], one["better"]) == (22.0, 21.9, "1", "higher")
    assert {row["why"] for row in rows if row["metric"] == "AES"} == {"no weights; get them"}


def test_no_cell_is_taken_for_a_formula():
    text = as_csv([line("x", {}, why="=cmd()")], ARMS)
    assert "'=cmd()" in text
    assert ",=cmd()" not in text


@pytest.mark.parametrize(("reach", "text"), [(0.004684, "±0.0047"), (2.84, "±2.8"), (672.3, "±672"), (math.nan, "")])
def test_half_an_interval_is_spelled_in_two_digits(reach: float, text: str):
    assert reach_of(0.0, reach) == text


@pytest.mark.parametrize(("value", "text"), [(0.5, "0.500"), (20.48, "20.480"), (1234.5, "1234"), (0.0012, "0.0012")])
def test_numbers_are_spelled_short(value: float, text: str):
    assert spelled(value) == text
