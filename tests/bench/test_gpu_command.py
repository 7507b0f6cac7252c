"""`make gpu`: what it does in which order, within which time, and what it says of what it did not reach.

With stand-ins for the GPU and for the parts; only the way in which a part is stopped is tried on a real process.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
REPORT = '<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>'


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = spec_from_file_location("bench_gpu", BENCH / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    return module


class Parts:
    """Stands in for `run`: each part writes what it would, takes so long, and ends with its code."""

    def __init__(self, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, **codes: int) -> None:
        self.codes, self.seconds, self.now = codes, dict.fromkeys(codes, 0.0), time.monotonic()
        self.begun: list[tuple[str, float]] = []
        self.reached: dict[str, list[dict[str, str]]] = {}
        monkeypatch.setattr(gpu, "run", self)
        monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: self.now))

    def __call__(self, command: list[str], seconds: float) -> int:
        name = next((word[6:-3] for word in command if word.startswith("bench/")), "tests")
        self.begun.append((name, seconds))
        self.now += min(self.seconds.get(name, 1.0), seconds)
        code = self.codes.get(name, 0)
        if name == "tests":  # pytest writes its report when it is stopped too
            Path(command[-1].partition("=")[2]).write_text(REPORT)
        elif code == 0 or name in self.reached:
            Path(command[command.index("--out") + 1]).write_text(json.dumps({"models": self.reached.get(name, [])}))
        return code


def _parts(gpu: ModuleType) -> dict[str, dict[str, Any]]:
    written = json.loads((gpu.RESULTS / "gpu_h200.json").read_text())
    assert written["gpu"] == "NVIDIA H200"
    assert written["torch"] == torch.__version__
    return {one["name"]: one for one in written["parts"]}


ORDER = ["tests", "kernels/run", "end_to_end", "drift", "published"]


def test_correctness_then_goals_then_end_to_end_then_models(gpu: ModuleType, monkeypatch, capsys) -> None:
    parts = Parts(gpu, monkeypatch)
    assert gpu.main() == 0
    assert [name for name, _ in parts.begun] == ORDER
    found = _parts(gpu)
    assert {one["results"] for one in found.values()} == {
        None, "kernels_h200.json", "end_to_end_h200.json", "drift_h200.json", "published_h200.json"
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "correctness: done, 5 passed, 2 failed, 2 skipped; 1 s" in printed
    assert "published models: done; 1 s; published_h200.json" in printed


def test_all_parts_at_their_limits_stay_within_nine_minutes(gpu: ModuleType, monkeypatch) -> None:
    parts = Parts(gpu, monkeypatch)
    parts.seconds = dict.fromkeys(ORDER, 1e9)
    began = parts.now
    gpu.main()
    assert [name for name, _ in parts.begun] == ORDER
    assert parts.now - began + gpu.CLEAN_S < 540
    limits = dict(parts.begun)
    assert limits["published"] >= gpu.MODELS_S
    assert limits["kernels/run"] > gpu.TABLE_S, "its own --seconds end it, not this limit"


def test_a_part_that_is_stopped_leaves_the_others_their_results(gpu: ModuleType, monkeypatch, capsys) -> None:
    parts = Parts(gpu, monkeypatch, end_to_end=124, tests=1)
    assert gpu.main() == 2
    assert [name for name, _ in parts.begun] == ORDER
    found = _parts(gpu)
    assert found["correctness"]["said"].startswith("failed with exit code 1")
    assert found["end to end"]["said"].endswith("s, reached by then: nothing")
    assert found["end to end"]["results"] is None
    assert found["kernels"]["results"] == "kernels_h200.json"
    assert found["published models"]["results"] == "published_h200.json"
    assert "end to end: stopped after its" in capsys.readouterr().out
    parts.reached["end_to_end"] = [{"model": "scenes"}]
    assert gpu.main() == 2
    assert _parts(gpu)["end to end"]["said"].endswith("s, reached by then: scenes")
    assert _parts(gpu)["end to end"]["results"] == "end_to_end_h200.json"


def test_tests_that_did_not_end_leave_the_kernels_without_a_figure(gpu: ModuleType, monkeypatch) -> None:
    parts = Parts(gpu, monkeypatch, tests=124)
    assert gpu.main() == 2
    assert [name for name, _ in parts.begun] == ["tests", "end_to_end", "drift", "published"]
    assert _parts(gpu)["kernels"]["said"].startswith("not reached: the tests did not end")


def test_what_the_time_did_not_reach_is_said_and_counts(gpu: ModuleType, monkeypatch) -> None:
    parts = Parts(gpu, monkeypatch)
    monkeypatch.setattr(gpu, "TOTAL_S", 100)
    parts.seconds["kernels/run"] = 1e9
    assert gpu.main() == 3
    assert [name for name, _ in parts.begun] == ORDER[:2]
    for name in ("end to end", "drift", "published models"):
        assert _parts(gpu)[name]["said"] == "not reached: the time of all was over"


def test_what_lacks_a_package_is_said_and_does_not_count(gpu: ModuleType, monkeypatch) -> None:
    find: Callable[[str], Any] = lambda name: None  # noqa: E731
    monkeypatch.setattr(gpu.importlib.util, "find_spec", find)
    parts = Parts(gpu, monkeypatch)
    assert gpu.main() == 0
    assert [name for name, _ in parts.begun] == ORDER[:2]
    assert _parts(gpu)["end to end"]["said"] == "needs diffusers, which is not installed"


def test_without_a_gpu_nothing_is_run(gpu: ModuleType, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parts = Parts(gpu, monkeypatch)
    assert gpu.main() == 0
    assert parts.begun == []
    assert "no GPU is present" in capsys.readouterr().out


def test_a_part_is_stopped_with_all_that_it_started(gpu: ModuleType, tmp_path: Path) -> None:
    """It is given the time to tidy up; what it started ends with it."""
    child = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(120)"
    program = (
        "import pathlib, subprocess, sys, time\n"
        f"started = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(started.pid))\n"
        f"try:\n    time.sleep(120)\nfinally:\n    pathlib.Path({str(tmp_path / 'tidied')!r}).touch()"
    )
    began = time.monotonic()
    assert gpu.run([sys.executable, "-c", program], 4) == gpu.STOPPED
    assert time.monotonic() - began < 100
    assert (tmp_path / "tidied").exists()
    state = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    deadline = time.monotonic() + 20
    while is_running := (state.exists() and state.read_text().rpartition(")")[2].split()[0] not in "ZX"):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert not is_running
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 30) == 3
