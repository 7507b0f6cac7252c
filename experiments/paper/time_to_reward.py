"""How many seconds of training to the same held-out reward? AdaScope against TRL, an eager loop, and every step.

    python experiments/paper/time_to_reward.py [--family scenes|flow] [--arms A ...] [--seeds 0 1 2 3 4] [--jobs J]
        [--seconds N] [--stages tune run] [--quick]

Every arm of `arms.py` is tuned on the same grid size and seconds, on captions that are neither trained on nor reported,
then trained on each seed until its CPU seconds are spent. All arms' kept weights are measured by `held_out.py`, on the
same captions and noise. CPU seconds are a process's own, one thread, of rollout, reward and update.

A run is a process; a finished one in --work is not repeated, one that a kill cut short is made again, measured points
are kept. A finished run with other settings, or of another model, is refused. What was measured stays as a file in
--records, and stands in for the run where --work is empty: so the hours may be of several sittings, if the machine
stayed as fast: a fixed computation before each run tells. Writes JSON with the command, dates, commits, machines and
versions, a plot, and a table.
"""

import argparse
import datetime
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
sys.path.insert(0, str(CHECKOUT))  # a script finds what lies beside it, and no more
from experiments import runs  # noqa: E402
from experiments.paper import figures, held_out, records  # noqa: E402
from experiments.paper.arms import FAMILIES, PEERS, Arm, Family, python_of  # noqa: E402

TUNING_CAPTIONS = CHECKOUT / runs.TUNING_CAPTIONS
NUM_CAPTIONS, NUM_TUNING, SAMPLES = 48, 32, 2
QUICK: dict[str, Any] = {
    "max_iterations": 2, "marks": 1, "num_steps": 6, "groups": 1, "group_size": 4, "min_count": 2,
}  # fmt: skip
QUICK_CAPTIONS, QUICK_GRID = 3, 2
LOADING = 8.0
"""CPU seconds to load a model and its libraries, about."""
ROW_SECONDS = 0.0031
"""CPU seconds of the denoiser on one row, about; for the estimate of what is left alone."""


@dataclass(frozen=True)
class Case:
    """A run: an arm with its settings, on a seed."""

    arm: Arm
    seed: int
    rate: float
    updates: int
    is_tuning: bool = False

    @property
    def name(self) -> str:
        """Its folder."""
        what = f"tune-{self.rate:g}-{self.updates}" if self.is_tuning else str(self.seed)
        return f"{self.arm.name}-{what}"


class Progress:
    """Says which run of how many is done, and about how long the rest takes."""

    def __init__(self, planned: dict[str, float], jobs: int) -> None:
        self._planned, self._jobs, self._lock = dict(planned), jobs, threading.Lock()
        self._count, self._number, self._started = len(planned), 0, time.perf_counter()
        self._all = sum(planned.values())

    def done(self, name: str, said: str) -> None:
        """A run is over."""
        with self._lock:
            self._number += 1
            self._planned.pop(name, None)
            elapsed = time.perf_counter() - self._started
            left = sum(self._planned.values())
            pace = elapsed / max(self._all - left, 1e-9)
            print(f"[{self._number}/{self._count}] {name}: {said}; about {left * pace:.0f} s left", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the figures; exit code 1 if a run failed, 2 for a mistake."""
    chosen = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        refuse_absent(chosen)
        prepare(chosen)
        failed = run_all(chosen)
        values = result(chosen)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    if values is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(values, indent=1) + "\n")
        shown = figures.table(values)
        chosen.out.with_suffix(".md").write_text(shown)
        figures.plot(values, chosen.out.with_suffix(".png"))
        print(f"\n{shown}\n{chosen.out}")
    sys.exit(1 if failed else 0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the defaults that depend on each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(FAMILIES), default="scenes")
    parser.add_argument("--arms", nargs="+", metavar="A", help="default: all of the family; --quick leaves TRL out")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--stages", nargs="*", choices=("tune", "run"), default=["tune", "run"])
    parser.add_argument("--seconds", type=float, help="CPU seconds of training of a run; default: 120, flow 90")
    parser.add_argument("--tuning-seconds", type=float, help="the same of the tuning; default: half")
    parser.add_argument("--marks", type=int, default=12, help="points of a run at which it is measured")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="everything as small as it can be: it learns nothing")
    parser.add_argument("--trl-python", type=Path, default=CHECKOUT / ".venv-trl" / "bin" / "python")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--records", type=Path, help="default: results/records beside this script; --quick keeps none")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    family = chosen.family = FAMILIES[chosen.family]
    known = {arm.name: arm for arm in family.arms}
    if unknown := sorted(set(chosen.arms or ()) - known.keys()):
        parser.error(f"arms of {family.name} are {', '.join(known)}, got {', '.join(unknown)}; name one of these")
    names = chosen.arms or [name for name, arm in known.items() if not (chosen.quick and arm.is_trl)]
    chosen.arms = [known[name] for name in dict.fromkeys(names)]
    chosen.seeds = chosen.seeds or ([0] if chosen.quick else [0, 1, 2, 3, 4])
    chosen.seconds = family.seconds if chosen.seconds is None else chosen.seconds
    chosen.tuning_seconds = chosen.seconds / 2 if chosen.tuning_seconds is None else chosen.tuning_seconds
    name = "time_to_reward" if family.name == "scenes" else f"time_to_reward_{family.name}"
    name += "_quick" if chosen.quick else ""
    chosen.work = (chosen.work or CHECKOUT / "runs" / name).resolve()
    chosen.out = chosen.out or (chosen.work if chosen.quick else HERE / "results") / f"{name}.json"
    if chosen.records is None and not chosen.quick:
        chosen.records = HERE / "results" / "records" / family.name
    for what in ("seconds", "tuning_seconds", "marks", "jobs"):
        if getattr(chosen, what) <= 0:
            parser.error(f"--{what.replace('_', '-')} is above 0, got {getattr(chosen, what):g}; raise it")
    return chosen


def refuse_absent(chosen: argparse.Namespace) -> None:
    """ValueError where an arm's environment is not there."""
    if any(arm.is_trl for arm in chosen.arms) and not chosen.trl_python.exists():
        raise ValueError(
            f"the arm trl runs in TRL's environment, and {str(chosen.trl_python)!r} is not there; `make "
            f".venv-trl/.installed` makes it, --trl-python names another, --arms leaves the arm out"
        )


def prepare(chosen: argparse.Namespace) -> None:
    """The captions as files, and what all settings share."""
    from adascope_fast import prompts

    chosen.work.mkdir(parents=True, exist_ok=True)
    held, tuning = prompts.load("scenes:held_out"), TUNING_CAPTIONS.read_text().splitlines()
    number = QUICK_CAPTIONS if chosen.quick else NUM_CAPTIONS
    chosen.reported, chosen.tuned_on = chosen.work / "reported.txt", chosen.work / "tuning.txt"
    chosen.reported.write_text("".join(f"{text}\n" for text in held[:number]))
    chosen.tuned_on.write_text("".join(f"{text}\n" for text in (tuning[:QUICK_CAPTIONS] if chosen.quick else tuning)))
    chosen.prompts, chosen.other = prompts.load("scenes:train"), held[-1]
    chosen.digest = digest_of(chosen.family.folder)


def digest_of(folder: Path) -> str:
    """Of a model's weights: what was trained on another is not taken."""
    return digest(b"".join(file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))))


def digest(data: bytes) -> str:
    """The beginning of its SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def setting_of(case: Case, chosen: argparse.Namespace) -> dict[str, Any]:
    """All that a run is told, as `peers/loop.py` has it."""
    family: Family = chosen.family
    is_ours = case.arm.script == "ours.py"
    setting = {
        "out": str(chosen.work / case.name),
        "model": str(family.folder),
        "prompts": chosen.prompts,
        "other_prompt": chosen.other,
        "seed": case.seed,
        "seconds": chosen.tuning_seconds if case.is_tuning else chosen.seconds,
        "marks": max(1, chosen.marks // 2) if case.is_tuning else chosen.marks,
        "learning_rate": case.rate,
        "updates": case.updates,
        "num_steps": family.num_steps,
        "guidance_scale": family.guidance_scale,
        "changes": [f"model.name={family.model}", *case.arm.changes] if is_ours else [],
    }
    return setting | (QUICK if chosen.quick else {})


def tuning_cases(arm: Arm, chosen: argparse.Namespace) -> list[Case]:
    """A run for each point of an arm's grid."""
    grid = arm.grid[:QUICK_GRID] if chosen.quick else arm.grid
    return [Case(arm, runs.TUNING_SEED, rate, updates, is_tuning=True) for rate, updates in grid]


def tuned(arm: Arm, chosen: argparse.Namespace) -> tuple[list[dict[str, Any]], Case | None]:
    """What each point of the grid came to, and the one with the highest gain, mean over its points; None: not yet."""
    base = held_out.measured(chosen.work / "base", chosen.tuned_on)
    rows, cases = [], tuning_cases(arm, chosen)
    for case in cases:
        points = held_out.measured(chosen.work / case.name, chosen.tuned_on) if is_finished(case, chosen) else None
        if points is None or base is None:
            return rows, None
        start = figures.mean_of(base[0]["scores"])
        gains = [figures.mean_of(point["scores"]) - start for point in points]
        rows.append(
            {
                "learning_rate": case.rate,
                "updates": case.updates,
                "gain": sum(gains) / len(gains),
                "last_gain": gains[-1],
                "iterations": points[-1]["iteration"],
            }
        )
    best = max(range(len(rows)), key=lambda k: rows[k]["gain"])
    return rows, cases[best]


def reported_cases(chosen: argparse.Namespace) -> list[Case]:
    """The runs of the arms that are tuned, seed by seed: what is stopped early has every arm of some."""
    best = {arm.name: tuned(arm, chosen)[1] for arm in chosen.arms}
    return [
        Case(arm, seed, found.rate, found.updates)
        for seed in chosen.seeds
        for arm in chosen.arms
        if (found := best[arm.name]) is not None
    ]


def identity(case: Case, chosen: argparse.Namespace) -> dict[str, Any]:
    """What a run was told, without places, and digests of its model and captions: two that agree are the same run."""
    setting = setting_of(case, chosen)
    captions = chosen.tuned_on if case.is_tuning else chosen.reported
    del setting["out"], setting["model"]
    return setting | {
        "prompts": digest(json.dumps(setting["prompts"]).encode()),
        "captions": digest(captions.read_bytes()),
        "digest": chosen.digest,
    }


def is_finished(case: Case, chosen: argparse.Namespace) -> bool:
    """Whether a run is whole, be it brought back from its record; ValueError where it was made with other settings."""
    folder, asked = chosen.work / case.name, identity(case, chosen)
    if chosen.records is not None:
        records.bring_back(folder, record_of(case, chosen), asked)
    if not (folder / "finished.json").is_file():
        return False
    made = json.loads((folder / "setting.json").read_text())
    if differing := sorted(key for key in made.keys() | asked.keys() if made.get(key) != asked.get(key)):
        told = ", ".join(f"{key} = {made.get(key)!r:.60} (asked for: {asked.get(key)!r:.60})" for key in differing)
        raise ValueError(
            f"a finished run is taken as it is only if its settings are those asked for, and {folder} has {told}; "
            f"remove it, or give another --work"
        )
    return True


def record_of(case: Case, chosen: argparse.Namespace) -> Path:
    """The file that stays of a run."""
    return chosen.records / f"{case.name}.json"


def run_all(chosen: argparse.Namespace) -> dict[str, str]:
    """Train and measure what is missing; what failed, and why."""
    failed: dict[str, str] = {}
    if not chosen.stages:
        return failed
    wanted = [case for arm in chosen.arms for case in tuning_cases(arm, chosen)]
    for case in wanted:
        is_finished(case, chosen)  # a refusal comes before anything is trained
    planned = {case.name: cost_of(case, chosen) for case in wanted} if "tune" in chosen.stages else {}
    if "run" in chosen.stages:
        planned |= {f"{arm.name}-{seed}": cost_of(None, chosen) for seed in chosen.seeds for arm in chosen.arms}
    progress = Progress(planned, chosen.jobs)
    measure(chosen.work / "base", chosen.tuned_on, chosen)
    measure(chosen.work / "base", chosen.reported, chosen)
    if "tune" in chosen.stages:
        in_parallel(wanted, chosen.tuned_on, chosen, progress, failed)
    if "run" in chosen.stages:
        if untuned := [arm.name for arm in chosen.arms if tuned(arm, chosen)[1] is None and not failed]:
            raise ValueError(
                f"runs take the settings that were tuned, and {', '.join(untuned)} has none in {chosen.work}; add tune "
                f"to --stages"
            )
        in_parallel(reported_cases(chosen), chosen.reported, chosen, progress, failed)
    return failed


def cost_of(case: Case | None, chosen: argparse.Namespace) -> float:
    """CPU seconds of a run with its measurement, about; None: one that is reported."""
    is_tuning = case is not None and case.is_tuning
    if chosen.quick:
        return 1.0
    captions, marks = (NUM_TUNING, max(1, chosen.marks // 2)) if is_tuning else (NUM_CAPTIONS, chosen.marks)
    measuring = marks * captions * SAMPLES * chosen.family.num_steps * ROW_SECONDS
    return (chosen.tuning_seconds if is_tuning else chosen.seconds) + measuring + 2 * LOADING


def planned(chosen: argparse.Namespace) -> tuple[int, float]:
    """(runs, CPU seconds) of all that is asked for, about, as if nothing was finished."""
    tuning = [case for arm in chosen.arms for case in tuning_cases(arm, chosen)]
    number = len(chosen.seeds) * len(chosen.arms)
    return len(tuning) + number, sum(cost_of(case, chosen) for case in tuning) + number * cost_of(None, chosen)


def in_parallel(
    cases: Sequence[Case], captions: Path, chosen: argparse.Namespace, progress: Progress, failed: dict[str, str]
) -> None:
    """Train and measure each, `--jobs` at a time."""

    def attempt(case: Case) -> None:
        started, was_there = time.perf_counter(), is_finished(case, chosen)
        try:
            if not was_there:
                train(case, chosen)
            measure(chosen.work / case.name, captions, chosen)
            if chosen.records is not None:
                records.keep(chosen.work / case.name, record_of(case, chosen))
        except runs.RunFailedError as error:
            failed[case.name] = str(error)
            progress.done(case.name, f"failed, {error}")
            return
        taken = f"{time.perf_counter() - started:.0f} s"
        progress.done(case.name, "was there" if was_there else f"trained and measured in {taken}")

    with ThreadPoolExecutor(chosen.jobs) as pool:
        list(pool.map(attempt, cases))


def train(case: Case, chosen: argparse.Namespace) -> None:
    """One run, from its start: what a kill left is removed."""
    folder = chosen.work / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    asked = folder.with_name(f"{case.name}.json")
    asked.write_text(json.dumps(setting_of(case, chosen)))
    (folder / "setting.json").write_text(json.dumps(identity(case, chosen)))
    facts = {"commit": commit(), "machine": machine(), "date": today(), "pace": round(pace(), 4)}
    (folder / "made.json").write_text(json.dumps(facts))
    python = python_of(case.arm, chosen.trl_python)
    runs.call([python, str(PEERS / case.arm.script), str(asked)], folder.with_name(f"{case.name}.log"))


def measure(run: Path, captions: Path, chosen: argparse.Namespace) -> None:
    """Measure a run's points unless they are."""
    if held_out.measured(run, captions) is not None:
        return
    arguments = [chosen.family.name, str(run), "--captions", str(captions)]
    arguments += ["--samples", str(1 if chosen.quick else SAMPLES)]
    arguments += ["--num-steps", str(QUICK["num_steps"])] if chosen.quick else []
    log = run.with_name(f"{run.name}-{captions.stem}.log")
    runs.call([sys.executable, str(HERE / "held_out.py"), *arguments], log)


def result(chosen: argparse.Namespace) -> dict[str, Any] | None:
    """What the finished runs show; None where no arm has one. Arms of which a seed is missing are left out."""
    base = held_out.measured(chosen.work / "base", chosen.reported)
    measured: dict[str, list[Any]] = {}
    cases = reported_cases(chosen)
    for arm in chosen.arms:
        mine = [case for case in cases if case.arm is arm and is_finished(case, chosen)]
        points = [held_out.measured(chosen.work / case.name, chosen.reported) for case in mine]
        if points and len(points) == len(chosen.seeds) and all(one is not None for one in points):
            measured[arm.name] = points
    if base is None or not measured:
        return None
    made = [case for case in cases if case.arm.name in measured]
    facts = [json.loads((chosen.work / case.name / "made.json").read_text()) for case in made]
    versions = {
        case.arm.name: json.loads((chosen.work / case.name / "finished.json").read_text())["versions"] for case in made
    }
    return {
        "command": shlex.join(["python", "experiments/paper/time_to_reward.py", *sys.argv[1:]]),
        "date": sorted({fact["date"] for fact in facts}),
        "commit": sorted({fact["commit"] for fact in facts}),
        "machine": sorted({fact["machine"] for fact in facts}),
        "pace": {"fastest": min(fact["pace"] for fact in facts), "slowest": max(fact["pace"] for fact in facts)},
        "versions": versions,
        "family": chosen.family.name,
        "model_digest": chosen.digest,
        "seconds": chosen.seconds,
        "tuning_seconds": chosen.tuning_seconds,
        "seeds": chosen.seeds,
        "is_quick": chosen.quick,
        "tuning": {arm.name: tuned(arm, chosen)[0] for arm in chosen.arms},
        "settings": {
            case.arm.name: {"learning_rate": case.rate, "updates": case.updates, "label": case.arm.label}
            for case in made
        },
        **figures.of(measured, base[0]["scores"], chosen.family),
    }


def commit() -> str:
    """Of the checkout, `-dirty` where it has changes."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True).stdout.strip() or "unknown"


def machine() -> str:
    """The kind of processor and the number of cores."""
    import platform

    return f"{platform.machine()}, {os.cpu_count()} cores, CPU"


def pace() -> float:
    """CPU seconds of a fixed computation on one thread, the least of five: how fast the machine is just now.

    A rented machine of the same name was seen 1.6 times as fast on another day.
    """
    import numpy as np

    values, taken = np.linspace(0.0, 1.0, 1 << 20), []
    for _ in range(5):
        started = time.thread_time()
        for _ in range(4):
            np.sqrt(np.exp(np.sin(values))).sum()
        taken.append(time.thread_time() - started)
    return min(taken)


def today() -> str:
    """The date."""
    return datetime.date.today().isoformat()


if __name__ == "__main__":
    main()
