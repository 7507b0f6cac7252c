"""The table of metrics and arms: for a terminal, and as CSV."""

import csv
import io
import math
from collections.abc import Sequence

from adascope_fast.comparison.measuring import GROUPS, Estimate, Line

ARROWS = {True: "up", False: "down"}
COLUMNS = (
    *("arm", "group", "metric", "title", "better", "value", "low", "high"),
    *("gain", "gain_low", "gain_high", "rank", "why"),
)
MARKS = {1: "*", 2: "+"}
"""Of the best and the second best arm."""


def top2(lines: Sequence[Line], name: str) -> int:
    """Of how many of the paper's metrics an arm is best or second best."""
    return sum(name in line.ranks() for line in lines if line.counts)


def counted(lines: Sequence[Line]) -> int:
    """How many of the paper's metrics two arms or more have a number of."""
    return sum(bool(line.ranks()) for line in lines if line.counts)


def spelled(value: float) -> str:
    """Four significant digits, three decimals at most where there are digits before the point."""
    return f"{value:.4g}" if abs(value) >= 1000 or (value and abs(value) < 0.01) else f"{value:.3f}"


def reach_of(value: float, high: float) -> str:
    """`±` and half of an interval in two significant digits; empty where there is none."""
    reach = high - value
    return "" if math.isnan(reach) else f"±{reach:.0f}" if reach >= 100 else f"±{reach:.2g}"


def terminal(lines: Sequence[Line], arms: Sequence[str]) -> str:
    """The table in plain text: a line a metric, a column an arm; `*` is best, `+` second best, `-` not measured."""
    heading = ["", "", *arms]
    rows: list[list[str]] = []
    group = ""
    for line in lines:
        if line.group != group:
            group = line.group
            rows.append([f"[{GROUPS[group]}]"])
        ranks = line.ranks()
        cells = [_cell(line.estimates[name], ranks.get(name)) for name in arms]
        rows.append([line.name, ARROWS[line.higher_is_better], *cells])
    rows.append(["#Top2", f"of {counted(lines)}", *(str(top2(lines, name)) for name in arms)])
    whole = [heading, *(row for row in rows if len(row) > 1)]
    widths = [max(len(row[column]) for row in whole) for column in range(len(heading))]
    printed = [_spread(row, widths) if len(row) > 1 else row[0] for row in [heading, *rows]]
    return "\n".join(line.rstrip() for line in printed)


def as_csv(lines: Sequence[Line], arms: Sequence[str]) -> str:
    """A line for every metric and arm; numbers in full, empty where there is none, with the reason."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for line in lines:
        ranks = line.ranks()
        for name in arms:
            one = line.estimates[name]
            numbers = [_number(value) for value in (one.value, one.low, one.high, *(one.gain or (None,) * 3))]
            about = [name, line.group, line.name, line.title, "higher" if line.higher_is_better else "lower"]
            writer.writerow([*map(_safe, about), *numbers, ranks.get(name, ""), _safe(one.why)])
    return file.getvalue()


def not_measured(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """(metrics, reason) of what no arm has, one a reason, in order."""
    found: dict[str, list[str]] = {}
    for line in lines:
        known = list(line.estimates.values())
        if not any(one.is_known for one in known):
            found.setdefault(known[-1].why, []).append(line.name)
    return [(", ".join(names), why) for why, names in found.items()]


def _cell(estimate: Estimate, rank: int | None) -> str:
    if not estimate.is_known:
        return "-"
    return f"{spelled(estimate.value)} {reach_of(estimate.value, estimate.high)}{MARKS.get(rank or 0, ' ')}"


def _spread(row: Sequence[str], widths: Sequence[int]) -> str:
    first, second, *rest = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join([first, second, *(cell.strip().rjust(len(cell)) if cell.strip() else cell for cell in rest)])


def _number(value: float | None) -> str:
    return "" if value is None or value != value else repr(value)


def _safe(text: str) -> str:
    """A spreadsheet takes a cell that begins so for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
