"""Held-out reward and time of the quickstart, AdaScope's interval against every step, over seeds.

    python bench/quickstart.py [--config CONFIG.toml] [--control CONFIG.toml] [--seeds 0 1 2] [--set KEY=VALUE ...]

Each run is a process of its own, one after the other, AdaScope and its control in turn. Writes JSON with the machine,
versions and date beside a table on standard output.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent


def run(config: Path, seed: int, folder: Path, overrides: list[str]) -> dict:
    """Train once and return what the run folder says of it."""
    arguments = ["train", str(config), f"run.folder={folder}", f"run.seed={seed}", *overrides]
    subprocess.run([sys.executable, "-m", "adascope_fast.cli", *arguments], check=True, stdout=subprocess.DEVNULL)
    return read(config, seed, folder)


def read(config: Path, seed: int, folder: Path) -> dict:
    """What a finished run's folder says of it."""
    evaluation = json.loads((folder / "evaluation.json").read_text())
    facts = json.loads((folder / "run.json").read_text())
    stats = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    seconds: dict[str, float] = {}
    for record in stats:
        for part, value in record["seconds"].items():
            seconds[part] = round(seconds.get(part, 0.0) + value, 1)
    pairs = sum(record["pairs_trained"] for record in stats)
    intervals = [record["selector"] for record in stats if "mean_start" in record["selector"]]
    return {
        "config": config.name,
        "seed": seed,
        "iterations": len(stats),
        "before": evaluation["before"]["mean"],
        "after": evaluation["after"]["mean"],
        "difference": evaluation["difference"],
        "fraction_trained": sum(record["fraction_trained"] for record in stats) / len(stats),
        "pairs_trained": pairs,
        "mean_interval": [sum(one[key] for one in intervals) / len(intervals) for key in ("mean_start", "mean_end")]
        if intervals
        else None,
        "seconds": seconds,
        "seconds_training": round(sum(seconds.values()), 1),
        "seconds_total": facts["seconds_total"],
        "peak_memory_mb": facts["peak_memory_mb"],
        "device": facts["device"],
        "commit": facts["commit"],
    }


def main() -> None:
    """Run the comparison and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE.parent / "configs" / "quickstart.toml")
    parser.add_argument("--control", type=Path, default=HERE.parent / "configs" / "quickstart_every_step.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quickstart.json")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.field=value", help="changes to both")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for seed in chosen.seeds:
            for config in (chosen.config, chosen.control):
                rows.append(run(config, seed, Path(work) / f"{config.stem}-{seed}", chosen.set))
                print_row(rows[-1])
                write(rows, chosen.out)
    print(chosen.out)


def write(rows: list[dict], path: Path) -> None:
    """Write what has been measured so far, with the machine, versions and date."""
    result = {
        "command": "python bench/quickstart.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU used"
        if "CPU" in rows[0]["device"]
        else rows[0]["device"],
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
        "runs": rows,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def print_row(row: dict) -> None:
    """One line of the table."""
    gain = row["difference"]
    print(
        f"{row['config']:32} seed {row['seed']}  {row['before']:.3f} -> {row['after']:.3f}  "
        f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]  trained {row['fraction_trained']:.0%}  "
        f"{row['seconds_training']:.0f} s training, update {row['seconds']['update']:.0f} s, "
        f"{row['seconds_total']:.0f} s in all, {row['peak_memory_mb']} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()
