"""Does each algorithm learn, from the steps that its paper trains and from AdaScope's interval?

    python experiments/algorithms/algorithms.py [--algorithms A ...] [--arms original adascope] [--seeds 0 1 2]
        [--stages tune run] [--rate R] [--jobs J] [--quick]

Every algorithm of `entries.py` is tuned, then trained in both arms on the same prompts, noise seeds and settings:
- tune: the learning rate, out of two, in the arm `original`, on a seed that is not reported, with half of the
  iterations; the one with the highest reward on captions of `tuning_captions.txt`, which are neither trained on nor
  reported. Both arms get it, so what favour there is goes to the original.
- run: three seeds an arm, judged before and after on the first held-out captions, on the same noise.

Each run is a process with one thread; a finished one in --work is not repeated, and one that was made with other
settings is refused. `--stages` without a stage trains nothing and shows what is finished. Writes JSON with the machine,
versions, date and the command of every run, and a table beside it.
"""

import argparse
import datetime
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

from scipy import stats

from adascope_fast.config import Config

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
sys.path.insert(0, str(CHECKOUT))  # a script finds what lies beside it, and no more
from experiments import runs  # noqa: E402
from experiments.algorithms.entries import ALGORITHMS, Entry  # noqa: E402
from experiments.runs import NUM_PAIRS, NUM_TUNING_CAPTIONS, QUICK_PAIRS, TUNING_CAPTIONS, TUNING_SEED  # noqa: E402

ARMS = ("original", "adascope")
STAGES = ("tune", "run")
NORMAL_95 = 1.959964


QUICK = (
    "sampler.num_steps=6", "train.iterations=2", "train.prompts_per_iteration=1", "train.samples_per_prompt=2",
    "evaluation.num_prompts=2",
)  # fmt: skip
QUICK_RATES = 2


@dataclass(frozen=True)
class Case:
    """A run: an algorithm, its steps, its learning rate and its seed."""

    entry: Entry
    arm: str
    seed: int
    rate: float
    is_tuning: bool = False
    is_tuned: bool = True
    """Whether its rate is the one that was tuned."""

    @property
    def name(self) -> str:
        """Its folder within --work."""
        last = f"tune-{self.rate:g}" if self.is_tuning else f"{self.arm}-{self.seed}"
        last += "" if self.is_tuned else f"-{self.rate:g}"
        return f"{self.entry.name}-{last}"

    @property
    def selector(self) -> tuple[str, ...]:
        """The steps of its arm."""
        return ("selector.name=adascope", *self.entry.base.adascope) if self.arm == "adascope" else self.entry.original

    @property
    def config(self) -> Path:
        """What it has in common with the others of its family."""
        return HERE / self.entry.base.config

    def settings(self, work: Path, *, is_quick: bool) -> list[str]:
        """All that it changes of it."""
        settings = [
            f"run.folder={work / self.name}",
            f"run.seed={self.seed}",
            f"algorithm.name={self.entry.name}",
            *self.entry.settings,
            *self.selector,
            f"train.learning_rate={self.rate:g}",
            *(QUICK if is_quick else ()),
        ]
        if self.entry.preferences is not None:
            settings.append(f"algorithm.preferences={preferences_of(self.entry, work)}")
        if self.is_tuning:
            iterations = Config.load(self.config, settings).train.iterations // 2
            settings += [f"train.iterations={iterations}", f"prompts.held_out={TUNING_CAPTIONS}"]
            settings += [] if is_quick else [f"evaluation.num_prompts={NUM_TUNING_CAPTIONS}"]
        return settings


def main() -> None:
    """Run what is missing, then write the figures; exit code 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS), metavar="A")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=STAGES)
    parser.add_argument("--rate", type=float, help="learning rate of the runs in place of the tuned one")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="everything as small as it can be: it learns nothing")
    parser.add_argument("--work", type=Path, default=CHECKOUT / "runs" / "algorithms")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "algorithms.json")
    chosen = parser.parse_args()
    chosen.work = chosen.work.resolve()
    try:
        failed = train_all(chosen)
        values = figures(chosen)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(values, indent=1) + "\n")
    shown = f"{table(values['rows'])}\n\n{commands(values['rows'])}\n"
    chosen.out.with_suffix(".md").write_text(shown)
    print(shown)
    print(chosen.out)
    sys.exit(1 if failed else 0)


def train_all(chosen: argparse.Namespace) -> dict[str, str]:
    """Train what is asked for and not finished; what failed, and why."""
    entries = [ALGORITHMS[name] for name in chosen.algorithms]
    check_found([*tuning_cases(entries, chosen), *cases(entries, chosen)], chosen)
    failed: dict[str, str] = {}
    if chosen.stages:
        in_parallel(lambda entry: make_preferences(entry, chosen), entries, chosen.jobs, failed)
        entries = [entry for entry in entries if entry.name not in failed]
    if "tune" in chosen.stages:
        in_parallel(lambda case: train(case, chosen), tuning_cases(entries, chosen), chosen.jobs, failed)
    if "run" in chosen.stages:
        untuned = [entry.name for entry in entries if chosen.rate is None and rate_of(entry, chosen) is None]
        if untuned and "tune" not in chosen.stages:
            raise ValueError(
                f"runs take the learning rate that was tuned, and {', '.join(untuned)} has none in {chosen.work}; "
                f"add tune to --stages"
            )
        wanted = cases(entries, chosen)
        check_found(wanted, chosen)
        in_parallel(lambda case: train(case, chosen), wanted, chosen.jobs, failed)
    return failed


Named = TypeVar("Named", Case, Entry)


def in_parallel(function: Callable[[Named], None], wanted: Sequence[Named], jobs: int, failed: dict[str, str]) -> None:
    """Call it with each of them, `jobs` at a time; note those that fail."""

    def attempt(one: Named) -> None:
        try:
            function(one)
        except runs.RunFailedError as error:
            failed[one.name] = str(error)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(attempt, wanted))


def tuning_cases(entries: Sequence[Entry], chosen: argparse.Namespace) -> list[Case]:
    """A run for each learning rate that an algorithm may get."""
    rates = QUICK_RATES if chosen.quick else None
    return [
        Case(entry, "original", TUNING_SEED, rate, is_tuning=True) for entry in entries for rate in entry.rates[:rates]
    ]


def cases(entries: Sequence[Entry], chosen: argparse.Namespace) -> list[Case]:
    """The runs of the algorithms that are tuned, seed by seed: what is stopped early has every arm of some."""
    known = [(entry, rate) for entry in entries if (rate := chosen.rate or rate_of(entry, chosen)) is not None]
    return [
        Case(entry, arm, seed, rate, is_tuned=chosen.rate is None)
        for entry, rate in known
        for seed, arm in product(chosen.seeds, chosen.arms)
    ]


def rate_of(entry: Entry, chosen: argparse.Namespace) -> float | None:
    """The learning rate with the highest tuning reward; None where a run of the tuning is not finished."""
    found = {case.rate: chosen.work / case.name for case in tuning_cases([entry], chosen)}
    if not all(runs.is_finished(folder) for folder in found.values()):
        return None
    return max(found, key=lambda rate: evaluation_of(found[rate])["after"]["mean"] or -math.inf)


def train(case: Case, chosen: argparse.Namespace) -> None:
    """Train once."""
    runs.train(chosen.work / case.name, case.config, case.settings(chosen.work, is_quick=chosen.quick))


def make_preferences(entry: Entry, chosen: argparse.Namespace) -> None:
    """The base model's images in pairs, for what is trained on them; the same for all runs of the algorithm."""
    if entry.preferences is None:
        return
    num_pairs, changes = (QUICK_PAIRS, QUICK) if chosen.quick else (NUM_PAIRS, ())
    folder = preferences_of(entry, chosen.work)
    runs.make_preferences(folder, HERE / entry.base.config, changes, num_pairs, entry.preferences)


def preferences_of(entry: Entry, work: Path) -> Path:
    """Where the preferences lie that an algorithm is trained on."""
    return work / f"{entry.name}-preferences"


def check_found(wanted: Sequence[Case], chosen: argparse.Namespace) -> None:
    """A ValueError for a mistake in the settings, or a finished run with others, before anything is trained."""
    for case in wanted:
        config = Config.load(case.config, case.settings(chosen.work, is_quick=chosen.quick))
        if runs.is_finished(chosen.work / case.name):
            runs.check_same(chosen.work / case.name, config)


def evaluation_of(folder: Path) -> dict[str, Any]:
    """The held-out scores of a run."""
    return json.loads((folder / "evaluation.json").read_text())


def figures(chosen: argparse.Namespace) -> dict[str, Any]:
    """What the finished runs show; arms of which a seed is missing are left out."""
    entries = [ALGORITHMS[name] for name in chosen.algorithms]
    tuning = [case for case in tuning_cases(entries, chosen) if runs.is_finished(chosen.work / case.name)]
    wanted = cases(entries, chosen)
    rows = []
    for name, arm in product(chosen.algorithms, chosen.arms):
        mine = [case for case in wanted if (case.entry.name, case.arm) == (name, arm)]
        if mine and all(runs.is_finished(chosen.work / case.name) for case in mine):
            rows.append(row_of(mine, chosen))
    made = [*tuning, *(case for case in wanted if runs.is_finished(chosen.work / case.name))]
    return {
        "command": shlex.join(["python", "experiments/algorithms/algorithms.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        **runs.provenance([chosen.work / case.name for case in made]),
        "rows": rows,
        "tuning": [tuned_of(case, chosen) for case in tuning],
    }


def tuned_of(case: Case, chosen: argparse.Namespace) -> dict[str, Any]:
    """What a learning rate came to."""
    found = evaluation_of(chosen.work / case.name)
    return {
        "algorithm": case.entry.name,
        "learning_rate": case.rate,
        "before": found["before"]["mean"],
        "after": found["after"]["mean"],
        "command": command_of(case, chosen),
    }


def row_of(mine: Sequence[Case], chosen: argparse.Namespace) -> dict[str, Any]:
    """An algorithm in one arm: every seed, and all of them together."""
    case, each = mine[0], [run_of(case, chosen) for case in mine]
    changes = [one.pop("changes") for one in each]
    return {
        "algorithm": case.entry.name,
        "arm": case.arm,
        "config": case.entry.base.config,
        "steps": steps_of(case),
        "learning_rate": case.rate,
        "gain": gain_of(changes),
        **{
            name: mean(one[name] for one in each)
            for name in ("before", "after", "cpu_seconds", "rows_trained", "forwards_sampled", "fraction_trained")
        },
        "diversity": [_mean([one["diversity"][when] for one in each]) for when in (0, 1)],
        "seeds": each,
    }


def steps_of(case: Case) -> str:
    """The selector of an arm, with its keys."""
    name, *keys = (item.removeprefix("selector.").removeprefix("name=").replace("=", " ") for item in case.selector)
    return f"{name} ({', '.join(keys)})" if keys else name


def run_of(case: Case, chosen: argparse.Namespace) -> dict[str, Any]:
    """One run: its held-out reward, what it cost, and the change of each caption."""
    folder = chosen.work / case.name
    found, stats_ = evaluation_of(folder), runs.stats_of(folder)
    return {
        "seed": case.seed,
        "before": found["before"]["mean"],
        "after": found["after"]["mean"],
        "gain": found["difference"],
        "changes": [
            _mean(now) - _mean(then)
            for then, now in zip(found["before"]["scores"], found["after"]["scores"], strict=True)
        ],
        "cpu_seconds": sum(record["cpu_seconds"] for record in stats_),
        "rows_trained": sum(record["pairs_trained"] for record in stats_),
        "forwards_sampled": sum(record["forwards_sampled"] for record in stats_),
        "fraction_trained": mean(record["fraction_trained"] for record in stats_),
        "reward_in_training": [record["reward_mean"] for record in stats_],
        **{name: [found[when][name] for when in ("before", "after")] for name in ("diversity", "contrast")},
        "command": command_of(case, chosen),
    }


def gain_of(changes: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean gain with its 95 % interval over seeds and captions, and whether that excludes 0.

    Its square is that of the interval over seeds (Student's, few as they are) and that of the one over captions
    (normal, of each caption's mean over seeds) added, since neither's variation shows in the other's. None: one seed.

    Args:
        changes: of each seed, the change of each caption.
    """
    by_seed = [mean(one) for one in changes]
    by_caption = [mean(one) for one in zip(*changes, strict=True)]
    if len(by_seed) < 2 or len(by_caption) < 2:
        return {"mean": mean(by_seed), "low": None, "high": None, "is_beyond_noise": None}
    of_seeds = float(stats.t.ppf(0.975, len(by_seed) - 1)) * stdev(by_seed) / len(by_seed) ** 0.5
    of_captions = NORMAL_95 * stdev(by_caption) / len(by_caption) ** 0.5
    low, high = (mean(by_seed) + sign * math.hypot(of_seeds, of_captions) for sign in (-1, 1))
    return {"mean": mean(by_seed), "low": low, "high": high, "is_beyond_noise": low > 0 or high < 0}


def _mean(values: Sequence[float | None]) -> float:
    """Of those that are there: an image that is not finite has no score, and one image no diversity; else NaN."""
    known = [value for value in values if value is not None]
    return mean(known) if known else math.nan


def command_of(case: Case, chosen: argparse.Namespace) -> str:
    """What trains it again, in a checkout."""
    settings = case.settings(Path("runs/algorithms"), is_quick=chosen.quick)
    return shlex.join(["adascope-fast", "train", str(case.config.relative_to(CHECKOUT)), *settings])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a line an algorithm and arm."""
    heads = (
        "algorithm", "steps trained", "rate", "held-out reward", "gain of each seed, 95 % over captions",
        "mean gain, 95 % over seeds and captions", "beyond noise", "CPU s", "rows trained", "forwards sampled",
        "share of steps", "diversity",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        gain = row["gain"]
        cells = (
            f"`{row['algorithm']}`",
            row["steps"] if row["arm"] == "original" else "**AdaScope**",
            f"{row['learning_rate']:g}",
            f"{row['before']:.3f} to {row['after']:.3f}",
            ", ".join(_with_interval(one["gain"]) for one in row["seeds"]),
            _with_interval(gain),
            {True: "yes", False: "no", None: "one seed"}[gain["is_beyond_noise"]],
            f"{row['cpu_seconds']:.1f}",
            f"{row['rows_trained']:,.0f}",
            f"{row['forwards_sampled']:,.0f}",
            f"{row['fraction_trained']:.0%}",
            " to ".join(f"{value:.3f}" for value in row["diversity"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_interval(gain: dict[str, Any]) -> str:
    if gain["low"] is None:
        return f"{gain['mean']:+.3f}"
    return f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"


def commands(rows: Sequence[dict[str, Any]]) -> str:
    """The command of every row, for its first seed; the others differ in `run.seed` and the folder."""
    return "\n\n".join(
        f"`{row['algorithm']}`, {row['arm']}, seeds {', '.join(str(one['seed']) for one in row['seeds'])}:\n\n"
        f"```\n{row['seeds'][0]['command']}\n```"
        for row in rows
    )


if __name__ == "__main__":
    main()
