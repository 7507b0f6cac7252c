"""What a run achieved: the held-out reward before and after with what was tested, its variety, and its attributes."""

import math
from collections.abc import Mapping
from typing import Any

from adascope_fast.reporting import figures
from adascope_fast.reporting.files import mapping, number_of
from adascope_fast.reporting.spelling import decimals, fixed, points, three

Record = Mapping[str, Any]


def headline(evaluation: Record, reward: str) -> dict[str, Any]:
    """Both means and their difference with 95 % intervals, and what the interval of the difference says."""
    (before, after), difference = ends(evaluation), mapping(evaluation.get("difference"))
    low, high = number_of(difference, "low"), number_of(difference, "high")
    shared = min((_reach(end) for end in (before, after) if math.isfinite(_reach(end))), default=math.nan)
    shown = _estimate(difference, _reach(difference), signed=True)
    direction, verdict = "", ""
    if before and after:
        if shown is None or not math.isfinite(high - low):
            verdict = "No interval of the difference was recorded."
        else:
            direction, verdict = _verdict(low, high, shown["interval"])
    return {
        "reward": reward,
        "before": _estimate(before, shared),
        "after": _estimate(after, shared),
        "difference": shown,
        "direction": direction,
        "verdict": verdict,
        "num_images": before.get("num_images"),
        "num_prompts": len(scores(before)) or None,
    }


def _verdict(low: float, high: float, interval: str) -> tuple[str, str]:
    where = f"The 95 % interval of the difference, {interval},"
    if low > 0:
        return "rose", f"{where} lies above 0: the reward rose."
    if high < 0:
        return "fell", f"{where} lies below 0: the reward fell."
    return "", f"{where} includes 0: no change is shown."


def variety(evaluation: Record) -> list[tuple[str, str, str, str]]:
    """(name, before, after, change) of what a hacked reward would lower."""
    before, after = ends(evaluation)
    rows = []
    for name in ("diversity", "contrast", "clip_score"):
        old, new = number_of(before, name), number_of(after, name)
        if not (math.isnan(old) and math.isnan(new)):
            change = "-" if math.isnan(new - old) or not old else f"{points(100 * (new / old - 1))} %"
            rows.append((name.replace("_", " "), three(old), three(new), change))
    return rows


def variety_charts(evaluation: Record) -> list[tuple[str, str]]:
    """Diversity and contrast in the course of the training, where they were looked at more often than twice."""
    found = history(evaluation)
    if len(found) < 3:
        return []
    curves = {name: [(float(row["iteration"]), number_of(row, name)) for row in found] for name in UNITS}
    charts = [(name, figures.line_chart(curve, f"{name}, {UNITS[name]}")) for name, curve in curves.items()]
    return [(name, chart) for name, chart in charts if chart]


UNITS = {"diversity": "0 to 1", "contrast": "0 to 0.5"}
"""The range of each: pixel values are in [0, 1]."""


def stability(evaluation: Record) -> str:
    """Whether the held-out reward kept what it had gained; nothing for less than three evaluations."""
    found = [(number_of(row, "mean"), row) for row in history(evaluation)]
    found = [(mean, row) for mean, row in found if math.isfinite(mean)]
    if len(found) < 3:
        return ""
    (best, when), (last, end) = max(found, key=lambda one: one[0]), found[-1]
    if when is end:
        return "The held-out reward was highest at the end."
    places = decimals(_reach(when))
    at = f"{fixed(best, places)}) after {when['iteration']} of {end['iteration']} iterations"
    fall = fixed(best - last, places)
    return f"The held-out reward was highest ({at} and {'ended as high' if not float(fall) else f'fell by {fall}'}."


def attributes(evaluation: Record) -> list[tuple[str, str, str, str]]:
    """(name, before, after, change) of the reward's parts: shares in per cent and points, other numbers as they are."""
    before, after = (mapping(end.get("attributes")) for end in ends(evaluation))
    rows = []
    for name in dict.fromkeys([*before, *after]):
        old, new = number_of(before, name), number_of(after, name)
        if evaluation.get("reward") in OF_SHARES:
            shown = ["-" if math.isnan(value) else f"{100 * value:.1f} %" for value in (old, new)]
            change = points(100 * (new - old))
            rows.append((name, *shown, change if change == "-" else f"{change} points"))
        else:
            change = new - old
            rows.append((name, three(old), three(new), f"+{three(change)}" if change > 0 else three(change)))
    return rows


OF_SHARES = ("scene_attributes", "geneval")
"""Rewards whose parts are shares of the pictures; those of others are numbers of any kind."""


def scores(end: Record) -> list[list[float | None]]:
    """The score of each picture of each prompt, None where it was not finite; empty where there are none."""
    rows = end.get("scores")
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        return []
    return [[score if isinstance(score, int | float) else None for score in row] for row in rows]


def ends(evaluation: Record) -> tuple[Record, Record]:
    """The evaluations before and after."""
    before, after = (mapping(evaluation.get(name)) for name in ("before", "after"))
    return before, after


def history(evaluation: Record) -> list[Record]:
    """Every evaluation, by iteration."""
    found = evaluation.get("history")
    known = [mapping(point) for point in found] if isinstance(found, list) else []
    return [point for point in known if isinstance(point.get("iteration"), int)]


def _reach(estimate: Record) -> float:
    """Half the width of an estimate's interval."""
    return (number_of(estimate, "high") - number_of(estimate, "low")) / 2


def _estimate(estimate: Record, reach: float, *, signed: bool = False) -> dict[str, str] | None:
    mean, low, high = (number_of(estimate, key) for key in ("mean", "low", "high"))
    if math.isnan(mean):
        return None
    if not math.isfinite(low + high):
        return {"mean": three(mean), "interval": "not recorded"}
    places = decimals(reach, *((low, high) if signed else ()))
    shown, least, most = (fixed(value, places, signed=signed) for value in (mean, low, high))
    return {"mean": shown, "interval": f"{least} to {most}"}
