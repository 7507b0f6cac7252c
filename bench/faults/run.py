"""Inject faults into real runs of the embedded model and say what came of each; exit code 1 if any was not withstood.

    python -m bench.faults.run [--seed 0] [--kills 40] [--damages 200] [--configurations 2000] [--out FILE]

Parts: SIGKILL, damaged files, rewards, values that are not finite, disk, signals, two writers, configurations; `--only`
names some of them. Everything goes through the command line. Writes JSON with the counts, machine, versions and date,
and prints the table of docs/faults.md. `--keep` leaves the folders of failed cases.
"""

import argparse
import datetime
import functools
import json
import multiprocessing
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.faults import checked, damage, disk, kills, not_finite, rewards, signals
from bench.faults.program import CHECKOUT, Program
from bench.faults.runs import (
    BAD,
    PROMPT,
    Row,
    Setting,
    differences,
    digest,
    short,
    train,
)

RESULTS = CHECKOUT / "bench" / "results" / "faults.json"
PARTS = ("kills", "damages", "rewards", "not_finite", "disk", "signals", "writers", "configurations")
QUICK = {"kills": 2, "damages": 8, "configurations": 50, "plans": 2, "disks": 1, "signals": 1, "rewards": 2}
Task = Callable[[], list[Row]]


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with the small counts of `--quick` where it is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=40, help="SIGKILLs")
    parser.add_argument("--damages", type=int, default=200, help="damaged files, each followed by a command")
    parser.add_argument("--configurations", type=int, default=2000, help="configurations that are read")
    parser.add_argument("--plans", type=int, default=50, help="of which through `plan`")
    parser.add_argument("--disks", type=int, default=10, help="sizes of a disk that fills")
    parser.add_argument("--signals", type=int, default=12, help="signals while the program is loading")
    parser.add_argument("--rewards", type=int, default=len(rewards.REWARDS), help="rewards that misbehave")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small counts, for a test")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at a time, a thread each")
    parser.add_argument("--program", help="a command line in place of `python -m adascope_fast.cli`")
    parser.add_argument("--longest", type=float, default=240.0, help="seconds after which a command hangs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to write")
    parser.add_argument("--keep", type=Path, help="folder to work in, which keeps what failed")
    if parser.parse_args(given).quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(given)


def prepare(program: Program, work: Path, seed: int) -> Setting:
    """The run left alone, in a fresh process and in a warm one, which must agree; ValueError where they do not."""
    setting = Setting(program, work, seed, {}, 0.0, 0.0)
    fresh_folder, warm_folder = setting.folder("reference", "fresh"), setting.folder("reference", "warm")
    fresh = program.run(train(), fresh_folder, fresh=True)
    if fresh.code != 0:
        raise ValueError(f"the run without a fault must succeed, got {short(fresh)}")
    program.warm(fresh_folder, ["sample", "run", "--prompt", PROMPT, "--num", "1"], ["plan", train()[1]])
    (fresh_folder / "run" / "samples" / "sample.png").unlink(missing_ok=True)
    warm = program.run(train(), warm_folder)
    one, other = digest(fresh_folder / "run"), digest(warm_folder / "run")
    if warm.code != 0 or differences(one, other):
        raise ValueError(
            f"a run must be the same twice, got {short(warm)} and differences in {', '.join(differences(one, other))}"
        )
    return Setting(program, work, seed, other, warm.seconds, fresh.seconds)


def tasks(options: argparse.Namespace, setting: Setting, facts: dict[str, Any]) -> list[Task]:
    """Every case of the chosen parts, long ones first."""
    found: list[Task] = []
    add, few = functools.partial, 1 if options.quick else None
    if "kills" in options.only:
        found += [add(kills.run_case, setting, case) for case in kills.cases(options.kills, options.seed)]
    if "signals" in options.only:
        found += [
            add(signals.while_loading, setting, *case) for case in signals.loading_cases(setting, options.signals)
        ]
        training = [(number, *how) for number in signals.SIGNALS for how in ((1, True), (0, False), (2, False))]
        found += [add(signals.while_training, setting, *one) for one in training[:few]]
    if "writers" in options.only:
        found += [add(signals.two_writers, setting, second, 1) for second in list(signals.WRITERS)[:few]]
    if "rewards" in options.only:
        found += [add(rewards.run_case, setting, name) for name in list(rewards.REWARDS)[: options.rewards]]
        found += [add(rewards.hang, setting, iteration) for iteration in (0, 2)[:few]]
    if "not_finite" in options.only:
        found += [add(not_finite.run_case, setting, case) for case in not_finite.CASES[:few]]
    if "disk" in options.only:
        used = facts["disk"] = disk.means(setting.work / "mounted")
        sizes = disk.cases(setting, setting.work / "reference" / "warm" / "run", used, options.disks)
        found += [add(disk.run_case, setting, used, size) for size in sizes]
        found += [add(disk.read_only, setting, one) for one in ("resume", "train", "report", "merge", "sample")[:few]]
    if "damages" in options.only:
        base = damage.base(setting, attempts=1 if options.quick else 2)
        found += [add(damage.run_case, setting, base, one) for one in damage.cases(base, options.damages, options.seed)]
    if "configurations" in options.only and options.configurations:
        whole = checked.configurations(options.seed, options.configurations)
        if not whole:
            found.append(no_configurations)
        size = 200
        found += [add(checked.load_all, setting, whole[at : at + size], at) for at in range(0, len(whole), size)]
        chosen = checked.sample(options.plans, options.seed, whole)
        found += [add(checked.plan, setting, index, *whole[index]) for index in chosen]
    return found


def no_configurations() -> list[Row]:
    return [Row("configuration", "read", "not run", "bench/faults/configurations.py is not there")]


def guarded(task: Task) -> list[Row]:
    """The rows of a case; an error of the harness is a failure of its own, not an end."""
    try:
        return task()
    except Exception as error:
        name = getattr(task, "func", task).__module__.rpartition(".")[2]
        given = " ".join(str(part) for part in getattr(task, "args", ())[1:] if isinstance(part, str | int | float))
        return [Row(name, "harness", "not run", f"{given}: {type(error).__name__}: {error}"[:400])]


def run_all(found: Sequence[Task], jobs: int) -> list[Row]:
    """Every case, `jobs` at a time in processes forked from this one; a failure is printed as it happens."""
    rows: list[Row] = []
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork"))
    with pool:
        futures = [pool.submit(guarded, task) for task in found]
        try:
            for done in as_completed(futures):
                new = done.result()
                rows += new
                for row in new:
                    if row.failed:
                        print(f"{row.outcome}: {row.area}, {row.fault}: {row.detail}", file=sys.stderr, flush=True)
        except BaseException:  # interrupted: the cases at work end now, with their disks unmounted
            for future in futures:
                future.cancel()
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return sorted(rows, key=lambda row: (AREAS.index(row.area) if row.area in AREAS else len(AREAS), row.fault))


AREAS = ("SIGKILL", "signal", "two writers", "damaged file", "disk", "reward", "not finite", "configuration")


def table(results: dict[str, Any]) -> str:
    """The markdown table of docs/faults.md."""
    lines = ["| fault | | times | outcome |", "|---|---|---|---|"]
    for row in results["table"]:
        outcomes = ", ".join(
            f"{'**' if name in BAD else ''}{name}{'**' if name in BAD else ''} {count}"
            for name, count in sorted(row["outcomes"].items())
        )
        lines.append(f"| {row['area']} | {row['fault']} | {row['times']} | {outcomes} |")
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows counted by area and fault."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        found.setdefault((row.area, row.fault), Counter())[row.outcome] += 1
    return [
        {"area": area, "fault": fault, "times": counts.total(), "outcomes": dict(sorted(counts.items()))}
        for (area, fault), counts in found.items()
    ]


def facts_of(options: argparse.Namespace) -> dict[str, Any]:
    """Where, when and with what."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(describe, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")
    return {
        "command": f"python -m bench.faults.run {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "seed": options.seed,
        "counts": {name: getattr(options, name) for name in QUICK},
        "parts": list(options.only),
    }


def main(given: Sequence[str] | None = None) -> int:
    """Run, write, print; 1 if a fault was not withstood."""
    options = arguments(given)
    start = time.perf_counter()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that folders are removed and disks unmounted
    facts = facts_of(options)
    with tempfile.TemporaryDirectory(prefix="faults") as temporary:
        work = (options.keep or Path(temporary)).resolve()
        program = Program(tuple(shlex.split(options.program or "")), options.longest)
        setting = prepare(program, work, options.seed)
        rows = run_all(tasks(options, setting, facts), options.jobs)
    failures = [vars(row) for row in rows if row.failed]
    results = facts | {"seconds": round(time.perf_counter() - start), "table": summary(rows), "failures": failures}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(f"{len(rows)} faults in {results['seconds']} s, {len(failures)} not withstood; {options.out}")
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
