"""One self-contained page about a run, made from its folder alone: no script, no request.

A run may have been stopped at any moment, so every file but the folder itself may be missing or end in mid-line; what
is missing becomes a sentence on the page. Texts from the folder (prompts, configuration) are escaped by the template.
"""

import math
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from adascope_fast.reporting import by_step, diagnostics, figures, head, outcome, processes, reasons
from adascope_fast.reporting.diagnostics import curve
from adascope_fast.reporting.figures import number
from adascope_fast.reporting.files import json_object, mapping, number_of, records, text_of
from adascope_fast.reporting.images import cut
from adascope_fast.reporting.spelling import decimals, fixed

PARTS = ("rollout", "reward", "sensing", "update", "other")
COLUMNS = ("reward_mean", "reward_std", "fraction_trained", "pairs_trained", "approx_kl", "clipfrac", "grad_norm")

Record = Mapping[str, Any]


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the run folder, replacing an older one, and return its path."""
    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        raise ValueError(f"a report needs the folder of a run, got {run_folder}, which is not a folder; check the path")
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(_contents(run_folder))
    path = run_folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def unread(run_folder: Path) -> list[str]:
    """The files of a run that the page would show and cannot: missing, or not what they should be.

    A run that is not over need not have all of them.
    """
    folder = Path(run_folder)
    found = [name for name in ("run.json", "evaluation.json", "parts.json") if not _json(folder / name)]
    ends = outcome.ends(_json(folder / "evaluation.json"))
    is_whole = all("mean" in end for end in ends) or _json(folder / "run.json").get("status") != "finished"
    found += [] if is_whole or "evaluation.json" in found else ["evaluation.json"]
    found += [] if _toml(text_of(folder / "config.toml")) else ["config.toml"]
    lines = text_of(folder / "stats.jsonl").splitlines()
    found += [] if lines and len(_stats(folder / "stats.jsonl")) == len(lines) else ["stats.jsonl"]
    grid = _json(folder / "samples" / "grid.json")
    found += [] if isinstance(grid.get("prompts"), list) else ["samples/grid.json"]
    found += [f"samples/{when}.png" for when in ("before", "after") if not _tiles(folder / "samples", when, grid)]
    if _json(folder / "run.json").get("status") == "finished":
        return found
    return [name for name in found if (folder / name).exists() or name in ("config.toml", "run.json")]


def _contents(folder: Path) -> dict[str, Any]:
    """Everything that the template shows, by its name there."""
    run, evaluation, parts = (_json(folder / name) for name in ("run.json", "evaluation.json", "parts.json"))
    stats = _stats(folder / "stats.jsonl")
    config_text = text_of(folder / "config.toml")
    config = _toml(config_text)
    reward = str(evaluation.get("reward") or mapping(config.get("reward")).get("name", "reward"))
    num_steps = _num_steps(stats, config)
    of_steps, same_steps = by_step.charts(stats, num_steps, _sensing(config, parts))
    of_updates, same_updates = diagnostics.charts(stats, config)
    share = [(x, 100 * y) for x, y in curve(stats, "fraction_trained")]
    return {
        "name": folder.resolve().name,
        "status": run.get("status", "unknown"),
        "told": _told(run, parts),
        "progress": _progress(stats, config),
        "headline": outcome.headline(evaluation, reward),
        "facts": head.facts(run, config, parts, reward) if run or config else [],
        "settings": head.settings(config),
        "command": head.command(folder, run, parts) if config else {},
        "use": head.use(folder, config, parts, head.example(_json(folder / "samples" / "grid.json").get("prompts"))),
        "variety": outcome.variety(evaluation),
        "variety_charts": _marked(outcome.variety_charts(evaluation)),
        "stability": outcome.stability(evaluation),
        "attributes": outcome.attributes(evaluation),
        "pairs": _pairs(folder / "samples", evaluation),
        "reward_chart": Markup(_reward_chart(stats, evaluation, reward)),
        "part_charts": _marked(_part_charts(stats)),
        "interval_chart": Markup(_interval_chart(stats, num_steps)),
        "by_step": _marked(of_steps),
        "by_step_same": diagnostics.sentences(same_steps, config, "at every step"),
        "starts_and_ends": Markup(by_step.starts_and_ends(stats, num_steps)),
        "fraction_chart": Markup(figures.line_chart(share, "steps trained, %")),
        "interval_summary": _interval_summary(stats),
        "selector": mapping(config.get("selector")).get("name", "unknown"),
        "is_complement": any(mapping(record.get("selector")).get("is_complement") for record in stats),
        "reasons": _reasons(stats),
        "time_bar": Markup(figures.stacked_bar(_seconds(stats), _css)),
        "time_rows": _time_rows(stats),
        "processes": processes.table(stats),
        "processes_headings": processes.HEADINGS,
        "imbalance": processes.imbalance(stats),
        "seconds_total": head.duration(run.get("seconds_total")),
        "diagnostics": _marked(of_updates),
        "diagnostics_same": diagnostics.sentences(same_updates, config, "in every iteration"),
        "nonfinite": _nonfinite(stats, evaluation),
        "columns": [column.replace("_", " ") for column in COLUMNS],
        "rows": [(record["iteration"], *(_cell(number_of(record, column)) for column in COLUMNS)) for record in stats],
        "config_text": config_text,
    }


def _marked(charts: Sequence[tuple[str, str]]) -> list[tuple[str, Markup]]:
    return [(title, Markup(chart)) for title, chart in charts]


def _sensing(config: Record, parts: Record) -> str | None:
    """`sensing.kind`; None where a selector of one's own may sense anything."""
    return None if "selector" in head.given(parts) else mapping(config.get("sensing")).get("kind")


def _told(run: Record, parts: Record) -> list[str]:
    """What a reader must know before anything else: why the run failed, and what is not as its configuration says."""
    lines = [str(run["reason"])] if run.get("reason") else []
    for name, called in head.given(parts).items():
        lines.append(f"{name.replace('_', ' ')} passed in Python, not by the configuration: {called}")
    lines += [f"Prompts: {run['prompts_not_read']}"] if run.get("prompts_not_read") else []
    changes = parts.get("changes")
    return lines + [f"Changed {change}" for change in (changes if isinstance(changes, list) else [])]


def _nonfinite(stats: Sequence[Record], evaluation: Record) -> list[str]:
    """Counts of what was not finite, in words; empty where all was."""
    counts = {
        "images of the training": _total(stats, "samples_dropped"),
        "images of the evaluations": _total(list(outcome.ends(evaluation)), "num_not_finite"),
        "updates": _total(stats, "updates_skipped"),
        "log-probabilities or ratios": _total(stats, "nonfinite"),
    }
    return [f"{count} {name}" for name, count in counts.items() if count]


def _total(records: Sequence[Record], key: str) -> int:
    values = [number_of(record, key) for record in records]
    return sum(int(value) for value in values if not math.isnan(value))


def _json(path: Path) -> dict[str, Any]:
    return json_object(text_of(path))


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def _stats(path: Path) -> list[dict[str, Any]]:
    """The records of `stats.jsonl` by iteration, the later one of an iteration run twice; a cut line is dropped."""
    by_iteration = {record["iteration"]: record for record in records(text_of(path))}
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else number(value)


def _progress(stats: Sequence[Record], config: Record) -> str:
    planned = mapping(config.get("train")).get("iterations")
    return f"{len(stats)} of {planned} iterations" if planned is not None else f"{len(stats)} iterations"


def _pairs(samples: Path, evaluation: Record) -> list[dict[str, Any]]:
    """For each prompt its pictures before and after, each with its score; None for those that cannot be had."""
    grid = _json(samples / "grid.json")
    prompts = grid.get("prompts")
    sides = [_side(samples, when, grid, end) for when, end in zip(WHEN, outcome.ends(evaluation), strict=True)]
    if not isinstance(prompts, list) or not any(sides):
        return []
    return [
        {
            "prompt": str(prompt),
            "sides": [(when, side[row] if side else None) for when, side in zip(WHEN, sides, strict=True)],
        }
        for row, prompt in enumerate(prompts)
    ]


WHEN = ("before", "after")


def _side(samples: Path, when: str, grid: Record, end: Record) -> list[list[tuple[str, str]]]:
    """(picture, score) of every prompt before or after; a score that was not recorded is ""."""
    tiles, scores = _tiles(samples, when, grid), outcome.scores(end)
    known = [score for row in scores for score in row if score is not None]
    places = decimals((max(known) - min(known)) / 2) if known else 0
    shown = [["not finite" if score is None else fixed(score, places) for score in row] for row in scores]
    told = [shown[row] if row < len(shown) else [] for row in range(len(tiles))]
    return [
        [(tile, scores_of[column] if column < len(scores_of) else "") for column, tile in enumerate(row)]
        for row, scores_of in zip(tiles, told, strict=True)
    ]


def _tiles(samples: Path, when: str, grid: Record) -> list[list[str]]:
    """The pictures of a grid, row by row; empty where they cannot be had."""
    prompts, columns, gap = (grid.get(key, usual) for key, usual in (("prompts", None), ("columns", 1), ("gap", 0)))
    rows = len(prompts) if isinstance(prompts, list) else 1
    if not rows or not isinstance(columns, int) or not isinstance(gap, int) or columns < 1 or gap < 0:
        return []
    try:
        return cut(samples / f"{when}.png", rows, columns, gap=gap)
    except (OSError, ValueError, SyntaxError):  # missing, cut off while it was written, or no such image
        return []


def _reward_chart(stats: Sequence[Record], evaluation: Record, reward: str) -> str:
    both = zip((0, len(stats)), outcome.ends(evaluation), strict=True)
    ends = [{"iteration": iteration, **end} for iteration, end in both]
    held_out = [
        (number_of(row, "iteration"), number_of(row, "mean"), number_of(row, "low"), number_of(row, "high"))
        for row in outcome.history(evaluation) or ends
    ]
    std = [number_of(row, "reward_std") for row in stats]
    return figures.reward_chart(curve(stats, "reward_mean"), std, held_out, f"reward: {reward}")


def _part_charts(stats: Sequence[Record]) -> list[tuple[str, str]]:
    """The mean of each part of a reward that has several, by iteration."""
    parts = [(float(record["iteration"]), mapping(record.get("reward_parts"))) for record in stats]
    names = dict.fromkeys(name for _, values in parts for name in values)
    charts = [
        (name, figures.line_chart([(iteration, number_of(values, name)) for iteration, values in parts], name))
        for name in names
    ]
    return [(name, chart) for name, chart in charts if chart]


def _interval_chart(stats: Sequence[Record], num_steps: int) -> str:
    mean, each = [], []
    for record in stats:
        selector, iteration = mapping(record.get("selector")), float(record["iteration"])
        shown = [key if f"mean_{key}" not in selector else f"mean_{key}" for key in ("start", "end")]  # a fixed range
        mean.append((iteration, *(number_of(selector, key) for key in shown)))
        each.append((iteration, [(float(start), float(end)) for start, end in selector.get("intervals") or []]))
    return figures.interval_chart(mean, each, num_steps)


def _num_steps(stats: Sequence[Record], config: Record) -> int:
    """T of the configuration; without one, the highest end there was."""
    intervals = [interval for record in stats for interval in mapping(record.get("selector")).get("intervals") or []]
    highest = math.ceil(max((end for _, end in intervals), default=1))
    return mapping(config.get("sampler")).get("num_steps") or highest


def _interval_summary(stats: Sequence[Record]) -> str:
    shares, pairs = (
        [value for _, value in curve(stats, key) if not math.isnan(value)]
        for key in ("fraction_trained", "pairs_trained")
    )
    if not shares:
        return ""
    mean = sum(shares) / len(shares)
    return f"On average {mean:.0%} of the denoising steps were trained: {sum(pairs):,.0f} (picture, step) pairs."


def _reasons(stats: Sequence[Record]) -> list[tuple[str, str, int, str]]:
    """(reason, its meaning, times, share) of the decisions, the most frequent first."""
    counts: Counter[str] = Counter()
    for record in stats:
        counts.update(mapping(mapping(record.get("selector")).get("reasons")))
    total = counts.total()
    return [(reason, reasons.in_words(reason), count, f"{count / total:.1%}") for reason, count in counts.most_common()]


def _seconds(stats: Sequence[Record]) -> list[tuple[str, float]]:
    totals: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for record in stats:
        for part, seconds in mapping(record.get("seconds")).items():
            totals[part] = totals.get(part, 0.0) + float(seconds)
    return [(part, seconds) for part, seconds in totals.items() if seconds > 0]


def _css(index: int) -> str:
    return "abcde"[index % 5]


def _time_rows(stats: Sequence[Record]) -> list[tuple[str, str, str, str, str]]:
    parts = _seconds(stats)
    total = sum(seconds for _, seconds in parts)
    return [
        (_css(index), part, f"{seconds:.1f} s", f"{seconds / total:.1%}", f"{seconds / len(stats):.2f} s")
        for index, (part, seconds) in enumerate(parts)
    ]
