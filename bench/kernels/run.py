"""Time and traffic of each operation: the kernels, `torch.compile` of the reference, eager PyTorch, and flow_grpo's.

    python bench/kernels/run.py [--device cpu|cuda] [--seconds N] [--out FILE] [--tested JUNIT.xml]
        [--ops NAME ...] [--shapes CxHxW ...] [--rows N ...] [--dtypes NAME ...] [--layouts NAME ...]
        [--providers NAME ...]

The tests come first; an operation whose tests fail gets no figure. Then pytest-benchmark runs `cases.py`, the rows that
the goals are about before all others; what is left when the seconds are over is listed as not measured. Writes JSON
with the machine, versions and date, plots beside it (time against rows; on a GPU bandwidth against traffic), and
prints a markdown table and a line for each goal.

On a GPU: microseconds of the device with a cold L2 cache, and of the host for one call; launches; GB/s, of the bytes
that the kernels move (`kernels/operations.py`; for the other providers: what they would reach if they moved no more),
and their share of the bandwidth of a large copy measured here; peak memory; the largest error against float64. On a CPU
only the time of plain PyTorch, and that of our operators with the launches left out: the host's share of a call, which
says nothing of a GPU's speed.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from figures import draw, goals, table
from plan import PROVIDERS, ROWS, SHAPES, Case, add_options, cases, liger_note
from timed import MIX, TIMED

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
RESULTS = HERE.parent / "results"
GPU_TESTS = ["-m", "gpu", "tests/test_gpu.py"]
GRACE_S = 20  # what the timing in progress may add
HOST_ONLY = "kernels, host only"
CPU_NOTE = (
    f"No GPU: `{HOST_ONLY}` is a call with the launches left out, the other providers compute on the CPU. "
    "Neither says anything about a GPU's speed."
)
Row = dict[str, Any]


def run_tests(device: str, report: Path) -> None:
    """Run the tests of the kernels, on the GPU or in Triton's interpreter, and write their outcome as JUnit XML."""
    tests = GPU_TESTS if device == "cuda" else ["-m", "not slow", "tests/kernels"]
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", f"--junitxml={report}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if device == "cuda" else {"TRITON_INTERPRET": "1"})
    subprocess.run([*command, *tests], cwd=CHECKOUT, env=environment, check=False)


def failed_tests(report: Path) -> list[str]:
    """Names of the tests that did not pass; a ValueError if none passed, since then nothing was tested."""
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    outcome = {f"{case.get('classname')}.{case.get('name')}": {part.tag for part in case} for case in cases}
    if not any(not tags & {"failure", "error", "skipped"} for tags in outcome.values()):
        raise ValueError(f"no test passed ({len(cases)} were found), so no figure would be worth anything")
    return [name for name, tags in outcome.items() if tags & {"failure", "error"}]


def is_red(test_names: Iterable[str], failed: list[str], all_names: Iterable[str]) -> bool:
    """Whether a failed test names the operation, or none at all and so may concern every one."""
    return any(
        any(name in test for name in test_names) or not any(name in test for name in all_names) for test in failed
    )


def measure(settings: Row) -> list[Row]:
    """Run the cases and return a row for each, with its figures or why there are none.

    The process that times them is stopped soon after the deadline; what it had measured by then counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        told, rows_file, report = (Path(folder) / name for name in ("settings.json", "rows.jsonl", "report.xml"))
        told.write_text(json.dumps(settings | {"rows_file": str(rows_file)}))
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-o", "filterwarnings=default", "--tb=short"]
        command += ["-p", "no:cacheprovider", "--benchmark-quiet", f"--junitxml={report}", str(HERE / "cases.py")]
        environment = os.environ | {"KERNEL_BENCH": str(told), "OMP_NUM_THREADS": "1"}
        seconds = max(settings["deadline"] - time.time(), 0) + GRACE_S
        reason = "its process ended before it"
        try:
            subprocess.run(command, cwd=CHECKOUT, env=environment, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            reason = "the time allowed had passed"
        lines = rows_file.read_text().splitlines() if rows_file.exists() else []
        measured = {Case(*(row[key] for key in Case._fields)): row for row in map(json.loads, lines)}
        notes = _notes(report)
    rows = [measured.get(case) or case._asdict() | {"note": notes.get(case.id, reason)} for case in settings["cases"]]
    for row in rows:
        if settings["device"] == "cpu" and row["provider"] == "kernels" and "note" not in row:
            row["provider"] = HOST_ONLY
    return rows


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _notes(report: Path) -> dict[str, str]:
    """Why each case that pytest reports on has no figures, by the case's id."""
    cases = ElementTree.parse(report).iter("testcase") if report.exists() else []
    return {
        re.sub(r"^.*?\[|\]$", "", case.get("name", "")): (part.get("message") or part.tag).splitlines()[0]
        for case in cases
        for part in case
        if part.tag in ("failure", "error", "skipped")
    }


def copy_bandwidth() -> float:
    """GB/s of copying 1 GiB on the device, bytes read and written."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda").random_(0, 100)
    target, times = torch.empty_like(source), []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.numel() / sorted(times)[len(times) // 2] / 1e6


def facts(device: str) -> Row:
    """Where and with what this was measured."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        "command": f"python bench/kernels/run.py {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "machine": cpu,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "load_average": os.getloadavg()[0],
        "versions": {
            "torch": str(torch.__version__),  # with its build
            "triton": version("triton"),
            "python": platform.python_version(),
        },
    }


def main() -> int:
    """Test, measure, write and print; 1 if a test failed or nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    parser.add_argument("--seconds", type=float, default=900, help="stop measuring after these, tests not counted")
    add_options(parser)
    parser.add_argument("--out", type=Path, help="default: bench/results/kernels_<gpu or cpu>.json")
    parser.add_argument("--tested", type=Path, help="JUnit XML of the tests, run just before; they are not run again")
    chosen = parser.parse_args()
    import torch

    is_gpu = torch.cuda.is_available() if chosen.device is None else chosen.device == "cuda"
    device = "cuda" if is_gpu else "cpu"
    if is_gpu and not torch.cuda.is_available():
        parser.error("argument --device: cuda needs a GPU that torch sees, and it sees none; leave it out")
    asked = {
        "operations": chosen.ops,
        "shapes": chosen.shapes or (SHAPES if is_gpu else SHAPES[1:2]),
        "rows": chosen.rows or (ROWS if is_gpu else (8, 1)),
        "dtypes": chosen.dtypes or ([MIX, "bfloat16"] if is_gpu else [MIX]),
        "layouts": chosen.layouts or ["contiguous"],
        "providers": chosen.providers or [name for name in PROVIDERS if is_gpu or name != "compile"],
    }
    if not cases(**asked):
        parser.error(f"flow_grpo has none of {', '.join(chosen.ops)}; add other --providers, such as eager")
    result = facts(device)
    name = re.sub(r"\W+", "_", (result["gpu"] or "cpu").lower().removeprefix("nvidia "))
    out = chosen.out or RESULTS / f"kernels_{name}.json"
    with tempfile.TemporaryDirectory() as folder:
        report = chosen.tested or Path(folder) / "tests.xml"
        if chosen.tested is None:
            run_tests(device, report)
        failed = failed_tests(report)
    all_names = [name for operation in TIMED for name in operation.test_names]
    red = [one.name for one in TIMED if one.name in chosen.ops and is_red(one.test_names, failed, all_names)]
    result |= {"asked": asked, "failed_tests": failed, "copy_gb_per_s": copy_bandwidth() if is_gpu else None}
    result["notes"] = [*([] if is_gpu else [CPU_NOTE]), liger_note(_version("liger_kernel"))]
    result["notes"] += [f"{name}: no figures, its tests fail" for name in red]
    settings = {
        "device": device,
        "rounds": 30 if is_gpu else 10,
        "cases": cases(**asked | {"operations": [name for name in chosen.ops if name not in red]}),
        "deadline": time.time() + chosen.seconds,
    }
    result["rows"] = measure(settings)
    for row in result["rows"]:
        if row.get("device_us") is not None:
            row["gb_per_s"] = row["bytes_moved"] / row["device_us"] / 1e3
            row["copy_share"] = row["gb_per_s"] / result["copy_gb_per_s"]
    result["goals"] = goals(result["rows"])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result).replace("}, {", "},\n{") + "\n")
    drawn = draw(result, out)
    print(table(result))
    print(*[out, *drawn], sep="\n")
    return 1 if failed or all("note" in row for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
