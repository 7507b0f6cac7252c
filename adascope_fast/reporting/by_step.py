"""What the iterations of a run tell of each denoising step, as charts: how it changed from early to late training."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from adascope_fast.reporting import figures

Record = Mapping[str, Any]
Values = Sequence[float | None]
MEANINGS = {
    "structure": "structure of the guess",
    "volatility": "structure: change of the guess from step to step",
    "preference": "preference: sensed reward of the guess",
    "uncertainty": "uncertainty: 1 - correlation of the latents around the step",
    "pairs": "pictures trained",
    "ratio_deviation": "mean |ratio - 1|",
    "clipfrac": "clipped share",
    "gradient_share": "share of the gradient, by its norm in the model output",
}
SENSED = ("structure", "volatility", "preference")


def charts(stats: Sequence[Record], num_steps: int) -> list[tuple[str, str]]:
    """(meaning, SVG) of each quantity: grey is the first third of the iterations, blue the last."""
    third = -(-len(stats) // 3)
    parts = [("a", stats)] if len(stats) < 2 else [("e", stats[:third]), ("a", stats[-third:])]
    found = []
    for name, meaning in MEANINGS.items():
        curves = [(css, _rows(_mean([_values(record, name) for record in part]), num_steps)) for css, part in parts]
        if svg := figures.steps_chart(curves, num_steps, meaning, width=320, height=150):
            found.append((meaning, svg))
    return found


def starts_and_ends(stats: Sequence[Record], num_steps: int) -> str:
    """How often each step was a start (green) and an end (orange), over all prompts and iterations."""
    intervals = [interval for record in stats for interval in (record.get("selector") or {}).get("intervals") or []]
    counts = [Counter(round(interval[side]) for interval in intervals) for side in (0, 1)]
    series = [(css, [count[step] for step in range(num_steps + 1)]) for css, count in zip("cb", counts, strict=True)]
    return figures.histogram(series, "times", width=320, height=150)


def _values(record: Record, name: str) -> Values:
    if name in SENSED:
        return ((record.get("selector") or {}).get("curves") or {}).get(name) or []
    return (record.get("steps") or {}).get(name) or []


def _mean(rows: Sequence[Values]) -> Values:
    """Over the iterations that have a value, step by step."""
    length = max((len(row) for row in rows), default=0)
    columns = [[row[i] for row in rows if i < len(row) and row[i] is not None] for i in range(length)]
    return [sum(column) / len(column) if column else None for column in columns]  # type: ignore[arg-type]


def _rows(values: Values, num_steps: int) -> list[tuple[float, float, float, float]]:
    """(step, value, value, value); a step's value stands in its middle, a state's where it is."""
    offset = 0.0 if len(values) > num_steps else 0.5
    return [(index + offset, value, value, value) for index, value in enumerate(values) if value is not None]
