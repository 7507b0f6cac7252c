"""Does it pay to train AdaScope's interval? Against every step, random steps, and the steps that AdaScope leaves out.

    python experiments/interval/interval.py [--rewards R ...] [--seeds 0 1 2] [--iterations N] [--jobs J]
        [--set KEY=VALUE ...] [--arms A ...] [--variant NAME KEY=VALUE ...]

Arms, for each reward and seed, on the same prompts, noise seeds and settings:
- adascope: the interval of each prompt;
- every_step: all of them;
- random_fraction: as many steps as AdaScope trained in the same run, drawn at random for each picture;
- complement: the steps that AdaScope would leave out. If the interval is what matters, this arm loses;
- late_steps (not by default): from 65 to 95 % of the way, where the picture is all but finished.
Each --variant is one more arm: AdaScope with other settings.

Each run is a process with --threads threads (1); the table's seconds are its CPU seconds in training, so what else runs
on the machine matters little. A finished run in --work is not repeated; one that was made with other settings is
refused. Writes JSON with the machine, versions and date, a plot, and a table.
"""

import argparse
import datetime
import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, cycle, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from adascope_fast.config import Config

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
sys.path.insert(0, str(CHECKOUT))  # a script finds what lies beside it, and no more
from experiments import runs  # noqa: E402

REWARDS = ("scene_attributes", "jpeg_compressibility")
ARMS = ("adascope", "every_step", "random_fraction", "complement")
COLOURS = ("#d64541", "#4a86e8", "#2aa583", "#9298a1", "#e08e3c", "#a06cd5", "#1fa8a0", "#c2a100", "#c2649a", "#6b9e3a")
INK = "#808080"  # legible on white and on black: the pages decide what is behind
SENSED = {"structure": "#2aa583", "volatility": "#2aa583", "preference": "#4a86e8"}
LATE = (0.65, 0.95)


def main() -> None:
    """Run what is missing, then write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CHECKOUT / "configs" / "quickstart.toml")
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=[*ARMS, "late_steps"])
    parser.add_argument("--variant", nargs="+", action="append", default=[], metavar=("NAME", "section.field=value"))
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--every", type=int, default=4, help="iterations from one evaluation to the next")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.field=value", help="changes to every run")
    parser.add_argument("--redraw", type=Path, metavar="FILE.json", help="only draw the plot of such a file again")
    parser.add_argument("--work", type=Path, default=CHECKOUT / "runs" / "adascope")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "adascope.json")
    chosen = parser.parse_args()
    if chosen.redraw is not None:
        plot(json.loads(chosen.redraw.read_text())["runs"], chosen.redraw.with_suffix(".png"))
        print(chosen.redraw.with_suffix(".png"))
        return
    chosen.config, chosen.work = chosen.config.resolve(), chosen.work.resolve()
    if "random_fraction" in chosen.arms and "adascope" not in chosen.arms:
        parser.error("random_fraction trains as many steps as adascope, which --arms leaves out; add it")
    cases = list(product(chosen.rewards, chosen.seeds))
    try:
        check_found(cases, chosen)
        with ThreadPoolExecutor(chosen.jobs) as pool:
            rows = list(pool.map(lambda case: run_arms(*case, chosen), cases))
    except (ValueError, runs.RunFailedError) as error:
        sys.exit(f"error: {error}")
    summary = {reward: summarise([row for row in rows if row["reward"] == reward]) for reward in chosen.rewards}
    values = {
        "command": " ".join(["python experiments/interval/interval.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        **runs.provenance([chosen.work / run_name(*case, arm) for case in cases for arm in arms_of(chosen)]),
        "config": chosen.config.name,
        "iterations": chosen.iterations,
        "settings": chosen.set,
        "variants": chosen.variant,
        "runs": rows,
        "summary": summary,
    }
    chosen.out.parent.mkdir(exist_ok=True)
    chosen.out.write_text(json.dumps(values, indent=1) + "\n")
    plot(rows, chosen.out.with_suffix(".png"))
    print(table(summary))
    print(chosen.out)


def run_arms(reward: str, seed: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """The arms of one reward and seed, AdaScope first: its share of steps is that of the random ones."""
    arms: dict[str, Any] = {}
    for arm in arms_of(chosen):
        overrides = overrides_of(arm, chosen)
        if arm == "random_fraction":
            overrides.append(f"selector.fraction={arms['adascope']['fraction_chosen']:.4f}")
        arms[arm] = run(chosen.work / run_name(reward, seed, arm), reward, seed, overrides, chosen)
    return {"reward": reward, "seed": seed, "arms": arms}


def arms_of(chosen: argparse.Namespace) -> list[str]:
    """Names of all arms, the variants last."""
    return [*chosen.arms, *(variant for variant, *_ in chosen.variant)]


def run_name(reward: str, seed: int, arm: str) -> str:
    """The folder of a run within --work."""
    return f"{reward}-{seed}-{arm}"


def overrides_of(arm: str, chosen: argparse.Namespace) -> list[str]:
    """What sets an arm apart, but for the share of the random steps, which is AdaScope's."""
    variants = {variant: changes for variant, *changes in chosen.variant}
    if arm in variants:
        return ["selector.name=adascope", *variants[arm]]
    if arm == "late_steps":
        total = Config.load(chosen.config, chosen.set).sampler.num_steps
        first, last = (round(share * total) for share in LATE)
        return ["selector.name=static_range", f"selector.start={first}", f"selector.end={last}"]
    return [f"selector.name={arm}"]


def settings_of(folder: Path, reward: str, seed: int, overrides: list[str], chosen: argparse.Namespace) -> list[str]:
    """All that a run changes in the configuration."""
    return [
        f"run.folder={folder}",
        f"run.seed={seed}",
        f"reward.name={reward}",
        f"evaluation.every={chosen.every}",
        f"train.iterations={chosen.iterations}",
        "log.trackers=[]",
        *chosen.set,
        *overrides,
    ]


def run(folder: Path, reward: str, seed: int, overrides: list[str], chosen: argparse.Namespace) -> dict[str, Any]:
    """Train once, unless it was done before with the same settings, and return what the run folder says."""
    settings = settings_of(folder, reward, seed, overrides, chosen)
    runs.train(folder, chosen.config, settings, threads=chosen.threads)
    return read(folder)


def check_found(cases: list[tuple[str, int]], chosen: argparse.Namespace) -> None:
    """A ValueError for a mistake in the settings, or a finished run with others, before anything is trained."""
    known = [arm for arm in arms_of(chosen) if arm != "random_fraction"]  # its share of steps is AdaScope's to come
    for (reward, seed), arm in product(cases, known):
        folder = chosen.work / run_name(reward, seed, arm)
        wanted = Config.load(chosen.config, settings_of(folder, reward, seed, overrides_of(arm, chosen), chosen))
        if runs.is_finished(folder):
            runs.check_same(folder, wanted)


def read(folder: Path) -> dict[str, Any]:
    """Held-out reward against trained pairs and CPU seconds, and what else a finished run's folder says."""
    evaluation = json.loads((folder / "evaluation.json").read_text())
    stats = runs.stats_of(folder)
    facts = json.loads((folder / "run.json").read_text())
    intervals = [record["selector"] for record in stats if "mean_start" in record["selector"]]
    third = len(intervals) // 3
    return {
        "points": runs.history_of(folder),
        "difference": evaluation["difference"],
        "seconds": {part: sum(record["seconds"][part] for record in stats) for part in stats[0]["seconds"]},
        **{name: facts[name] for name in ("seconds_total", "peak_memory_mb")},
        **{name: [evaluation[when][name] for when in ("before", "after")] for name in ("diversity", "contrast")},
        # Pairs without advantage are chosen and not trained, by whatever selector.
        "fraction_chosen": mean(record["selector"]["fraction"] for record in stats),
        "fraction_trained": mean(record["fraction_trained"] for record in stats),
        "reward_in_training": [record["reward_mean"] for record in stats],
        "interval": _mean_interval(intervals),
        "interval_by_thirds": [_mean_interval(intervals[k * third : (k + 1) * third]) for k in range(3)],
        "curves": intervals[0].get("curves") if intervals else None,
        "reasons": dict(sum((Counter(one.get("reasons", {})) for one in intervals), Counter())),
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the seeds of one reward: gain, fall, cost, diversity of every arm; the spread of AdaScope's interval."""
    arms = {}
    for arm in rows[0]["arms"]:
        runs = [row["arms"][arm] for row in rows]
        ends = [one["points"][-1] for one in runs]
        arms[arm] = {
            "gain": _spread([one["difference"]["mean"] for one in runs]),
            "fall": _spread([_fall([point["reward"] for point in one["points"]]) for one in runs]),
            "pairs": mean(end["pairs"] for end in ends),
            "cpu_seconds": mean(end["cpu_seconds"] for end in ends),
            "diversity": [mean(one["diversity"][when] for one in runs) for when in (0, 1)],
            "contrast": [mean(one["contrast"][when] for one in runs) for when in (0, 1)],
        }
    intervals = [row["arms"]["adascope"]["interval"] for row in rows if "adascope" in row["arms"]]
    found = {name: _spread([one[k] for one in intervals]) for k, name in enumerate(("start", "end")) if intervals}
    return {"arms": arms, **found}


def table(summary: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| reward | arm | gain, mean and range over seeds | largest fall | pairs | CPU s | diversity | contrast |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for reward, values in summary.items():
        for arm, one in values["arms"].items():
            change = [f"{one[name][0]:.3f} to {one[name][1]:.3f}" for name in ("diversity", "contrast")]
            gain = f"{one['gain']['mean']:+.3f} ({one['gain']['low']:+.3f} to {one['gain']['high']:+.3f})"
            costs = (f"{one['fall']['high']:.3f}", f"{one['pairs']:.0f}", f"{one['cpu_seconds']:.0f}")
            cells = (reward, arm, gain, *costs, *change)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Gain against trained pairs and against CPU seconds, and the sensed curves; a line a seed, nothing behind them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rewards = list(dict.fromkeys(row["reward"] for row in rows))
    figure, axes = pyplot.subplots(
        len(rewards), 3, figsize=(13, 3.6 * len(rewards) + 0.5), squeeze=False, layout="constrained"
    )
    for (by_pairs, by_seconds, sensed), reward in zip(axes, rewards, strict=True):
        for row in (row for row in rows if row["reward"] == reward):
            for (arm, one), colour in zip(row["arms"].items(), cycle(COLOURS), strict=False):
                gains = [point["reward"] - one["points"][0]["reward"] for point in one["points"]]
                for axis, key in ((by_pairs, "pairs"), (by_seconds, "cpu_seconds")):
                    axis.plot([p[key] for p in one["points"]], gains, color=colour, label=arm, alpha=0.8)
            if "adascope" in row["arms"]:
                _sensed(sensed, row["arms"]["adascope"])
        by_pairs.set(title=reward, xlabel="(picture, step) pairs trained", ylabel="gain of the held-out reward")
        by_seconds.set(title=reward, xlabel="CPU seconds of training", ylabel="gain of the held-out reward")
        sensed.set(title=f"{reward}: sensed at first", xlabel="denoising step", ylabel="structure, preference")
        if curves := _named(sensed):
            sensed.legend(curves.values(), curves, frameon=False, fontsize=8, labelcolor=INK)
    for axis in axes.flat:
        axis.tick_params(colors=INK)
        for part in (axis.title, axis.xaxis.label, axis.yaxis.label, *axis.spines.values()):
            part.set_color(INK)
    arms = _named(axes[0, 0])
    figure.legend(
        arms.values(),
        arms,
        title="one line for each seed",
        loc="outside lower center",
        ncols=5,
        frameon=False,
        labelcolor=INK,
    ).get_title().set_color(INK)
    figure.savefig(path, dpi=90, transparent=True)
    pyplot.close(figure)


def _named(axis: Any) -> dict[str, Any]:
    """What is drawn, by its name, each name once."""
    handles, labels = axis.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def _sensed(axis: Any, one: dict[str, Any]) -> None:
    for name, values in (one["curves"] or {}).items():
        known = [(x, value) for x, value in enumerate(values) if value is not None]
        axis.plot(*zip(*known, strict=True), color=SENSED.get(name, INK), label=name)
    axis.axvspan(*one["interval"], color=COLOURS[0], alpha=0.1, lw=0, label="mean interval")


def _mean_interval(intervals: list[dict[str, Any]]) -> list[float] | None:
    return [mean(one[key] for one in intervals) for key in ("mean_start", "mean_end")] if intervals else None


def _fall(rewards: list[float]) -> float:
    """How far the reward fell from the best it had been: 0 for a run that never swung back."""
    return max(best - now for best, now in zip(accumulate(rewards, max), rewards, strict=True))


def _spread(values: list[float]) -> dict[str, float]:
    spread = stdev(values) if len(values) > 1 else 0.0
    return {"mean": mean(values), "std": spread, "low": min(values), "high": max(values)}


if __name__ == "__main__":
    main()
