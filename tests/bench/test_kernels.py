"""The benchmark of the kernels: no figure without green tests, nothing left out in silence, and honest labels."""

import importlib.util
import json
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from adascope_fast import ops

BENCH = Path(__file__).parents[2] / "bench" / "kernels"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernels = _load("run")
operations = _load("operations").OPERATIONS
SETTINGS = {
    "device": "cpu",
    "dtypes": ["float32"],
    "shapes": ["2x3x5"],
    "rows": [2],
    "rounds": 2,
    "providers": ["eager", "kernels"],
    "operations": ["transition_step", "transition_policy_loss"],
}


def _write_report(path: Path, **outcomes: str) -> Path:
    cases = [f'<testcase classname="tests.test_gpu" name="{name}">{tag}</testcase>' for name, tag in outcomes.items()]
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return path


def test_failed_tests_are_found_and_a_run_without_a_passing_test_is_refused(tmp_path: Path) -> None:
    report = _write_report(tmp_path / "a.xml", good="", bad="<failure/>", broken="<error/>", left="<skipped/>")
    assert kernels.failed_tests(report) == ["tests.test_gpu.bad", "tests.test_gpu.broken"]
    for outcomes in ({}, {"left": "<skipped/>"}, {"bad": "<failure/>"}):
        with pytest.raises(ValueError, match="no test passed"):
            kernels.failed_tests(_write_report(tmp_path / "b.xml", **outcomes))
    with pytest.raises(ValueError, match=r"no test passed \(0 were found\)"):
        kernels.failed_tests(tmp_path / "missing.xml")


def test_a_failed_test_silences_its_operation_or_all_if_it_names_none() -> None:
    names = ("correlation",), ("kl",)
    every = [name for group in names for name in group]
    assert not kernels.is_red(names[0], [], every)
    assert kernels.is_red(names[0], ["test_gpu.test_value[correlation_update]"], every)
    assert not kernels.is_red(names[1], ["test_gpu.test_value[correlation_update]"], every)
    assert kernels.is_red(names[1], ["test_gpu.test_offsets"], every)


def test_red_operations_get_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    report = _write_report(tmp_path / "tests.xml", good="", **{operations[0].name: "<failure/>"})
    asked = {}
    monkeypatch.setattr(kernels, "measure", lambda settings: asked.update(settings) or [])
    monkeypatch.setattr(kernels.sys, "path", [str(BENCH), *kernels.sys.path])
    out = tmp_path / "out.json"
    monkeypatch.setattr(kernels.sys, "argv", ["run.py", "--device=cpu", f"--tested={report}", f"--out={out}"])
    assert kernels.main() == 1
    assert operations[0].name not in asked["operations"]
    assert "correlation" in asked["operations"]
    assert f"{operations[0].name}: no figures, its tests fail" in capsys.readouterr().out
    assert json.loads(out.read_text())["failed_tests"] == [f"tests.test_gpu.{operations[0].name}"]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_a_run_on_the_cpu_measures_the_reference_and_the_host_alone(tmp_path: Path) -> None:
    rows = kernels.measure(SETTINGS | {"deadline": time.time() + 300})
    assert [(row["operation"], row["provider"]) for row in rows] == [
        (name, provider) for name in SETTINGS["operations"] for provider in ("eager", "kernels, host only")
    ]
    for row in rows:
        assert row["host_us"] > 0
        assert "device_us" not in row
        assert ("error" in row) == (row["provider"] == "eager")
        assert row.get("error", 0) < 1e-5
    assert [row.get("launches") for row in rows] == [None, 2, None, 3]
    assert [row["bytes_moved"] for row in rows] == [5 * 2 * 30 * 4] * 2 + [7 * 2 * 30 * 4] * 2
    result = kernels.facts("cpu") | {"rows": rows, "notes": [kernels.CPU_NOTE], "dtypes": ["float32"]}
    shown = kernels.table(result)
    assert "| transition_step | guided | 2x3x5 | 2 | float32 | eager |" in shown
    assert "No GPU" in shown
    kernels.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_what_the_time_did_not_reach_is_listed() -> None:
    rows = kernels.measure(SETTINGS | {"deadline": 0, "providers": ["eager"]})
    assert [row["note"].partition(":")[0] for row in rows] == ["not measured"] * 2
    result = kernels.facts("cpu") | {"rows": rows, "notes": []}
    assert kernels.table(result).count("the time allowed had passed") == 2


def test_a_case_has_its_operations_name_and_those_of_a_rollout_and_an_update_are_timed() -> None:
    names = [operation.name for operation in operations]
    assert len(set(names)) == len(names)
    assert set(names) <= ops.explain("cpu").keys() - {"correlation_from_state"}
    assert {"transition_step", "transition_log_prob", "transition_policy_loss", "transition_policy_grad"} <= set(names)
    assert {"gaussian_kl", "correlation"} <= set(names)


def test_the_readme_of_the_kernels_says_what_of_each_operation_is_timed() -> None:
    """In the row that begins with the operation's name, its last cell."""
    lines = (BENCH.parents[1] / "kernels" / "README.md").read_text(encoding="utf-8").splitlines()
    shown = {line.split("`")[1]: line.split("|")[-2].strip() for line in lines if line.startswith("| `")}
    for operation in operations:
        assert shown[operation.name] == operation.timed
