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

from adascope_fast.reporting import by_step, figures, processes
from adascope_fast.reporting.figures import number
from adascope_fast.reporting.files import json_object, records, text_of
from adascope_fast.reporting.images import cut_rows

PARTS = ("rollout", "reward", "sensing", "update", "other")
DIAGNOSTICS = (
    ("loss", "loss"),
    ("accuracy", "share of the set's records told right"),
    ("margin", "margin of the set's records"),
    ("approx_kl", "approx. KL"),
    ("clipfrac", "clipped share"),
    ("grad_norm", "gradient norm"),
    ("ratio_max_deviation", "largest |ratio - 1|"),
    ("learning_rate", "learning rate"),
    ("sensing_share", "sensing, share of the time"),
)
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
    ends = _ends(_json(folder / "evaluation.json"))
    is_whole = all("mean" in end for end in ends) or _json(folder / "run.json").get("status") != "finished"
    found += [] if is_whole or "evaluation.json" in found else ["evaluation.json"]
    found += [] if _toml(text_of(folder / "config.toml")) else ["config.toml"]
    lines = text_of(folder / "stats.jsonl").splitlines()
    found += [] if lines and len(_stats(folder / "stats.jsonl")) == len(lines) else ["stats.jsonl"]
    grid = _json(folder / "samples" / "grid.json")
    prompts = grid.get("prompts")
    found += [] if isinstance(prompts, list) else ["samples/grid.json"]
    for when in ("before", "after"):
        if not _strips(folder / "samples" / f"{when}.png", len(prompts) if isinstance(prompts, list) else 1):
            found.append(f"samples/{when}.png")
    if _json(folder / "run.json").get("status") == "finished":
        return found
    return [name for name in found if (folder / name).exists() or name in ("config.toml", "run.json")]


def _contents(folder: Path) -> dict[str, Any]:
    """Everything that the template shows, by its name there."""
    run, evaluation = _json(folder / "run.json"), _json(folder / "evaluation.json")
    stats = _stats(folder / "stats.jsonl")
    config_text = text_of(folder / "config.toml")
    config = _toml(config_text)
    return {
        "name": folder.resolve().name,
        "status": run.get("status", "unknown"),
        "told": _told(run, _json(folder / "parts.json")),
        "progress": _progress(stats, config),
        "headline": _headline(evaluation, config),
        "variety": _variety(evaluation),
        "variety_charts": [(name, Markup(chart)) for name, chart in _variety_charts(evaluation)],
        "stability": _stability(evaluation),
        "attributes": _attributes(evaluation),
        "pairs": _pairs(folder / "samples"),
        "reward_chart": Markup(_reward_chart(stats, evaluation)),
        "part_charts": [(name, Markup(chart)) for name, chart in _part_charts(stats)],
        "interval_chart": Markup(_interval_chart(stats, config)),
        "by_step": [(meaning, Markup(chart)) for meaning, chart in by_step.charts(stats, _num_steps(stats, config))],
        "starts_and_ends": Markup(by_step.starts_and_ends(stats, _num_steps(stats, config))),
        "fraction_chart": Markup(figures.line_chart(_points(stats, "fraction_trained"), "share of steps trained")),
        "interval_summary": _interval_summary(stats),
        "selector": config.get("selector", {}).get("name", "unknown"),
        "is_complement": any((record.get("selector") or {}).get("is_complement") for record in stats),
        "reasons": _reasons(stats),
        "time_bar": Markup(figures.stacked_bar(_seconds(stats), _css)),
        "time_rows": _time_rows(stats),
        "processes": processes.table(stats),
        "processes_headings": processes.HEADINGS,
        "imbalance": processes.imbalance(stats),
        "seconds_total": _duration(run.get("seconds_total")),
        "diagnostics": [
            (label, Markup(chart))
            for key, label in DIAGNOSTICS
            if (chart := figures.line_chart(_points(stats, key), label, css="d"))
        ],
        "nonfinite": _nonfinite(stats, evaluation),
        "columns": [column.replace("_", " ") for column in COLUMNS],
        "rows": [(record["iteration"], *(_cell(_value(record, column)) for column in COLUMNS)) for record in stats],
        "config_text": config_text,
        "facts": _facts(run, config),
        "versions": run.get("versions") or {},
    }


def _told(run: Record, parts: Record) -> list[str]:
    """What a reader must know before anything else: why the run failed, and what is not as its configuration says."""
    lines = [str(run["reason"])] if run.get("reason") else []
    for name, part in _mapping(parts.get("parts")).items():
        if _mapping(part).get("is_given") is True:
            lines.append(f"{name.replace('_', ' ')} passed in Python, not by the configuration: {part.get('name')}")
    lines += [f"Prompts: {run['prompts_not_read']}"] if run.get("prompts_not_read") else []
    changes = parts.get("changes")
    return lines + [f"Changed {change}" for change in (changes if isinstance(changes, list) else [])]


def _nonfinite(stats: Sequence[Record], evaluation: Record) -> list[str]:
    """Counts of what was not finite, in words; empty where all was."""
    counts = {
        "images of the training": _total(stats, "samples_dropped"),
        "images of the evaluations": _total(list(_ends(evaluation)), "num_not_finite"),
        "updates": _total(stats, "updates_skipped"),
        "log-probabilities or ratios": _total(stats, "nonfinite"),
    }
    return [f"{count} {name}" for name, count in counts.items() if count]


def _total(records: Sequence[Record], key: str) -> int:
    values = [_value(record, key) for record in records]
    return int(sum(value for value in values if math.isfinite(value)))


def _ends(evaluation: Record) -> tuple[Record, Record]:
    """The evaluations before and after the training, empty where they are not there."""
    return _mapping(evaluation.get("before")), _mapping(evaluation.get("after"))


def _history(evaluation: Record) -> list[Record]:
    points = evaluation.get("history")
    known = [_mapping(point) for point in points] if isinstance(points, list) else []
    return [point for point in known if isinstance(point.get("iteration"), int)]


def _mapping(value: Any) -> Record:
    return value if isinstance(value, Mapping) else {}


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


def _value(record: Record, key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else number(value)


def _points(stats: Sequence[Record], key: str) -> list[figures.Point]:
    return [(float(record["iteration"]), _value(record, key)) for record in stats]


def _progress(stats: Sequence[Record], config: Record) -> str:
    planned = config.get("train", {}).get("iterations")
    return f"{len(stats)} of {planned} iterations" if planned is not None else f"{len(stats)} iterations"


def _headline(evaluation: Record, config: Record) -> dict[str, Any]:
    (before, after), difference = _ends(evaluation), _mapping(evaluation.get("difference"))
    low, high = _value(difference, "low"), _value(difference, "high")
    direction, verdict = "", ""
    if before and after:
        if low > 0:
            direction, verdict = "rose", "The reward rose by more than the 95 % interval."
        elif high < 0:
            direction, verdict = "fell", "The reward fell by more than the 95 % interval."
        elif low <= 0 <= high:
            verdict = "The 95 % interval of the difference includes 0: no clear change."
        else:
            verdict = "No interval of the difference was recorded."
    return {
        "reward": evaluation.get("reward") or config.get("reward", {}).get("name", "reward"),
        "before": _estimate(before),
        "after": _estimate(after),
        "difference": _estimate(difference, signed=True),
        "direction": direction,
        "verdict": verdict,
        "num_images": before.get("num_images"),
    }


def _estimate(estimate: Record, *, signed: bool = False) -> dict[str, str] | None:
    if math.isnan(_value(estimate, "mean")):
        return None
    spell = "{:+.3f}" if signed else "{:.3f}"
    mean, low, high = (spell.format(_value(estimate, key)) for key in ("mean", "low", "high"))
    return {"mean": mean, "interval": f"{low} to {high}" if "nan" not in low + high else "no interval"}


def _variety(evaluation: Record) -> list[tuple[str, str, str, str]]:
    before, after = _ends(evaluation)
    rows = []
    for name in ("diversity", "contrast", "clip_score"):
        old, new = _value(before, name), _value(after, name)
        if not (math.isnan(old) and math.isnan(new)):
            shown = ["-" if math.isnan(value) else f"{value:.3f}" for value in (old, new)]
            change = "-" if math.isnan(new - old) or not old else f"{round(new / old - 1, 2) + 0.0:+.0%}"
            rows.append((name.replace("_", " "), *shown, change))
    return rows


def _variety_charts(evaluation: Record) -> list[tuple[str, str]]:
    """Diversity and contrast in the course of the training, where they were looked at more often than twice."""
    history = _history(evaluation)
    if len(history) < 3:
        return []
    charts = [(name, figures.line_chart(_points(history, name), name)) for name in ("diversity", "contrast")]
    return [(name, chart) for name, chart in charts if chart]


def _stability(evaluation: Record) -> str:
    """Whether the held-out reward kept what it had gained; nothing for less than three evaluations."""
    found = [(_value(point, "mean"), point["iteration"]) for point in _history(evaluation)]
    found = [(mean, iteration) for mean, iteration in found if math.isfinite(mean)]
    if len(found) < 3:
        return ""
    (best, when), (last, end) = max(found, key=lambda point: point[0]), found[-1]
    if when == end:
        return "The held-out reward was highest at the end."
    return (
        f"The held-out reward was highest ({best:.3f}) after {when} of {end} iterations and fell by {best - last:.3f}."
    )


def _attributes(evaluation: Record) -> list[tuple[str, str, str, str]]:
    before, after = (_mapping(end.get("attributes")) for end in _ends(evaluation))
    rows = []
    for name in dict.fromkeys([*before, *after]):
        old, new = _value(before, name), _value(after, name)
        shown = ["-" if math.isnan(value) else f"{value:.1%}" for value in (old, new)]
        rows.append((name, *shown, "-" if math.isnan(new - old) else f"{100 * (new - old):+.1f}"))
    return rows


def _pairs(samples: Path) -> list[dict[str, Any]]:
    """For each prompt its strip of pictures before and after; a strip that cannot be had is None."""
    prompts = _json(samples / "grid.json").get("prompts") or []
    before, after = (_strips(samples / f"{when}.png", len(prompts)) for when in ("before", "after"))
    if not before and not after:
        return []
    nothing = [None] * len(prompts)
    rows = zip(prompts, before or nothing, after or nothing, strict=True)
    return [{"prompt": str(prompt), "before": old, "after": new} for prompt, old, new in rows]


def _strips(path: Path, num_rows: int) -> list[str]:
    try:
        return cut_rows(path, num_rows) if num_rows else []
    except (OSError, ValueError, SyntaxError):  # missing, cut off while it was written, or no such image
        return []


def _reward_chart(stats: Sequence[Record], evaluation: Record) -> str:
    ends = [{"iteration": iteration, **end} for iteration, end in zip((0, len(stats)), _ends(evaluation), strict=True)]
    held_out = [
        (_value(row, "iteration"), _value(row, "mean"), _value(row, "low"), _value(row, "high"))
        for row in _history(evaluation) or ends
    ]
    return figures.reward_chart(_points(stats, "reward_mean"), [_value(row, "reward_std") for row in stats], held_out)


def _part_charts(stats: Sequence[Record]) -> list[tuple[str, str]]:
    """The mean of each part of a reward that has several, by iteration."""
    parts = [(float(record["iteration"]), _mapping(record.get("reward_parts"))) for record in stats]
    names = dict.fromkeys(name for _, values in parts for name in values)
    charts = [
        (name, figures.line_chart([(iteration, _value(values, name)) for iteration, values in parts], name))
        for name in names
    ]
    return [(name, chart) for name, chart in charts if chart]


def _interval_chart(stats: Sequence[Record], config: Record) -> str:
    mean, each = [], []
    for record in stats:
        selector, iteration = record.get("selector") or {}, float(record["iteration"])
        shown = [key if f"mean_{key}" not in selector else f"mean_{key}" for key in ("start", "end")]  # a fixed range
        mean.append((iteration, *(_value(selector, key) for key in shown)))
        each.append((iteration, [(float(start), float(end)) for start, end in selector.get("intervals") or []]))
    return figures.interval_chart(mean, each, _num_steps(stats, config))


def _num_steps(stats: Sequence[Record], config: Record) -> int:
    """T of the configuration; without one, the highest end there was."""
    intervals = [interval for record in stats for interval in (record.get("selector") or {}).get("intervals") or []]
    return config.get("sampler", {}).get("num_steps") or math.ceil(max((end for _, end in intervals), default=1))


def _interval_summary(stats: Sequence[Record]) -> str:
    shares, pairs = (
        [value for _, value in _points(stats, key) if not math.isnan(value)]
        for key in ("fraction_trained", "pairs_trained")
    )
    if not shares:
        return ""
    mean = sum(shares) / len(shares)
    return f"On average {mean:.0%} of the denoising steps were trained: {sum(pairs):,.0f} (picture, step) pairs."


def _reasons(stats: Sequence[Record]) -> list[tuple[str, int, str]]:
    counts: Counter[str] = Counter()
    for record in stats:
        counts.update((record.get("selector") or {}).get("reasons") or {})
    total = counts.total()
    return [(reason, count, f"{count / total:.1%}") for reason, count in counts.most_common()]


def _seconds(stats: Sequence[Record]) -> list[tuple[str, float]]:
    totals = dict.fromkeys(PARTS, 0.0)
    for record in stats:
        for part, seconds in (record.get("seconds") or {}).items():
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


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _facts(run: Record, config: Record) -> list[tuple[str, str]]:
    memory = run.get("peak_memory_mb")
    facts = [
        ("model", config.get("model", {}).get("name")),
        ("algorithm", config.get("algorithm", {}).get("name")),
        ("selector", config.get("selector", {}).get("name")),
        ("seed", config.get("run", {}).get("seed")),
        ("device", run.get("device")),
        ("peak memory", f"{memory:,.0f} MB" if memory is not None else None),
        ("time in all", _duration(run.get("seconds_total"))),
        ("commit", run.get("commit")),
        ("command", run.get("command")),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]
