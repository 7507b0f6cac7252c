"""Everything that needs a GPU, in one command: tests, the table of kernels, drift, published models, end to end.

    python bench/gpu.py

The tests come first and gate the table: an operation whose tests fail gets no figure. Writes
bench/results/kernels_<gpu>.json, drift_<gpu>.json, published_<gpu>.json and end_to_end_<gpu>.json. Stops each part when
its time is over; 9 minutes in all.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
CHECKOUT = HERE.parent
TEST_S, TABLE_S, DRIFT_S, MODELS_S, TOTAL_S = 150, 150, 60, 100, 530
TABLE_MARGIN_S = 30  # what the timing in progress, the plot and the start of Python may add


def run(command: list[str], seconds: float) -> int:
    """The exit code of a part; 124 if its time was over."""
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    print(f"\n> {' '.join(command)}", flush=True)
    try:
        return subprocess.run(command, cwd=CHECKOUT, env=environment, timeout=max(seconds, 1), check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s", flush=True)
        return 124


def main() -> int:
    """The number of parts that failed; 0 without a GPU, said plainly."""
    import torch

    if not torch.cuda.is_available():
        print("no GPU is present: the GPU tests were not run and nothing was measured")
        return 0
    started = time.monotonic()
    gpu = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower().removeprefix("nvidia "))
    python, results = sys.executable, HERE / "results"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        tests = ["-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", "-m", "gpu", "tests/test_gpu.py"]
        codes = [run([python, *tests, f"--junitxml={report}"], TEST_S)]
        if report.exists():
            arguments = ["--device", "cuda", "--seconds", str(TABLE_S), "--tested", str(report)]
            out = ["--out", str(results / f"kernels_{gpu}.json")]
            codes.append(run([python, "bench/kernels/run.py", *arguments, *out], TABLE_S + TABLE_MARGIN_S))
    if importlib.util.find_spec("diffusers") is None:
        print("\nmodels were not measured: that needs diffusers, which is not installed")
    else:
        out = ["--seconds", str(DRIFT_S // 2), "--out", str(results / f"drift_{gpu}.json")]
        codes.append(run([python, "bench/drift.py", "--device", "cuda", *out], DRIFT_S))
        out = ["--seconds", str(MODELS_S // 2), "--out", str(results / f"published_{gpu}.json")]
        codes.append(run([python, "bench/published.py", *out], MODELS_S))
        out = ["--quick", "--out", str(results / f"end_to_end_{gpu}.json")]
        left = TOTAL_S - (time.monotonic() - started)
        codes.append(run([python, "bench/end_to_end.py", "--device", "cuda", *out], left))
    print(f"\n{time.monotonic() - started:.0f} s, exit codes {codes}")
    return sum(code != 0 for code in codes)


if __name__ == "__main__":
    sys.exit(main())
