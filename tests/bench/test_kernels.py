"""The benchmark of the kernels: no figure without green tests, nothing left out in silence, and honest labels."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import torch

from adascope_fast import reference
from adascope_fast.kernels.operations import OPERATIONS

BENCH = Path(__file__).parents[2] / "bench" / "kernels"
MIX = "float32+bfloat16"
ASKED = {
    "operations": ["transition_step", "transition_policy_loss"],
    "shapes": ["2x3x5"],
    "rows": [2],
    "dtypes": [MIX],
    "layouts": ["mixed"],
    "providers": ["kernels", "eager", "flow_grpo"],
}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The modules of `bench/kernels`, with the folder they are started from in the path."""
    sys.path.insert(0, str(BENCH))
    yield SimpleNamespace(**{name: import_module(name) for name in ("run", "plan", "figures", "timed", "flow_grpo")})
    sys.path.remove(str(BENCH))


def _settings(bench: Any, **changes: Any) -> dict[str, Any]:
    cases = bench.plan.cases(**ASKED | changes)
    return {"device": "cpu", "rounds": 2, "deadline": time.time() + 300, "cases": cases}


def _write_report(path: Path, **outcomes: str) -> Path:
    cases = [f'<testcase classname="tests.test_gpu" name="{name}">{tag}</testcase>' for name, tag in outcomes.items()]
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return path


def test_failed_tests_are_found_and_a_run_without_a_passing_test_is_refused(bench: Any, tmp_path: Path) -> None:
    report = _write_report(tmp_path / "a.xml", good="", bad="<failure/>", broken="<error/>", left="<skipped/>")
    assert bench.run.failed_tests(report) == ["tests.test_gpu.bad", "tests.test_gpu.broken"]
    for outcomes in ({}, {"left": "<skipped/>"}, {"bad": "<failure/>"}):
        with pytest.raises(ValueError, match="no test passed"):
            bench.run.failed_tests(_write_report(tmp_path / "b.xml", **outcomes))
    with pytest.raises(ValueError, match=r"no test passed \(0 were found\)"):
        bench.run.failed_tests(tmp_path / "missing.xml")


def test_a_failed_test_silences_its_operation_or_all_if_it_names_none(bench: Any) -> None:
    names, is_red = (("correlation",), ("kl",)), bench.run.is_red
    every = [name for group in names for name in group]
    assert not is_red(names[0], [], every)
    assert is_red(names[0], ["test_gpu.test_value[correlation_update]"], every)
    assert not is_red(names[1], ["test_gpu.test_value[correlation_update]"], every)
    assert is_red(names[1], ["test_gpu.test_offsets"], every)


def _main(bench: Any, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(bench.run.sys, "argv", ["run.py", *map(str, arguments)])
    return bench.run.main()


def test_red_operations_get_no_figure(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    first = bench.timed.TIMED[0].name
    report = _write_report(tmp_path / "tests.xml", good="", **{first: "<failure/>"})
    asked = {}
    monkeypatch.setattr(bench.run, "measure", lambda settings: asked.update(settings) or [])
    out = tmp_path / "out.json"
    assert _main(bench, monkeypatch, "--device=cpu", f"--tested={report}", f"--out={out}") == 1
    assert {case.operation for case in asked["cases"]} >= {"correlation", "gaussian_kl"}
    assert first not in {case.operation for case in asked["cases"]}
    assert f"{first}: no figures, its tests fail" in capsys.readouterr().out
    assert json.loads(out.read_text())["failed_tests"] == [f"tests.test_gpu.{first}"]


@needs_triton
def test_a_run_on_the_cpu_measures_plain_pytorch_and_the_host_alone(bench: Any, tmp_path: Path) -> None:
    settings = _settings(bench)
    rows = bench.run.measure(settings)
    assert [(row["operation"], row["provider"]) for row in rows] == [
        (name, provider)
        for name in ASKED["operations"]
        for provider in ("kernels, host only", "eager", "flow_grpo")
    ]  # fmt: skip
    for row in rows:
        assert row["host_us"] > 0
        assert "device_us" not in row
        assert (row["shape"], row["rows"], row["dtype"], row["layout"]) == ("2x3x5", 2, MIX, "mixed")
        assert ("error" in row) == (row["provider"] in ("eager", "flow_grpo"))
        assert row.get("error", 0) < 1e-2  # that of a gradient, or of guidance, in bfloat16
        if row["operation"] == "transition_step":
            assert row["bytes_moved"] == (4 + 4 + 2 + 2 + 4) * 2 * 30
            assert row.get("error", 0) < 1e-5 or row["provider"] == "flow_grpo"
        if row["provider"] == "kernels, host only":
            assert row["launches"] == sum(way.launches for way in OPERATIONS[row["operation"]].passes())
    result = bench.run.facts("cpu") | {"rows": rows, "notes": [bench.run.CPU_NOTE], "asked": ASKED}
    shown = bench.figures.table(result)
    assert f"| transition_step | guided | 2x3x5 | 2 | {MIX} | mixed | eager |" in shown
    assert "No GPU" in shown
    assert shown.count(": not measured") == 3
    assert bench.figures.draw(result, tmp_path / "plot.json") == [tmp_path / "plot.png"]
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@needs_triton
def test_what_the_time_did_not_reach_is_listed(bench: Any) -> None:
    rows = bench.run.measure(_settings(bench, providers=["eager"]) | {"deadline": 0})
    assert [(row["operation"], row["note"]) for row in rows] == [
        (name, "the time allowed had passed") for name in ASKED["operations"]
    ]
    (line,) = bench.figures.table(bench.run.facts("cpu") | {"rows": rows, "notes": []}).splitlines()[-1:]
    assert line.endswith(f"passed: 2 rows of 2x3x5, {MIX}, mixed: transition_step, transition_policy_loss")


def test_a_run_that_is_cut_short_keeps_what_it_has(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _settings(bench, providers=["eager"])

    def cut_short(command: list[str], *, env: dict[str, str], timeout: float, **_: Any) -> None:
        told = json.loads(Path(env["KERNEL_BENCH"]).read_text())
        assert 300 < timeout < 300 + 2 * bench.run.GRACE_S
        Path(told["rows_file"]).write_text(json.dumps(settings["cases"][0]._asdict() | {"host_us": 7.0}) + "\n")
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(bench.run.subprocess, "run", cut_short)
    first, second = bench.run.measure(settings)
    assert first["host_us"] == 7.0
    assert second["note"] == "the time allowed had passed"


def test_the_goals_come_first_in_their_order(bench: Any) -> None:
    asked = ASKED | {
        "operations": bench.plan.NAMES,
        "shapes": bench.plan.SHAPES[::-1],
        "rows": [1, 8, 64],
        "dtypes": ["bfloat16", MIX],
        "layouts": ["channels_last", "contiguous"],
    }
    cases = bench.plan.cases(**asked)
    assert len(set(cases)) == len(cases)
    first = [("transition_step_with_x0", "16x128x128", 64), ("transition_step_with_x0", "4x64x64", 8)]
    first += [("transition_policy_grad", shape, rows) for _, shape, rows in first]
    assert list(dict.fromkeys(case[:3] for case in cases))[:4] == first
    num_goals = sum(case.is_goal for case in cases)
    goals = [case for case in cases if case[1:5] in {(*cell[1:], MIX, "contiguous") for cell in first}]
    assert cases[:num_goals] == goals
    assert {case.operation for case in goals} == set(bench.plan.NAMES)
    assert not [case for case in cases if case.provider == "flow_grpo" and case.operation == "correlation"]


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--ops", "transition", "must be among transition_step_with_x0, transition_policy_grad"),
        ("--shapes", "4x64", "must be three lengths such as 16x128x128"),
        ("--rows", "0", "must be whole numbers from 1 on"),
        ("--dtypes", "float64", f"must be among {MIX}, bfloat16, float16, float32"),
        ("--layouts", "nhwc", "must be among contiguous, channels_last, mixed"),
        ("--providers", "liger", "must be among kernels, compile, eager, flow_grpo"),
    ],
)
def test_an_unknown_name_is_refused(bench: Any, monkeypatch, capsys, option: str, value: str, rule: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        _main(bench, monkeypatch, option, value)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert f"argument {option}: {rule}" in line
    assert line.endswith(f"not '{value}'")


def test_a_choice_that_leaves_nothing_is_refused(bench: Any, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        _main(bench, monkeypatch, "--ops", "correlation", "--providers", "flow_grpo")
    assert stopped.value.code == 2
    assert "flow_grpo has none of correlation; add other --providers" in capsys.readouterr().err


def _measured(bench: Any, asked: dict[str, Any], times: dict[str, float]) -> list[dict[str, Any]]:
    """Rows as a GPU would give them, at a copy bandwidth of 1000 GB/s, each provider so many times slower than it."""
    rows = []
    for case in bench.plan.cases(**asked):
        (timed,) = (one for one in bench.timed.TIMED if one.name == case.operation)
        moved = timed.bytes_moved(case.dtype) * case.rows * math.prod(map(int, case.shape.split("x")))
        us = times.get(f"{case.operation} {case.provider}", times[case.provider]) * moved / 1e6
        figures = {"device_us": us, "host_us": 10.0, "launches": 2, "peak_memory_mb": 1.0, "error": 1e-6}
        rows.append(case._asdict() | {"timed": timed.timed, "bytes_moved": moved} | figures)
    return rows


def _goal_cells(bench: Any) -> dict[str, Any]:
    shapes, rows = zip(bench.plan.COPY_CELL, bench.plan.SPEED_CELL, strict=True)
    return ASKED | {"operations": bench.plan.NAMES, "shapes": shapes, "rows": rows, "layouts": ["contiguous"]}


def test_a_run_on_a_gpu_says_what_it_reached_and_which_goals_are_met(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """With stand-ins for the GPU and for what it measures."""
    asked = _goal_cells(bench) | {"providers": ["kernels", "compile"]}
    rows = _measured(bench, asked, {"kernels": 1.05, "compile": 2.0, "correlation kernels": 1.25})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(bench.run, "copy_bandwidth", lambda: 1000.0)
    given: dict[str, Any] = {}
    monkeypatch.setattr(bench.run, "measure", lambda settings: given.update(settings) or rows)
    report, out = _write_report(tmp_path / "tests.xml", good=""), tmp_path / "out.json"
    assert _main(bench, monkeypatch, f"--tested={report}", f"--out={out}", "--seconds=60") == 0
    assert given["device"] == "cuda"
    assert {case.provider for case in given["cases"]} == set(bench.plan.PROVIDERS)
    assert {case.dtype for case in given["cases"]} == {MIX, "bfloat16"}
    printed = capsys.readouterr().out
    num = len(bench.plan.NAMES)
    assert f"64 rows of 16x128x128, {MIX}: not met: 80 % at worst (correlation), {num} of {num} measured" in printed
    assert f"8 rows of 4x64x64, {MIX}: met: 1.60 times at worst (correlation), {num} of {num} measured" in printed
    assert "never slower than torch.compile: met: 1.60 times at worst (correlation," in printed
    assert "liger_kernel is" in printed
    result = json.loads(out.read_text())
    assert [goal["met"] for goal in result["goals"]] == [False, True, True]
    assert result["gpu"] == "NVIDIA H200"
    assert result["versions"]["torch"] == torch.__version__
    assert result["date"]
    assert result["command"].endswith("--seconds=60")
    for row in result["rows"]:
        expected = {"compile": 0.5}.get(row["provider"], 0.8 if row["operation"] == "correlation" else 1 / 1.05)
        assert row["gb_per_s"] == pytest.approx(1000 * expected)
        assert row["copy_share"] == pytest.approx(expected)
    assert "| GB/s | share of copy |" in printed.splitlines()[0]
    for name in ("out.png", "out_roofline.png"):
        picture = matplotlib.image.imread(tmp_path / name)
        assert picture[0, 0, 3] == 0, "nothing is painted behind the figure"
        assert picture[..., 3].max() == 1


def test_a_goal_is_met_only_if_all_that_it_is_about_was_measured(bench: Any) -> None:
    rows = _measured(bench, _goal_cells(bench) | {"providers": ["kernels", "compile"]}, {"kernels": 1, "compile": 0.9})
    for row in rows:
        row["copy_share"] = 0.95
    of_copy, of_speed, never_slower = bench.figures.goals(rows)
    assert (of_copy["met"], of_speed["met"], never_slower["met"]) == (True, False, False)
    assert never_slower["line"].startswith("not met: 0.90 times at worst (")
    left_out = [row if row["operation"] != "gaussian_kl" else row | {"device_us": None} for row in rows]
    of_copy, of_speed, never_slower = bench.figures.goals(left_out)
    assert (of_copy["met"], of_speed["met"], never_slower["met"]) == (None, False, False)
    num = len(bench.plan.NAMES)
    assert of_copy["line"].startswith("met so far, not measured in full: 95 % at worst")
    assert of_copy["line"].endswith(f"{num - 1} of {num} measured")
    only_bf16 = [row | {"dtype": "bfloat16"} for row in rows]
    assert [goal["line"] for goal in bench.figures.goals(only_bf16)][:2] == ["not measured"] * 2


def test_every_operation_is_timed_or_it_is_said_why_not(bench: Any) -> None:
    names = [timed.name for timed in bench.timed.TIMED]
    assert len(set(names)) == len(names)
    assert set(names) | bench.timed.NOT_TIMED.keys() == OPERATIONS.keys()
    assert not set(names) & bench.timed.NOT_TIMED.keys()


def test_flow_grpos_formulas_are_ours_with_its_coefficients(bench: Any) -> None:
    """Value and gradient, in float32: a step, its log-probability, and the clipped loss."""
    data = bench.timed.inputs(3, (2, 5, 5), "float32", "contiguous", "cpu")
    prev_sample, log_prob = bench.flow_grpo.transition_step(
        data.sample, data.output, data.noise, data.schedule, output_uncond=data.output_uncond, guidance_scale=5.0
    )
    ours = reference.transition_step(
        data.sample, data.output, data.noise, data.coef, output_uncond=data.output_uncond, guidance_scale=5.0
    )
    torch.testing.assert_close((prev_sample, log_prob), ours, rtol=1e-5, atol=1e-5)
    old_log_prob = data.log_prob - torch.tensor([0.01, 0.3, -0.3])
    advantage = torch.tensor([1.0, 1.0, -1.0])  # the last two are clipped
    for old, is_clipped in ((old_log_prob, [False, True, True]), (None, [False, False, False])):
        results = []
        for provider, coef in ((bench.flow_grpo, data.schedule), (reference, data.coef)):
            output = data.output.clone().requires_grad_()
            arguments = (data.sample, output, data.prev_sample, coef, old, advantage)
            loss, _ = provider.transition_policy_loss(*arguments, clip_range=0.1)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), output)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
        assert (results[0][1] == 0).all(dim=(1, 2, 3)).tolist() == is_clipped


def test_inputs_are_laid_out_and_typed_as_asked(bench: Any) -> None:
    last = torch.channels_last
    for layout, (of_latents, of_outputs) in {"mixed": (False, True), "channels_last": (True, True)}.items():
        data = bench.timed.inputs(2, (4, 3, 5), MIX, layout, "cpu")
        for name in ("sample", "noise", "prev_x0", "prev_sample"):
            assert getattr(data, name).is_contiguous(memory_format=last) == of_latents
            assert getattr(data, name).dtype == torch.float32
        for name in ("output", "output_uncond", "ref_output"):
            assert getattr(data, name).is_contiguous(memory_format=last) == of_outputs
            assert getattr(data, name).dtype == torch.bfloat16
