"""Everything that needs a GPU, in one command, the answers that matter most first; 9 minutes in all.

    python bench/gpu.py

In this order: the tests of correctness; the table of kernels, which begins with the rows that the goals are about;
the end-to-end comparison; how far rounding takes rollout and update apart; published models. The tests gate the table:
an operation whose tests fail gets no figure. Each part is stopped when its time is over, and writes its own JSON into
bench/results: kernels_<gpu>.json, end_to_end_<gpu>.json, drift_<gpu>.json, published_<gpu>.json. After each,
gpu_<gpu>.json says what became of them. The exit code is the number of parts that failed or were not reached.
"""

import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
CHECKOUT = HERE.parent
RESULTS = HERE / "results"
TOTAL_S, TEST_S, TABLE_S, DRIFT_S, MODELS_S = 520, 150, 150, 50, 90
TABLE_MARGIN_S = 40  # what the timing in progress, the plots and the start of Python may add
LEAST_S, CLEAN_S = 5, 10  # no part is begun with less; what one that is stopped may take to tidy up
STOPPED = 124


@dataclass
class Part:
    """What became of one part: its exit code is None if it was not begun."""

    name: str
    code: int | None = None
    seconds: float = 0.0
    said: str = ""
    results: str | None = None

    @property
    def is_failed(self) -> bool:
        """Whether it counts in the exit code: what lacks a package was not asked for."""
        return self.code != 0 and not self.said.startswith("needs ")


def run(command: list[str], seconds: float) -> int:
    """The exit code of a command; STOPPED if its time was over, and then it ends, with all that it started."""
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    print(f"\n> {' '.join(command)}", flush=True)
    process = subprocess.Popen(command, cwd=CHECKOUT, env=environment, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(CLEAN_S)
        return STOPPED
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def part(name: str, command: list[str], *, limit: float, ends: float, results: Path | None = None) -> Part:
    """Run a part within its time and what is left of all, and say what became of it."""
    limit = min(limit, ends - time.monotonic())
    if limit < LEAST_S:
        return Part(name, said="not reached: the time of all was over")
    began, written_before = time.monotonic(), _written(results)
    code = run([sys.executable, *command], limit)
    said = {0: "done", STOPPED: f"stopped after its {limit:.0f} s"}.get(code, f"failed with exit code {code}")
    is_new = results is not None and _written(results) != written_before
    if code == STOPPED and results is not None:
        models = json.loads(results.read_text()).get("models", []) if is_new else []
        said += f", reached by then: {', '.join(one['model'] for one in models) or 'nothing'}"
    return Part(name, code, round(time.monotonic() - began, 1), said, results.name if results and is_new else None)


def _written(results: Path | None) -> int | None:
    return results.stat().st_mtime_ns if results is not None and results.exists() else None


def main() -> int:
    """The number of parts that failed or were not reached; 0 without a GPU, said plainly."""
    import torch

    if not torch.cuda.is_available():
        print("no GPU is present: the GPU tests were not run and nothing was measured")
        return 0
    began, name = time.monotonic(), torch.cuda.get_device_name()
    ends = began + TOTAL_S
    gpu = re.sub(r"\W+", "_", name.lower().removeprefix("nvidia "))
    tables, end_to_end, drift, models = (
        RESULTS / f"{what}_{gpu}.json" for what in ("kernels", "end_to_end", "drift", "published")
    )
    about = {"gpu": name, "date": datetime.date.today().isoformat(), "torch": str(torch.__version__)}
    parts: list[Part] = []

    def add(one: Part) -> None:
        parts.append(one)
        print(f"{one.name}: {one.said}, {one.seconds:.0f} s", flush=True)
        written = about | {"seconds": round(time.monotonic() - began, 1), "parts": [asdict(one) for one in parts]}
        (RESULTS / f"gpu_{gpu}.json").write_text(json.dumps(written, indent=1) + "\n")

    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        tests = ["-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", "-m", "gpu", "tests/test_gpu.py"]
        one = part("correctness", [*tests, f"--junitxml={report}"], limit=TEST_S, ends=ends)
        one.said += counted(report)
        add(one)
        command = ["bench/kernels/run.py", "--device", "cuda", "--seconds", str(TABLE_S), "--tested", str(report)]
        if one.code != STOPPED and report.exists():
            limit = TABLE_S + TABLE_MARGIN_S
            add(part("kernels", [*command, "--out", str(tables)], limit=limit, ends=ends, results=tables))
        else:
            add(Part("kernels", said="not reached: the tests did not end, so no figure would be worth anything"))
    if importlib.util.find_spec("diffusers") is None:
        for what in ("end to end", "drift", "published models"):
            add(Part(what, said="needs diffusers, which is not installed"))
    else:
        command = ["bench/end_to_end.py", "--device", "cuda", "--quick", "--out", str(end_to_end)]
        limit = ends - MODELS_S - DRIFT_S - time.monotonic()
        add(part("end to end", command, limit=limit, ends=ends, results=end_to_end))
        command = ["bench/drift.py", "--device", "cuda", "--seconds", str(DRIFT_S // 2), "--out", str(drift)]
        add(part("drift", command, limit=DRIFT_S, ends=ends, results=drift))
        command = ["bench/published.py", "--seconds", str(MODELS_S // 2), "--out", str(models)]
        add(part("published models", command, limit=TOTAL_S, ends=ends, results=models))
    print(f"\n{time.monotonic() - began:.0f} s in all")
    for one in parts:
        print(f"{one.name}: {one.said}; {one.seconds:.0f} s" + (f"; {one.results}" if one.results else ""))
    return sum(one.is_failed for one in parts)


def counted(report: Path) -> str:
    """How many tests passed, failed and were skipped, for the line of that part; nothing if they did not end."""
    if not report.exists():
        return ""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None, "pytest writes one suite"
    total, *others = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    return f", {total - sum(others)} passed, {others[0] + others[1]} failed, {others[2]} skipped"


if __name__ == "__main__":
    sys.exit(main())
