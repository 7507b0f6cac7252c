"""Time and traffic of each operation: eager PyTorch, `torch.compile` of it, and the kernels.

    python bench/kernels/run.py [--device cpu|cuda] [--seconds N] [--dtypes bfloat16 ...] [--out FILE] [--tested F.xml]

The tests come first; an operation whose tests fail gets no figure. Then pytest-benchmark runs `cases.py`; what
is left when the seconds are over is listed as not measured. Writes JSON with the machine, versions and date, a plot
beside it, and prints a markdown table.

On a GPU: microseconds of the host for one call, and of the device with a cold L2 cache; launches; bytes that the
kernels move, and their share of the bandwidth of a large copy measured here (for eager and compile: the share they
would have if they moved no more); peak memory; the largest error against float64. On a CPU only the reference's time,
and that of our operators with the launches left out: the host's share of a call, which says nothing of a GPU's speed.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
RESULTS = HERE.parent / "results"
GPU_TESTS = ["-m", "gpu", "tests/test_gpu.py"]
SHAPES = ["16x128x128", "4x64x64", "4x128x128", "16x64x64"]
CPU_NOTE = (
    "No GPU: `eager` is the reference on the CPU; `kernels, host only` is a call with the launches left out. "
    "Neither says anything about a GPU's speed. `torch.compile` is not measured here."
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


def measure(settings: dict[str, Any]) -> list[Row]:
    """Run the cases and return a row for each, with its figures or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        raw, report = Path(folder) / "raw.json", Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-o", "filterwarnings=default", "--tb=short"]
        command += ["-p", "no:cacheprovider", f"--benchmark-json={raw}", "--benchmark-quiet", f"--junitxml={report}"]
        environment = os.environ | {"KERNEL_BENCH": json.dumps(settings), "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, str(HERE / "cases.py")], cwd=CHECKOUT, env=environment, check=False)
        timed = json.loads(raw.read_text())["benchmarks"] if raw.exists() and raw.stat().st_size else []
        rows: list[Row] = [one["extra_info"] | {"host_us": round(one["stats"]["median"] * 1e6, 1)} for one in timed]
        for case in ElementTree.parse(report).iter("testcase"):
            for part in case:
                if part.tag in ("failure", "error", "skipped"):
                    name = re.sub(r"^.*\[|\]$", "", case.get("name", ""))
                    rows.append({"case": name, "note": f"not measured: {(part.get('message') or '').splitlines()[0]}"})
    return rows


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


def table(result: Row) -> str:
    """Markdown: one line for each operation, shape, rows and type, the providers side by side."""
    rows = [row for row in result["rows"] if "host_us" in row]
    has_gpu = result["gpu"] is not None
    on_gpu = {"device_us": "device us", "copy_share": "copy share", "peak_memory_mb": "peak MB"}
    columns = {"host_us": "host us", "launches": "launches"} | (on_gpu if has_gpu else {}) | {"error": "error"}
    lines = [
        f"| operation | timed | latents | rows | type | provider | {' | '.join(columns.values())} |",
        "|---" * (6 + len(columns)) + "|",
    ]
    for row in rows:
        head = [row["operation"], row["timed"], row["shape"], row["rows"], row["dtype"], row["provider"]]
        lines.append(f"| {' | '.join(map(str, head))} | {' | '.join(_shown(key, row.get(key)) for key in columns)} |")
    skipped = [f"- {row['case']}: {row['note']}" for row in result["rows"] if "note" in row]
    return "\n".join([*lines, "", *result["notes"], *skipped])


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "-"
    return format(value, {"copy_share": ".0%", "error": ".1e", "launches": "d"}.get(key, ".1f"))


def plot(result: Row, path: Path) -> None:
    """Time against rows, one panel for each operation and shape."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    key, label = ("device_us", "device, us, cold L2") if result["gpu"] else ("host_us", "host, us")
    rows = [row for row in result["rows"] if row.get(key) is not None and row["dtype"] == result["dtypes"][0]]
    shapes = sorted({row["shape"] for row in rows}, key=lambda shape: [int(part) for part in shape.split("x")])
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    figure, panels = plt.subplots(
        len(shapes), len(operations), figsize=(2.6 * len(operations), 2.6 * len(shapes) + 0.6), squeeze=False
    )
    for shape, line in zip(shapes, panels, strict=True):
        for operation, panel in zip(operations, line, strict=True):
            mine = [row for row in rows if (row["operation"], row["shape"]) == (operation, shape)]
            for provider in dict.fromkeys(row["provider"] for row in mine):
                points = sorted((row["rows"], row[key]) for row in mine if row["provider"] == provider)
                panel.plot(*zip(*points, strict=True), marker="o", label=provider)
            counts = sorted({row["rows"] for row in mine})
            panel.set(xscale="log", yscale="log")
            panel.set_title(f"{operation}\n{shape}", fontsize=8)
            panel.set_xticks(counts, map(str, counts))
            panel.set_xticks([], minor=True)
            panel.tick_params(labelsize=7, which="both")
    panels[0][0].legend(fontsize=7)
    figure.supxlabel("rows")
    figure.supylabel(label)
    where = result["gpu"] or f"{result['machine']}, no GPU"
    figure.suptitle(f"{where}, torch {result['versions']['torch']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Test, measure, write and print; 1 if a test failed or nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    parser.add_argument("--seconds", type=float, default=900, help="stop measuring after these, tests not counted")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], help="bfloat16, float16, float32")
    parser.add_argument("--out", type=Path, help="default: bench/results/kernels_<gpu or cpu>.json")
    parser.add_argument("--tested", type=Path, help="JUnit XML of the tests, run just before; they are not run again")
    chosen = parser.parse_args()
    import torch
    from operations import OPERATIONS

    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    is_gpu = device == "cuda"
    result = facts(device)
    name = re.sub(r"\W+", "_", (result["gpu"] or "cpu").lower().removeprefix("nvidia "))
    out = chosen.out or RESULTS / f"kernels_{name}.json"
    with tempfile.TemporaryDirectory() as folder:
        report = chosen.tested or Path(folder) / "tests.xml"
        if chosen.tested is None:
            run_tests(device, report)
        failed = failed_tests(report)
    all_names = [name for operation in OPERATIONS for name in operation.test_names]
    red = [operation.name for operation in OPERATIONS if is_red(operation.test_names, failed, all_names)]
    settings = {
        "device": device,
        "dtypes": chosen.dtypes,
        "shapes": SHAPES if is_gpu else SHAPES[1:2],
        "rows": [8, 64, 512, 1] if is_gpu else [1, 8],
        "rounds": 30 if is_gpu else 10,
        "providers": ["eager", "compile", "kernels"] if is_gpu else ["eager", "kernels"],
        "operations": [operation.name for operation in OPERATIONS if operation.name not in red],
        "deadline": time.time() + chosen.seconds,
    }
    result |= {"dtypes": chosen.dtypes, "failed_tests": failed, "copy_gb_per_s": copy_bandwidth() if is_gpu else None}
    result["notes"] = [] if is_gpu else [CPU_NOTE]
    result["notes"] += [f"{name}: no figures, its tests fail" for name in red]
    result["rows"] = measure(settings)
    for row in result["rows"]:
        if is_gpu and "device_us" in row:
            row["copy_share"] = row["bytes_moved"] / row["device_us"] / 1e3 / result["copy_gb_per_s"]
    measured = [row for row in result["rows"] if "host_us" in row]
    out.parent.mkdir(exist_ok=True)
    text = json.dumps(result)
    out.write_text(text.replace("}, {", "},\n{") + "\n")
    if measured:
        plot(result, out.with_suffix(".png"))
    print(table(result))
    print(out)
    return 1 if failed or not measured else 0


if __name__ == "__main__":
    sys.exit(main())
