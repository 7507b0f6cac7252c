"""CPU seconds until a command answers: user and system time of the process, and wall time, as medians.

    .venv/bin/python bench/startup.py --before ../earlier --out bench/results/startup.json

`--before` is a checkout of an earlier version, measured in turn with this one. A training is stopped at the first byte
that it writes to standard error. No hub is asked (HF_HUB_OFFLINE=1), and a process has one thread.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
QUICKSTART = ["train", "configs/quickstart.toml"]
OTHER = ["prompts.train=animals:train", "reward.name=jpeg_compressibility"]
COMMANDS = {
    "--help": ["--help"],
    "a mistyped key": [*QUICKSTART, "train.iteratons=3"],
    "a reward that is not there": [*QUICKSTART, "reward.name=nowhere:score"],
    "a missing prompt file": [*QUICKSTART, "prompts.train=none.txt", "prompts.held_out=none_either.txt"],
    "a folder that is no model": [*QUICKSTART, *OTHER, "model.name=EMPTY"],
    "a folder that is no run": ["sample", "EMPTY", "--prompt", "a cat"],
    "plan sd15": ["plan", "sd15"],
}
NO_PRESETS = {"plan sd15": ["plan", "configs/sd15.toml"]}
"""What is asked of a version that had no presets."""
IMPORT = "from adascope_fast import Trainer"
TRAINING = "train configs/quickstart.toml, until it says something"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="Checkout of an earlier version.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    checkouts = {"after": HERE} | ({} if arguments.before is None else {"before": arguments.before.resolve()})
    told: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "peft")},
        "commits": {label: _commit(checkout) for label, checkout in checkouts.items()},
        "rounds": arguments.rounds,
        "rows": [],
    }
    for name in [*COMMANDS, IMPORT, TRAINING]:
        found: dict[str, list[tuple[float, float, int]]] = {label: [] for label in checkouts}
        for _ in range(arguments.rounds):
            for label, checkout in checkouts.items():
                found[label].append(_measured(name, checkout))
        row: dict[str, Any] = {"command": name}
        for label, runs in found.items():
            cpu, wall, codes = zip(*runs, strict=True)
            row[label] = {
                "cpu_s": round(statistics.median(cpu), 2),
                "wall_s": round(statistics.median(wall), 2),
                "exit_code": codes[0],
            }
        print(json.dumps(row), flush=True)
        told["rows"].append(row)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(told, indent=1) + "\n")


def _measured(name: str, checkout: Path) -> tuple[float, float, int]:
    """CPU seconds, wall seconds and exit code of one process; the code is 0 where it was stopped."""
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty"
        empty.mkdir()
        cli = [sys.executable, "-m", "adascope_fast.cli"]
        if name == IMPORT:
            command = [sys.executable, "-c", IMPORT]
        elif name == TRAINING:
            command = [*cli, *QUICKSTART, f"run.folder={folder}/run"]
        else:
            has_presets = (checkout / "adascope_fast" / "assets" / "presets").is_dir()
            asked = COMMANDS[name] if has_presets else NO_PRESETS.get(name, COMMANDS[name])
            command = [*cli, *(part.replace("EMPTY", str(empty)) for part in asked)]
        environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0
        )
        assert process.stderr is not None
        if name == TRAINING:
            process.stderr.read(1)
            wall = time.perf_counter() - started
            process.kill()
        process.communicate()
        wall = wall if name == TRAINING else time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, wall, 0 if name == TRAINING else process.returncode


def _commit(checkout: Path) -> str:
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True)
    return told.stdout.strip()


if __name__ == "__main__":
    main()
