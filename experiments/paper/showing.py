"""What run.py writes of an experiment's arms: gains, times and costs with intervals, a table, and a plot."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from adascope_fast.config import Config
from experiments import runs
from experiments.paper import measures
from experiments.paper.declaring import Experiment
from experiments.paper.figures import COLOURS, INK, header, inked, row, signed, time_of, times


def arms_of(experiment: Experiment, folders: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Figures of each arm: its seeds, means with intervals, and the difference to the arm that it is compared with."""
    read = {name: [_read(folder) for folder in mine] for name, mine in folders.items()}
    within = {key: _within(read, key) for key in ("cpu_seconds", "pairs")}
    found = {}
    for name, seeds in read.items():
        against = experiment.arms[name].against
        both = [one for one in (name, against) if one is not None and one in read]
        changes = {one: _changes(read[one]) for one in both}
        drawn = _drawn(changes)
        arm: dict[str, Any] = {
            "against": against,
            "changes": list(experiment.arms[name].changes),
            "learning_rate": seeds[0]["learning_rate"],
            "seeds": [{key: one[key] for key in _SEED} for one in seeds],
            "gain": measures.interval_of(float(changes[name].mean()), drawn[name]).to_json(),
            **{key: _over_seeds([one[key] for one in seeds]) for key in ("cpu_seconds", "pairs", "fraction")},
            "diversity": [fmean(one["diversity"][k] or math.nan for one in seeds) for k in (0, 1)],
        }
        arm["within"] = {key: of_arms[name] for key, of_arms in within.items()}
        arm["to_gain"] = _time(experiment.gain, read, name, against)
        if against in read:
            difference = float(changes[name].mean() - changes[against].mean())
            interval = measures.interval_of(difference, drawn[name] - drawn[against])
            arm["more"] = interval.to_json() | {"word": _word(interval)}
            arm["share_of_seconds"] = fmean(
                mine["cpu_seconds"] / other["cpu_seconds"] for mine, other in zip(seeds, read[against], strict=True)
            )
        found[name] = arm
    return found


_SEED = (
    "before", "after", "cpu_seconds", "pairs", "fraction", "interval", "diversity", "contrast", "fall", "reasons",
    "history",
)  # fmt: skip


def _read(folder: Path) -> dict[str, Any]:
    """A finished run: its held-out reward over seconds and pairs, and what it cost."""
    found, stats = json.loads((folder / "evaluation.json").read_text()), runs.stats_of(folder)
    history = runs.history_of(folder)
    chosen = [record["selector"] for record in stats]
    sensed = [one for one in chosen if one.get("mean_start") is not None]
    rewards = [point["reward"] for point in history]
    return {
        "learning_rate": Config.load(folder / "config.toml").train.learning_rate,
        "before": found["before"]["mean"],
        "after": found["after"]["mean"],
        "scores": [found[when]["scores"] for when in ("before", "after")],
        "cpu_seconds": history[-1]["cpu_seconds"],
        "pairs": history[-1]["pairs"],
        "fraction": fmean(record["fraction_trained"] for record in stats),
        "interval": [fmean(one[key] for one in sensed) for key in ("mean_start", "mean_end")] if sensed else None,
        "reasons": dict(sum((Counter(one.get("reasons", {})) for one in sensed), Counter())),
        **{key: [found[when][key] for when in ("before", "after")] for key in ("diversity", "contrast")},
        "fall": max(best - now for best, now in zip(accumulate(rewards, max), rewards, strict=True)),
        "history": history,
    }


def _changes(seeds: Sequence[Mapping[str, Any]]) -> measures.Array:
    """Gain [s, 1, c] of each caption in each seed; an image that is not finite has no score."""
    before, after = (
        np.array([np.nanmean(np.array(one["scores"][k], dtype=np.float64), 1) for one in seeds]) for k in (0, 1)
    )
    return (after - before)[:, None, :]


def _drawn(changes: Mapping[str, measures.Array]) -> dict[str, measures.Array]:
    """Means [b] of the bootstrap's draws; captions are drawn together where both arms have the same number."""
    if len({one.shape[2] for one in changes.values()}) == 1:
        return {name: one[:, 0] for name, one in measures.draws(changes).items()}
    return {name: measures.draws({name: one}, seed=k)[name][:, 0] for k, (name, one) in enumerate(changes.items())}


def _over_seeds(values: Sequence[float]) -> dict[str, float]:
    return {"mean": fmean(values), "low": min(values), "high": max(values)}


def _time(
    gain: float, read: Mapping[str, Sequence[Mapping[str, Any]]], name: str, against: str | None
) -> dict[str, Any]:
    """CPU seconds and pairs to a gain, of the mean over seeds; how many times sooner than the other arm."""
    found: dict[str, Any] = {}
    for key in ("cpu_seconds", "pairs"):
        curves = {}
        both = [one for one in (name, against) if one is not None and one in read]
        arms = {one: [_curve(seed, key) for seed in read[one]] for one in both}
        grid = measures.common_grid(arms)
        for one, mine in arms.items():
            gains = measures.on_grid(mine, grid)
            curves[one] = (gains.mean((0, 2)), measures.draws({one: gains})[one])
        own_grid = measures.common_grid({name: arms[name]})
        own = measures.on_grid(arms[name], own_grid)
        found[key] = measures.time_interval(
            own.mean((0, 2)), measures.draws({name: own})[name], own_grid, gain
        ).to_json()
        found[key]["within"] = float(own_grid[-1])
        if against in curves:
            faster, bounds = measures.times_faster(curves[name], curves[against], grid, gain)
            found[key]["times"] = faster.to_json() | {"bounds": [b if math.isfinite(b) else None for b in bounds]}
    return found


def _within(read: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> dict[str, dict[str, float | None]]:
    """The best gain of each arm within the seconds (or pairs) that all arms have, the mean over seeds."""
    arms = {name: [_curve(seed, key) for seed in seeds] for name, seeds in read.items()}
    grid = measures.common_grid(arms)
    gains = {name: measures.on_grid(mine, grid) for name, mine in arms.items()}
    return {
        name: {"limit": float(grid[-1])}
        | measures.interval_of(
            measures.best_within(mine.mean((0, 2))), measures.draws({name: mine})[name].max(1)
        ).to_json()
        for name, mine in gains.items()
    }


def _curve(seed: Mapping[str, Any], key: str) -> tuple[measures.Array, measures.Array]:
    history = seed["history"]
    x = np.array([point[key] for point in history], dtype=np.float64)
    return x, np.array([[point["reward"] - history[0]["reward"]] for point in history])


def _word(interval: measures.Interval) -> str:
    """Of a difference."""
    assert interval.low is not None
    assert interval.high is not None
    if interval.low > 0:
        return "more"
    return "less" if interval.high < 0 else "too noisy to tell"


def table(values: Mapping[str, Any]) -> str:
    """Markdown."""
    if not values["arms"]:
        heading = [f"{values['paper']}: {values['title']}", "", f"Mean of {len(values['seeds'])} seeds."]
        return "\n".join([*heading, *values["notes"], *values["drawn"]["said"]]) + "\n"
    arms = values["arms"]
    limits = {key: one["limit"] for key, one in next(iter(arms.values()))["within"].items()}
    lines = [
        f"{values['paper']}: {values['title']}",
        "",
        f"Mean of {len(values['seeds'])} seeds; 95 % intervals over seeds and captions, of times and best gains over "
        "seeds.",
        "",
        *header((
            "arm", "rate", "gain", "more than", "by", "", f"best gain in {limits['cpu_seconds']:.0f} CPU s",
            f"best gain in {limits['pairs']:,.0f} pairs", "largest fall", "diversity",
        )),
        *(row(_gained(name, arm)) for name, arm in arms.items()),
        "",
        *header((
            "arm", "CPU s", "share of its seconds", f"CPU s to {values['gain']:+.2f}", "times as fast", "pairs",
            "share of steps", "interval",
        )),
        *(row(_cost(name, arm)) for name, arm in arms.items()),
    ]  # fmt: skip
    lines += ["", *values["notes"]] if values["notes"] else []
    if "evaluated" in values:
        lines += ["", "The metrics of `adascope-fast evaluate` on the first seed:", "", *_of_csv(values["evaluated"])]
    return "\n".join(lines) + "\n"


def _gained(name: str, arm: Mapping[str, Any]) -> list[str]:
    more = arm.get("more")
    return [
        f"`{name}`",
        f"{arm['learning_rate']:g}",
        signed(arm["gain"]),
        f"`{arm['against']}`" if more else "",
        signed(more),
        more["word"] if more else "",
        signed(arm["within"]["cpu_seconds"]),
        signed(arm["within"]["pairs"]),
        f"{max(one['fall'] for one in arm['seeds']):.3f}",
        f"{arm['diversity'][0]:.3f} to {arm['diversity'][1]:.3f}",
    ]


def _cost(name: str, arm: Mapping[str, Any]) -> list[str]:
    to, spans = arm["to_gain"]["cpu_seconds"], [one["interval"] for one in arm["seeds"]]
    return [
        f"`{name}`",
        f"{arm['cpu_seconds']['mean']:.0f}",
        f"{arm['share_of_seconds']:.0%}" if "more" in arm else "",
        time_of(to, to["within"]),
        times(to["times"]) if "times" in to else "",
        f"{arm['pairs']['mean']:,.0f}",
        f"{arm['fraction']['mean']:.0%}",
        "" if None in spans else f"[{fmean(one[0] for one in spans):.1f}, {fmean(one[1] for one in spans):.1f})",
    ]


def _of_csv(lines: Sequence[str]) -> list[str]:
    """The metrics as columns, an arm a row: the reward and the paper's thirteen, those besides, and why some lack."""
    import csv

    found = list(csv.DictReader(lines))
    arms = list(dict.fromkeys(one["arm"] for one in found))
    known = [name for name in dict.fromkeys(one["metric"] for one in found) if _values(found, name)]
    besides = {one["metric"] for one in found if one["group"] == "besides"}
    better = {one["metric"]: one["better"] for one in found}
    shown = []
    for columns in ([name for name in known if name not in besides], [name for name in known if name in besides]):
        heads = ["", *(f"{name}, {better[name]} is better" for name in columns)]
        shown += [
            *header(heads),
            *(row([f"`{arm}`", *(_cell(found, arm, name) for name in columns)]) for arm in arms),
            "",
        ]
    reasons = {one["metric"]: one["why"] for one in found if one["metric"] not in known}
    return [*shown, *(f"- {why}" for why in reasons.values())]


def _values(found: Sequence[Mapping[str, str]], metric: str) -> dict[str, float]:
    return {one["arm"]: float(one["value"]) for one in found if one["metric"] == metric and one["value"]}


def _cell(found: Sequence[Mapping[str, str]], arm: str, metric: str) -> str:
    """The value with its interval; bold where it is the best."""
    values = _values(found, metric)
    if arm not in values:
        return ""
    one = next(one for one in found if (one["arm"], one["metric"]) == (arm, metric))
    best = (min if one["better"] == "lower" else max)(values, key=lambda name: values[name])
    value = f"**{values[arm]:.3g}**" if arm == best else f"{values[arm]:.3g}"
    return f"{value} [{float(one['low']):.3g}, {float(one['high']):.3g}]" if one["low"] else value


MOST_LINES = 10
BRIGHT = (*COLOURS[2:], *COLOURS[:2])


def _lines(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """(colour, line style) of each arm; AdaScope has the colour of what it alone is compared with, dashed there."""
    compared = Counter(arm["against"] for arm in arms.values())
    hosts = {
        name: arm["against"]
        for name, arm in arms.items()
        if name.endswith("adascope")
        and (host := arms.get(arm["against"] or "")) is not None
        and host["against"] is None
        and compared[arm["against"]] == 1
    }
    own = [name for name in arms if name not in hosts]
    styles = ("-", "--", ":")
    found = {name: (BRIGHT[k % len(BRIGHT)], styles[k // len(BRIGHT) % 3]) for k, name in enumerate(own)}
    for name, host in hosts.items():
        found[name], found[host] = (found[host][0], "-"), (found[host][0], "--")
    return {name: found[name] for name in arms}


def _in_rows(values: Mapping[str, Any]) -> Any:
    """A figure with an arm a row: its gain, and the best within the seconds that all have, with their intervals."""
    from matplotlib import pyplot

    arms = values["arms"]
    limit = next(iter(arms.values()))["within"]["cpu_seconds"]["limit"]
    shown = {
        "gain of the held-out reward after all iterations": [arm["gain"] for arm in arms.values()],
        f"best gain in {limit:.0f} CPU seconds": [arm["within"]["cpu_seconds"] for arm in arms.values()],
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 1.2 + 0.3 * len(arms)), sharey=True, layout="constrained")
    for axis, (title, found) in zip(axes, shown.items(), strict=True):
        for place, (name, one) in enumerate(zip(arms, found, strict=True)):
            colour = BRIGHT[1] if name == "adascope" else BRIGHT[0]
            axis.plot((one["low"], one["high"]), (place, place), color=colour, lw=2, alpha=0.5)
            axis.plot(one["value"], place, "o", color=colour)
        if "adascope" in arms:
            axis.axvline(found[list(arms).index("adascope")]["value"], color=BRIGHT[1], lw=0.8, ls=":")
        axis.axvline(0, color=INK, lw=0.6)
        axis.set(xlabel=title, yticks=range(len(arms)), yticklabels=list(arms))
        inked(axis)
    axes[0].invert_yaxis()
    return figure


def images(folder: Path, arms: Sequence[str], path: Path, *, captions: int = 8, each: int = 3) -> None:
    """A grid: captions from the first to the last as rows, an arm's images on the same seeds as a group of columns."""
    import matplotlib
    from PIL import Image

    matplotlib.use("Agg")
    from matplotlib import pyplot

    listed = [json.loads(line) for line in (folder / arms[0] / "metadata.jsonl").read_text().splitlines()]
    of_caption: dict[str, list[str]] = {}
    for one in listed:
        of_caption.setdefault(one["prompt"], []).append(one["file_name"])
    chosen = [list(of_caption)[int(place)] for place in np.linspace(0, len(of_caption) - 1, captions)]
    figure, axes = pyplot.subplots(
        captions, len(arms), figsize=(1.7 * len(arms), 0.75 * captions), squeeze=False, layout="constrained"
    )
    for row_of_axes, caption in zip(axes, chosen, strict=True):
        for axis, arm in zip(row_of_axes, arms, strict=True):
            shown = [np.asarray(Image.open(folder / arm / name)) for name in of_caption[caption][:each]]
            axis.imshow(np.concatenate(shown, 1))
            axis.set_axis_off()
        row_of_axes[0].set_title(caption, loc="left", fontsize=6, color=INK)
    for axis, arm in zip(axes[-1], arms, strict=True):
        axis.text(0.5, -0.12, arm, transform=axis.transAxes, ha="center", va="top", fontsize=7, color=INK)
    figure.savefig(path, dpi=80, transparent=True)
    pyplot.close(figure)


def plot(values: Mapping[str, Any], path: Path) -> None:
    """Gain against CPU seconds and against pairs: a line an arm, its seeds faint behind it; many arms in rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if len(values["arms"]) > MOST_LINES:
        figure = _in_rows(values)
        figure.savefig(path, dpi=90, transparent=True)
        pyplot.close(figure)
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for axis, key in zip(axes, ("cpu_seconds", "pairs"), strict=True):
        for name, (colour, style) in _lines(values["arms"]).items():
            arm = values["arms"][name]
            curves = [_curve(seed, key) for seed in arm["seeds"]]
            for x, gain in curves:
                axis.plot(x, gain[:, 0], color=colour, alpha=0.25, lw=0.8)
            grid = measures.common_grid({name: curves})
            mean = measures.on_grid(curves, grid).mean((0, 2))
            axis.plot(grid, mean, color=colour, ls=style, label=name)
        axis.set(xlabel={"cpu_seconds": "CPU seconds of training", "pairs": "(image, step) pairs trained"}[key])
        axis.set_ylabel("gain of the held-out reward")
        inked(axis)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, labelcolor=INK)
    figure.savefig(path, dpi=90, transparent=True)
    pyplot.close(figure)
