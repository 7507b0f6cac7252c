"""The paper's other experiments on the embedded models, one command each.

    python experiments/paper/run.py --list
    python experiments/paper/run.py NAME [--seeds 0 1 2] [--jobs J] [--quick]

Each is a file of `declared/`: arms that are trained alike but for what they say. A run is a process with one thread; a
finished one is not repeated, and experiments whose arms have the same settings share it. Writes JSON with the command,
date, commit, machine and versions, a plot, and a table.
"""

import argparse
import importlib
import json
import math
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
sys.path.insert(0, str(CHECKOUT))  # a script finds what lies beside it, and no more
from experiments import runs  # noqa: E402
from experiments.paper import showing, time_to_reward  # noqa: E402
from experiments.paper.arms import FAMILIES  # noqa: E402
from experiments.paper.declaring import (  # noqa: E402
    QUICK,
    Arm,
    Experiment,
    captions_file,
    cpu_seconds,
    interval_of,
    on,
    preferences_folder,
    scaled,
    settings_of,
    tuning_changes,
)

TUNED = (
    "Each arm has the best of {} learning rates, by a run of half the iterations on a seed of its own and captions "
    "that are neither trained on nor reported."
)
HEADLINE = "How much sooner is the same reward reached?"


def declared() -> dict[str, Experiment]:
    """All experiments by name, which is that of their file."""
    names = sorted(file.stem for file in (HERE / "declared").glob("*.py"))
    return {name: importlib.import_module(f"experiments.paper.declared.{name}").EXPERIMENT for name in names}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the figures; exit code 1 if a run failed, 2 for a mistake."""
    known = declared()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="an experiment of --list")
    parser.add_argument("--list", action="store_true", help="what there is, and about how long each takes")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--arms", nargs="+", metavar="A", help="some of them, with those that they are compared with")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="everything as small as it can be: it learns nothing")
    parser.add_argument("--redraw", action="store_true", help="the table and the curves again, from the figures alone")
    parser.add_argument("--config", type=Path, help="of your own, in place of the embedded model's")
    parser.add_argument("--thresholds", type=float, nargs=2, metavar=("KAPPA", "PHI_END"), help="that suit --config")
    parser.add_argument(
        "--tuning", type=Path, help="with --config: captions to tune on, neither trained on nor held out"
    )
    parser.add_argument("--work", type=Path, default=CHECKOUT / "runs" / "paper")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.list:
        print(listed(known))
        return
    if chosen.name not in known:
        parser.error(f"an experiment is one of {', '.join(known)}, got {chosen.name}; --list says what they ask")
    if chosen.jobs < 1:
        parser.error(f"--jobs is above 0, got {chosen.jobs}; raise it")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    experiment = known[chosen.name]
    if chosen.config is not None:
        try:
            experiment = own(experiment, chosen)
        except ValueError as error:
            parser.error(str(error))
    elif chosen.thresholds or chosen.tuning:
        parser.error("--thresholds and --tuning are for a --config of your own, got none; name it")
    if unknown := sorted(set(chosen.arms or ()) - set(experiment.arms)):
        parser.error(f"arms of {chosen.name} are {', '.join(experiment.arms)}, got {', '.join(unknown)}; name these")
    chosen.seeds = chosen.seeds or ([0] if chosen.quick else list(experiment.seeds))
    chosen.work = chosen.work.resolve()
    place = chosen.work if chosen.quick else HERE / "results"
    chosen.out = chosen.out or place / f"{chosen.name}{'_quick' if chosen.quick else ''}.json"
    if chosen.redraw:
        if not chosen.out.is_file():
            parser.error(f"--redraw shows figures that there are, and {str(chosen.out)!r} is missing; leave it out")
        show(json.loads(chosen.out.read_text()), chosen.out)
        return
    chosen.arms = with_compared(experiment, chosen.arms or list(experiment.arms))
    failed, folders, tuning = train_all(experiment, chosen)
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    if folders:
        write(experiment, folders, tuning, chosen)
    sys.exit(1 if failed else 0)


def own(experiment: Experiment, chosen: argparse.Namespace) -> Experiment:
    """The experiment on `--config`; a ValueError where that is not all it takes."""
    if chosen.thresholds is None:
        raise ValueError(
            "AdaScope's thresholds are a model's own, got --config alone; give --thresholds KAPPA PHI_END as "
            "`adascope-fast calibrate` proposes them"
        )
    if chosen.out is None and not chosen.quick:
        raise ValueError("results/ is of the embedded models, got --config; name a file with --out")
    made = on(experiment, chosen.config, tuple(chosen.thresholds), chosen.tuning)
    if left_out := [name for name in experiment.arms if name not in made.arms]:
        print(f"left out, since they are of the embedded models alone: {', '.join(left_out)}", flush=True)
    return made


def listed(known: Mapping[str, Experiment]) -> str:
    """A line an experiment: what it asks, how many runs, CPU minutes."""
    rows = [
        (f"time_to_reward.py --family {family}", "Fig. 4, headline", *time_to_reward.planned(asked), HEADLINE)
        for family in FAMILIES
        for asked in [time_to_reward.parse(["--family", family])]
    ]
    for name, one in known.items():
        num_runs = len(one.arms) * (len(one.seeds) + len(one.rates))
        rows.append((f"run.py {name}", one.paper, num_runs, cpu_seconds(one), one.title))
    lines = [f"{'command':<34}{'in the paper':<20}{'runs':>5}{'CPU min':>9}  question"]
    lines += [f"{name:<34}{place:<20}{runs:>5}{cost / 60:>9.0f}  {title}" for name, place, runs, cost, title in rows]
    total = sum(row[3] for row in rows) / 3600
    return "\n".join(
        [*lines, f"{total:.1f} CPU hours in all, fewer where experiments share runs; half as long with --jobs 2"]
    )


def with_compared(experiment: Experiment, names: Sequence[str]) -> list[str]:
    """These arms and those that they need, in the experiment's order."""
    wanted, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            arm = experiment.arms[name]
            waiting += [one for one in (arm.against, arm.like) if one]
    return [name for name in experiment.arms if name in wanted]


class Runs:
    """Makes the runs of an experiment, unless they are there, and tells how far it is."""

    def __init__(self, total: int) -> None:
        self.failed: dict[str, str] = {}
        self._done, self._total = 0, total
        self._lock, self._started = threading.Lock(), time.perf_counter()

    def make(self, label: str, folder: Path, config: Path, settings: Sequence[str]) -> bool:
        """Train it; whether it is finished."""
        was_there = runs.is_finished(folder)
        try:
            runs.train(folder, config, settings)
        except runs.RunFailedError as error:
            self.failed[label] = str(error)
            return False
        with self._lock:
            self._done += 1
            left = (time.perf_counter() - self._started) / self._done * (self._total - self._done)
            said = "was there" if was_there else "trained"
            print(f"[{self._done}/{self._total}] {label}: {said}; about {left:.0f} s left", flush=True)
        return True


def train_all(
    experiment: Experiment, chosen: argparse.Namespace
) -> tuple[dict[str, str], dict[str, list[Path]], dict[str, list[dict[str, float]]]]:
    """Train what is missing, seed by seed.

    Returns:
        what failed and why; the run folders of the arms that have all seeds; what each rate of a tuned arm came to.
    """
    chosen.work.mkdir(parents=True, exist_ok=True)
    doing = Runs(len(chosen.arms) * (len(chosen.seeds) + len(experiment.rates)))
    for name in chosen.arms:
        write_captions(experiment.arms[name], chosen.work)
        try:
            make_preferences(experiment, name, chosen)
        except runs.RunFailedError as error:
            doing.failed[f"preferences of {name}"] = str(error)
    tuning = tune(experiment, chosen, doing) if experiment.rates else {}
    found: dict[tuple[str, int], Path] = {}

    def attempt(case: tuple[int, str]) -> None:
        seed, name = case
        arm = experiment.arms[name]
        interval = interval_of(found[arm.like, seed]) if arm.like is not None else {}
        changes = quick_of(experiment, name) if chosen.quick else []
        if experiment.rates:
            changes = [*changes, f"train.learning_rate={best_rate(tuning[name]):g}"]
        made = settings_of(experiment, name, seed, chosen.work, interval, changes=changes)
        if doing.make(f"{name}, seed {seed}", *made):
            found[name, seed] = made[0]

    ready = [name for name in chosen.arms if not experiment.rates or len(tuning[name]) == len(experiment.rates)]
    leading = [case for case in product(chosen.seeds, ready) if experiment.arms[case[1]].like is None]
    following = [case for case in product(chosen.seeds, ready) if experiment.arms[case[1]].like is not None]
    for cases in (leading, following):
        with ThreadPoolExecutor(chosen.jobs) as pool:
            list(pool.map(attempt, [case for case in cases if _can(experiment, case, found)]))
    whole = [name for name in chosen.arms if all((name, seed) in found for seed in chosen.seeds)]
    return doing.failed, {name: [found[name, seed] for seed in chosen.seeds] for name in whole}, tuning


def tune(experiment: Experiment, chosen: argparse.Namespace, doing: Runs) -> dict[str, list[dict[str, float]]]:
    """What each learning rate of an arm came to; those that failed are missing."""
    found: dict[tuple[str, float], float] = {}

    def attempt(case: tuple[str, float]) -> None:
        name, rate = case
        changes = tuning_changes(experiment, name, rate, quick_of(experiment, name) if chosen.quick else ())
        made = settings_of(experiment, name, runs.TUNING_SEED, chosen.work, changes=changes)
        if doing.make(f"tuning of {name} at {rate:g}", *made):
            first, *_, last = runs.history_of(made[0])
            found[case] = last["reward"] - first["reward"]

    with ThreadPoolExecutor(chosen.jobs) as pool:
        list(pool.map(attempt, product(chosen.arms, experiment.rates)))
    return {
        name: [{"rate": rate, "gain": found[name, rate]} for rate in experiment.rates if (name, rate) in found]
        for name in chosen.arms
    }


def best_rate(tuned: Sequence[Mapping[str, float]]) -> float:
    """The one with the highest gain; one without a number gained nothing."""
    return max(tuned, key=lambda one: one["gain"] if one["gain"] == one["gain"] else -math.inf)["rate"]


def _can(experiment: Experiment, case: tuple[int, str], found: Mapping[tuple[str, int], Path]) -> bool:
    like = experiment.arms[case[1]].like
    return like is None or (like, case[0]) in found


def make_preferences(experiment: Experiment, name: str, chosen: argparse.Namespace) -> None:
    """The set that an arm is trained on, if it is; sampled as the arm's rollouts would be."""
    arm = experiment.arms[name]
    if arm.preferences is not None:
        changes = quick_of(experiment, name) if chosen.quick else []
        folder = preferences_folder(chosen.work, arm, changes)
        num_pairs = runs.QUICK_PAIRS if chosen.quick else runs.NUM_PAIRS
        runs.make_preferences(folder, HERE / arm.config, [*experiment.common, *changes], num_pairs, arm.preferences)


def quick_of(experiment: Experiment, name: str) -> list[str]:
    """What makes an arm small, its ranges of steps cut to fit."""
    return [*QUICK, *scaled(experiment, name, 6)]


def write_captions(arm: Arm, work: Path) -> None:
    """The captions that match, for an arm that is trained on these or judged by these alone."""
    from adascope_fast import prompts

    for part, pattern in (arm.patterns() or {}).items():
        matching = [text for text in prompts.load(f"scenes:{part}") if re.search(pattern, text)]
        captions_file(work, part, pattern).write_text("".join(f"{text}\n" for text in matching))


def write(
    experiment: Experiment,
    folders: Mapping[str, Sequence[Path]],
    tuning: Mapping[str, Sequence[Mapping[str, float]]],
    chosen: argparse.Namespace,
) -> None:
    """JSON, plot and table of the arms that are whole."""
    values = {
        "command": shlex.join(["python", "experiments/paper/run.py", *sys.argv[1:]]),
        "date": time_to_reward.today(),
        **runs.provenance([folder for of_arm in folders.values() for folder in of_arm]),
        "title": experiment.title,
        "paper": experiment.paper,
        "seeds": chosen.seeds,
        "is_quick": chosen.quick,
        "gain": experiment.gain,
        "notes": [*experiment.notes, *([TUNED.format(len(experiment.rates))] if experiment.rates else [])],
        "tuning": {name: list(tuned) for name, tuned in tuning.items()},
        "arms": showing.arms_of(experiment, folders) if experiment.trains else {},
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    if experiment.drawing is not None:
        picture = chosen.out.with_name(f"{chosen.out.stem}_steps.png")
        values["drawn"] = experiment.drawing(folders, picture)
    if evaluated := [name for name in experiment.evaluated if name in folders]:
        values["evaluated"] = evaluate({name: folders[name][0] for name in evaluated}, chosen)
    chosen.out.write_text(json.dumps(values, indent=1) + "\n")
    show(values, chosen.out)


def show(values: Mapping[str, Any], out: Path) -> None:
    """Table and curves of what was measured, beside its file."""
    shown = showing.table(values)
    out.with_suffix(".md").write_text(shown)
    if values["arms"]:
        showing.plot(values, out.with_suffix(".png"))
    print(f"\n{shown}\n{out}")


def evaluate(folders: Mapping[str, Path], chosen: argparse.Namespace) -> list[str]:
    """The lines of `table.csv` of `adascope-fast evaluate`, by the embedded CLIP and on the runs' own prompts."""
    out = chosen.work / f"{chosen.out.stem}-evaluated"
    command = [
        sys.executable,
        "-m",
        "adascope_fast.cli",
        "evaluate",
        *(f"{name}={one}" for name, one in folders.items()),
    ]
    command += ["--out", str(out), "--overwrite"]
    command += ["--num-prompts", "4", "--num", "2"] if chosen.quick else ["--num", "4"]
    log = out.with_suffix(".log")
    runs.call(command, log)
    showing.images(out / "images", ["base", *folders], chosen.out.with_name(f"{chosen.out.stem}_images.png"))
    return (out / "table.csv").read_text().splitlines()


if __name__ == "__main__":
    main()
