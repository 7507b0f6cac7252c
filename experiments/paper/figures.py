"""What time_to_reward.py writes: figures with intervals of each arm, differences, verdicts, a table, and a plot."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from experiments.paper import measures
from experiments.paper.arms import Family

GAINS = (0.05, 0.10)
AXES = {"seconds": "cpu_seconds", "pairs": "pairs"}
SHOWN = 41
"""Points of a curve in the file."""
COLOURS = ("#9298a1", "#6b7280", "#4a86e8", "#a06cd5", "#c2a34f", "#d64541", "#e08e3c", "#2aa583")
OF_ADASCOPE = {"adascope": 5, "adascope_one_pass": 6, "adascope_best_worst": 7}
"""The colours of these arms, the same in both families."""
SPREAD = 1.25
"""Of a machine's pace, up to which seconds of its runs are compared."""
INK = "#808080"  # legible on white and on black: the pages decide what is behind

Points = Sequence[Mapping[str, Any]]


def mean_of(scores: Sequence[Sequence[float]]) -> float:
    """Mean over captions of the mean over images; images without a score are left out."""
    return float(np.nanmean(np.nanmean(np.asarray(scores, dtype=np.float64), 1)))


def of(runs: Mapping[str, Sequence[Points]], base: Sequence[Sequence[float]], family: Family) -> dict[str, Any]:
    """Figures of all arms along seconds and pairs, their differences to the family's rival, and the verdicts.

    Args:
        runs: of each arm, the measured points of each seed.
        base: scores of the model before training, [captions, samples].
    """
    by_axis = {axis: _Curves.of(runs, base, key) for axis, key in AXES.items()}
    arms: dict[str, Any] = {}
    for name, points in runs.items():
        arms[name] = {
            "iterations": fmean(one[-1]["iteration"] for one in points),
            "last_seconds": [one[-1]["cpu_seconds"] for one in points],
            "last_pairs": [one[-1]["pairs"] for one in points],
            "last_gain": [mean_of(one[-1]["scores"]) - mean_of(base) for one in points],
            **{axis: curves.of_arm(name) for axis, curves in by_axis.items()},
        }
        if family.rival in runs and name != family.rival:
            for axis, curves in by_axis.items():
                arms[name][axis]["more_than_rival"] = _told(curves.difference(name, family.rival), goal=0.0)
    goals = []
    for goal in family.goals:
        if goal.arm in runs and goal.base in runs:
            for gain in GAINS:
                interval, bounds = by_axis["seconds"].times_faster(goal.arm, goal.base, gain)
                goals.append(
                    {
                        "arm": goal.arm, "base": goal.base, "gain": gain, "goal": goal.times,
                        "bounds": [value if math.isfinite(value) else None for value in bounds],
                        **_told(interval, goal=goal.times),
                    }
                )  # fmt: skip
    return {
        "base": mean_of(base),
        "num_captions": len(base),
        "rival": family.rival,
        "same": {axis: float(curves.grid[-1]) for axis, curves in by_axis.items()},
        "arms": arms,
        "goals": goals,
    }


class _Curves:
    """Mean curves of the arms along one axis, and those of the bootstrap's draws."""

    def __init__(self, grid: measures.Array, gains: dict[str, measures.Array]) -> None:
        self.grid = grid
        self.whole = {name: gain.mean((0, 2)) for name, gain in gains.items()}
        self.drawn = measures.draws(gains)

    @classmethod
    def of(cls, runs: Mapping[str, Sequence[Points]], base: Sequence[Sequence[float]], key: str) -> "_Curves":
        along = {name: [measures.gains(one, base, key) for one in points] for name, points in runs.items()}
        grid = measures.common_grid(along)
        return cls(grid, {name: measures.on_grid(one, grid) for name, one in along.items()})

    def of_arm(self, name: str) -> dict[str, Any]:
        whole, drawn = self.whole[name], self.drawn[name]
        best = measures.interval_of(measures.best_within(whole), drawn.max(1))
        low, high = np.quantile(drawn, measures.QUANTILES, axis=0)
        at = np.linspace(0, len(self.grid) - 1, SHOWN).round().astype(int)
        return {
            "to": {str(gain): measures.time_interval(whole, drawn, self.grid, gain).to_json() for gain in GAINS},
            "best": best.to_json(),
            "curve": {
                "x": self.grid[at].round(3).tolist(),
                **{key: row[at].round(5).tolist() for key, row in (("gain", whole), ("low", low), ("high", high))},
            },
        }

    def difference(self, name: str, rival: str) -> measures.Interval:
        """Of the best gains."""
        value = measures.best_within(self.whole[name]) - measures.best_within(self.whole[rival])
        return measures.interval_of(value, self.drawn[name].max(1) - self.drawn[rival].max(1))

    def times_faster(self, arm: str, base: str, gain: float) -> tuple[measures.Interval, tuple[float, float]]:
        pairs = [(self.whole[name], self.drawn[name]) for name in (arm, base)]
        return measures.times_faster(pairs[0], pairs[1], self.grid, gain)


def _told(interval: measures.Interval, *, goal: float) -> dict[str, Any]:
    return interval.to_json() | {"verdict": measures.verdict(interval, goal)}


def table(values: Mapping[str, Any]) -> str:
    """Markdown: the arms, then the goals."""
    seconds, pairs, rival = values["same"]["seconds"], values["same"]["pairs"], values["rival"]
    heads = ["arm", "rate, updates", *(f"CPU s to {gain:+.2f}" for gain in GAINS)]
    heads += [*(f"pairs to {gain:+.2f}" for gain in GAINS), f"best gain in {seconds:.0f} s", f"less `{rival}`'s"]
    heads += [f"best gain in {pairs:,.0f} pairs", f"less `{rival}`'s"]
    lines = [
        f"Held-out reward before: {values['base']:.3f} ({values['num_captions']} captions); mean of "
        f"{len(values['seeds'])} seeds, 95 % interval over seeds and captions. {_paced(values['pace'])}",
        "",
        *header(heads),
    ]
    for name, arm in values["arms"].items():
        chosen = values["settings"][name]
        cells = [chosen["label"], f"{chosen['learning_rate']:g}, {chosen['updates']}"]
        cells += [time_of(arm["seconds"]["to"][str(gain)], seconds) for gain in GAINS]
        cells += [time_of(arm["pairs"]["to"][str(gain)], pairs) for gain in GAINS]
        for axis in AXES:
            cells += [signed(arm[axis]["best"]), signed(arm[axis].get("more_than_rival"))]
        lines.append(row(cells))
    lines += ["", *header(["arm", "times as fast as", "to", "found", "goal", "verdict"])]
    for goal in values["goals"]:
        lines.append(
            row(
                [
                    values["settings"][goal["arm"]]["label"], values["settings"][goal["base"]]["label"],
                    f"{goal['gain']:+.2f}", times(goal), f"{goal['goal']:g}", goal["verdict"],
                ]
            )
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def _paced(pace: Mapping[str, float]) -> str:
    """How steady the machine was."""
    spread = pace["slowest"] / pace["fastest"]
    told = f"A fixed computation before each run took {spread:.2f} times as long at the slowest as at the fastest."
    return told if spread <= SPREAD else f"{told} **These seconds are not those of one machine: do not compare them.**"


def header(heads: Sequence[str]) -> list[str]:
    """First lines of a table in Markdown."""
    return [row(heads), "|---" * len(heads) + "|"]


def row(cells: Sequence[str]) -> str:
    """A line of it."""
    return f"| {' | '.join(cells)} |"


def time_of(found: Mapping[str, float | None], end: float) -> str:
    """A time to a gain with its interval, or that it was not reached until the end."""
    if found["value"] is None:
        return f"not within {end:,.0f}"
    low = "" if found["low"] is None else f"{found['low']:,.0f}"
    return f"{found['value']:,.0f} [{low}, {_open(found['high'], ',.0f')}]"


def signed(found: Mapping[str, Any] | None) -> str:
    """A gain or a difference with its interval; nothing where there is none."""
    if found is None:
        return ""
    return f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def times(goal: Mapping[str, Any]) -> str:
    """How many times as fast, with its interval; bounds where one of the two did not get there."""
    least, most = goal["bounds"]
    if goal["value"] is not None:
        value = f"{goal['value']:.2f}"
    elif not least and most is None:
        return "neither reached it"
    else:
        value = f"above {least:.2f}" if most is None else f"below {most:.2f}"
    return f"{value} [{_open(goal['low'], '.2f')}, {_open(goal['high'], '.2f')}]"


def _open(value: float | None, form: str) -> str:
    return "open" if value is None else format(value, form)


def inked(axis: Any) -> None:
    """What is written at an axis in a colour that is legible on white and on black."""
    axis.tick_params(colors=INK)
    for part in (axis.title, axis.xaxis.label, axis.yaxis.label, *axis.spines.values()):
        part.set_color(INK)


def plot(values: Mapping[str, Any], path: Path) -> None:
    """Gain against seconds and against pairs with its interval, nothing behind them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    titles = {"seconds": "CPU seconds of training", "pairs": "(image, step) pairs trained"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for k, (name, arm) in enumerate(values["arms"].items()):
            colour = COLOURS[OF_ADASCOPE.get(name, k)]
            curve = arm[key]["curve"]
            axis.plot(curve["x"], curve["gain"], color=colour, label=values["settings"][name]["label"])
            axis.fill_between(curve["x"], curve["low"], curve["high"], color=colour, alpha=0.12, lw=0)
        for gain in GAINS:
            axis.axhline(gain, color=INK, lw=0.6, ls=":")
        axis.set(xlabel=title, ylabel="gain of the held-out reward")
        inked(axis)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, labelcolor=INK)
    figure.savefig(path, dpi=90, transparent=True)
    pyplot.close(figure)
