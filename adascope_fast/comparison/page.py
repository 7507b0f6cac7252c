"""The page of a comparison: one file, no script, no request. Texts from prompts and folders are escaped."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from adascope_fast.comparison.measuring import GROUPS, Line
from adascope_fast.comparison.table import counted, not_measured, reach_of, spelled, top2
from adascope_fast.images import Folder, Image
from adascope_fast.reporting import figures
from adascope_fast.reporting.images import strip

if TYPE_CHECKING:
    from adascope_fast.comparison.evaluation import Comparison

MOST_IN_STRIP = 4
SIDE = 128  # of an image on the page, in pixels


def write_page(comparison: "Comparison", path: Path, *, num_shown: int) -> None:
    """Write the page, replacing an older one."""
    from adascope_fast import reporting

    places = [Path(__file__).parent, Path(str(reporting.__file__)).parent]
    environment = Environment(
        loader=FileSystemLoader(places),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    partial = path.with_name(f".{path.name}.partial")
    page = environment.get_template("evaluation.html.j2").render(_contents(comparison, num_shown))
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def _contents(comparison: "Comparison", num_shown: int) -> dict[str, Any]:
    lines, names = comparison.lines, [arm.name for arm in comparison.arms]
    css = {name: "abcde"[number % 5] for number, name in enumerate(names)}
    found = comparison.view
    return {
        "arms": [
            {
                "name": arm.name,
                "kind": arm.kind,
                "place": arm.place,
                "base": arm.base,
                "num_images": len(comparison.folders[arm.name].images),
                "css": css[arm.name],
            }
            for arm in comparison.arms
        ],
        "groups": _groups(lines, names),
        "top2": [top2(lines, name) for name in names],
        "counted": counted(lines),
        "reference": (comparison.reference or "").strip(),
        "missing": not_measured(lines),
        "notes": list(comparison.notes),
        "verdicts": [
            {
                "name": name,
                "words": one.words,
                "parting": one.parting,
                "is_suspect": one.is_suspect,
                "signs": [
                    (sign.measure, spelled(sign.base), spelled(sign.trained), _signed(sign.spreads), sign.is_one)
                    for sign in one.signs
                ],
            }
            for name, one in comparison.verdicts.items()
        ],
        "rows": _strips(comparison.folders, num_shown),
        "view": None if isinstance(found, str) else found,
        "no_view": found if isinstance(found, str) else "",
        "scatter": "" if isinstance(found, str) else Markup(figures.scatter(found.points, css)),
        "within": []
        if isinstance(found, str)
        else [
            (name, css[name], spelled(found.within[name]), _or_dash(found.silhouette[name])) for name in found.points
        ],
        "facts": _facts(comparison.facts),
        "versions": comparison.facts["versions"],
    }


def _groups(lines: Sequence[Line], names: Sequence[str]) -> list[dict[str, Any]]:
    """The table's groups with their lines; a line no arm has is told below instead."""
    found: dict[str, list[Any]] = {}
    for line in lines:
        if not any(one.is_known for one in line.estimates.values()) and not line.counts:
            continue
        ranks = line.ranks()
        cells = []
        for name in names:
            one = line.estimates[name]
            cell: dict[str, Any] = {"value": "-", "interval": "", "rank": 0, "title": one.why, "gain": ""}
            if one.is_known:
                cell |= {"value": spelled(one.value), "interval": reach_of(one.value, one.high)}
                cell |= {"rank": ranks.get(name, 0), "title": _told(one.facts), "gain": _moved(line, one.gain)}
            cells.append(cell)
        found.setdefault(line.group, []).append(
            {"name": line.name, "title": line.title, "arrow": "↑" if line.higher_is_better else "↓", "cells": cells}
        )
    return [{"name": GROUPS[group], "lines": rows} for group, rows in found.items()]


def _moved(line: Line, gain: tuple[float, float, float] | None) -> str:
    """`better` or `worse` where the difference to the base is beyond its interval."""
    if gain is None or not (gain[1] > 0 or gain[2] < 0):
        return ""
    return "better" if (gain[0] > 0) == line.higher_is_better else "worse"


def _told(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _strips(folders: Mapping[str, Folder], num_shown: int) -> list[dict[str, Any]]:
    """The first prompts that all arms have, each with a strip of images an arm."""
    by_prompt = {name: folder.by_prompt() for name, folder in folders.items()}
    first = next(iter(by_prompt.values()), {})
    common = [prompt for prompt in first if all(prompt in one for one in by_prompt.values())][:num_shown]
    return [
        {
            "prompt": prompt,
            "strips": [(name, strip(_pixels(one[prompt]), side=SIDE)) for name, one in by_prompt.items()],
        }
        for prompt in common
    ]


def _pixels(images: Sequence[Image]) -> list[Any]:
    return [image.pixels() for image in images[:MOST_IN_STRIP]]


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    seconds = facts["seconds"]
    found = {"date": facts["date"], "machine": facts["machine"]} | dict(facts["drawn"])
    found["seconds"] = ", ".join(f"{name} {value:g}" for name, value in seconds.items())
    return [(name.replace("_", " "), str(value)) for name, value in found.items() if value is not None]


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.2f}"


def _or_dash(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
