"""What the iterations of a run tell of each denoising step, as charts: how it changed from early to late training."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from adascope_fast.reporting import figures
from adascope_fast.reporting.diagnostics import one_value
from adascope_fast.reporting.files import mapping

Record = Mapping[str, Any]
Values = Sequence[float | None]
# Title, quantity with its unit, and what it is multiplied by to be in that unit.
MEANINGS = {
    "structure": ("structure: CLIP similarity of the guess and its prompt", "CLIP similarity", 1),
    "volatility": ("structure: change of the guess from step to step", "1 - correlation of successive guesses", 1),
    "preference": ("preference: what the end is decided on", "preference", 1),
    "uncertainty": ("uncertainty of the step", "1 - correlation of the latents around it", 1),
    "pairs": ("pictures trained", "pictures an iteration", 1),
    "ratio_deviation": ("mean |ratio - 1|", "mean |ratio - 1| of the pairs", 1),
    "clipfrac": ("clipped pairs", "clipped, % of the pairs", 100),
    "gradient_share": ("share of the gradient", "% of its norm in the model output", 100),
}
LIKENESS = ("preference: likeness of the guess to the final latent", "correlation", 1)
JUDGED = ("preference: reward of the decoded guess", "reward", 1)
PREFERENCES = {"latent": LIKENESS, "reward_only": JUDGED, "semantic": JUDGED}
"""What preference is, by `sensing.kind`."""
SENSED = ("structure", "volatility", "preference")


def charts(
    stats: Sequence[Record], num_steps: int, sensing: str | None
) -> tuple[list[tuple[str, str]], dict[str, float]]:
    """(title, SVG) of each quantity; title and value of each that is the same at all steps.

    Grey is the first third of the iterations, blue the last.

    Args:
        sensing: `sensing.kind`; None where it is not known what was sensed.
    """
    third = -(-len(stats) // 3)
    parts = [("e", "First third of the iterations", stats[:third]), ("a", "last third", stats[-third:])]
    parts = [("a", "The iteration", stats)] if len(stats) < 2 else parts
    drawn, constant = [], {}
    for name, meaning in MEANINGS.items():
        title, quantity, factor = PREFERENCES.get(str(sensing), meaning) if name == "preference" else meaning
        rows = [(css, named, _mean([_values(record, name) for record in part])) for css, named, part in parts]
        if (value := one_value(one for *_, values in rows for one in values if one is not None)) is not None:
            constant[title] = factor * value
            continue
        curves = [(css, named, _rows(values, num_steps, factor)) for css, named, values in rows]
        if svg := figures.steps_chart(curves, num_steps, quantity, width=320, height=166):
            drawn.append((title, svg))
    return drawn, constant


def starts_and_ends(stats: Sequence[Record], num_steps: int) -> str:
    """How often each step was a start (green) and an end (orange), over all prompts and iterations."""
    intervals = [interval for record in stats for interval in mapping(record.get("selector")).get("intervals") or []]
    counts = [Counter(round(interval[side]) for interval in intervals) for side in (0, 1)]
    series = [
        (css, name, [count[step] for step in range(num_steps + 1)])
        for css, name, count in zip("cb", ("Start", "end"), counts, strict=True)
    ]
    return figures.histogram(series, "decisions, of all prompts and iterations", width=320, height=166)


def _values(record: Record, name: str) -> Values:
    if name in SENSED:
        return mapping(mapping(record.get("selector")).get("curves")).get(name) or []
    return mapping(record.get("steps")).get(name) or []


def _mean(rows: Sequence[Values]) -> Values:
    """Over the iterations that have a value, step by step."""
    length = max((len(row) for row in rows), default=0)
    columns = [[row[i] for row in rows if i < len(row) and row[i] is not None] for i in range(length)]
    return [sum(column) / len(column) if column else None for column in columns]  # type: ignore[arg-type]


def _rows(values: Values, num_steps: int, factor: float) -> list[figures.Row]:
    """(step, value, value, value); a step's value stands in its middle, a state's where it is."""
    offset = 0.0 if len(values) > num_steps else 0.5
    known = [(index + offset, factor * value) for index, value in enumerate(values) if value is not None]
    return [(x, y, y, y) for x, y in known]
