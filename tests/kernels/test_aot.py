"""Every kernel compiled, without a GPU, for the GPUs it is meant for: what the compiler made of it. Nothing runs here.

`bench/kernels/aot.py` holds the rules: no spills, no double arithmetic, no float atomics (sums have one order), no
fused multiply-adds, wide loads, little shared memory. It runs as a program, since it registers the operators its way.
"""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

if os.environ.get("TRITON_INTERPRET") == "1" or find_spec("triton") is None:
    pytest.skip("needs triton and not its interpreter, which replaces the compiler", allow_module_level=True)

CHECKOUT = Path(__file__).parents[2]


def _load_aot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_aot", CHECKOUT / "bench" / "kernels" / "aot.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


aot = _load_aot()
KERNELS = aot.kernel_names()
COMMITTED = json.loads(aot.RESULTS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the compiler makes of the kernels as they are now."""
    out = tmp_path_factory.mktemp("aot") / "aot.json"
    command = [sys.executable, str(CHECKOUT / "bench" / "kernels" / "aot.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.exists(), done.stderr
    assert "problems" in done.stdout
    return json.loads(out.read_text(encoding="utf-8"))


def test_every_kernel_compiles_lean_for_every_gpu(compiled: dict) -> None:
    (outcome,) = compiled["triton"].values()
    assert outcome["problems"] == []
    reached = {(row["kernel"], row["target"]) for row in compiled["rows"] if row["dtype"] == "bf16"}
    assert reached == {(name, target) for name in KERNELS for target in aot.TARGETS}


def test_the_committed_table_covers_every_kernel_without_a_spill() -> None:
    rows = {(row["kernel"], row["dtype"], row["target"]): row for row in COMMITTED["rows"]}
    assert set(rows) == {(name, dtype, target) for name in KERNELS for dtype in aot.DTYPES for target in aot.TARGETS}
    for row in rows.values():
        assert row["spill_bytes"] == row["float64"] == row["float_atomics"] == 0
        assert row["vector_loads"] > 0 or not row["reads_latents"]
    for outcome in COMMITTED["triton"].values():
        assert outcome["problems"] == []
        assert re.fullmatch(r"\d+ passed(, \d+ skipped)?", outcome["interpreted_tests"])
    assert len({outcome["variants_compiled"] for outcome in COMMITTED["triton"].values()}) == 1
    assert {version.rpartition(".")[0] for version in COMMITTED["triton"]} >= {"3.6", "3.7", "3.8"}


def test_the_committed_table_is_of_the_kernels_as_they_are(compiled: dict) -> None:
    if COMMITTED["rows_are_of"] not in compiled["triton"]:
        pytest.skip(f"the table was made with Triton {COMMITTED['rows_are_of']}, this is another version")
    committed = {(row["kernel"], row["dtype"], row["target"]): row for row in COMMITTED["rows"]}
    for row in compiled["rows"]:
        if row["dtype"] == "bf16":
            assert row == committed[row["kernel"], row["dtype"], row["target"]], (
                "run `python bench/kernels/aot.py` again"
            )


def test_the_readme_shows_the_committed_tables() -> None:
    readme = (CHECKOUT / "kernels" / "README.md").read_text(encoding="utf-8")
    assert aot.markdown(COMMITTED["rows"]) in readme
    assert aot.comparison(COMMITTED) in readme


@pytest.mark.parametrize(
    ("label", "remark", "wait", "shuffle"),
    [
        ("$L__BB0_2:", "//", "bar.sync 0;", "shfl.sync.bfly.b32 %r1;"),
        (".LBB0_2:", ";", "s_barrier", "ds_bpermute_b32 v1"),
        (".LBB0_2:", ";", "s_barrier", "v_add_f32_dpp v1"),
    ],
)
def test_what_is_in_a_loop_is_counted_in_every_turn(label: str, remark: str, wait: str, shuffle: str) -> None:
    loop = f"{label}   {remark} =>This Inner Loop Header: Depth=1\n\t{wait}\n\t{shuffle}\n\t{shuffle}\n"
    inside = f"{remark} %bb.3:   {remark}   in Loop: Header=BB0_2 Depth=1\n\t{wait}\n"
    after = f"{label.replace('2', '4')}   {remark} %._crit_edge\n\t{wait}\n\t{shuffle}\n"
    assembly = f"\t{wait}\n{loop}{inside}{after}"
    counts = {name: aot.executed(assembly, which, 7) for name, which in aot.EXCHANGES.items()}
    assert counts == {"barriers": 1 + 2 * 7 + 1, "shuffles": 2 * 7 + 1}


def test_each_rule_can_be_broken() -> None:
    row = next(row for row in COMMITTED["rows"] if row["reads_latents"]) | {"is_aligned": True, "fused": 0}
    assert aot.problems(row) == []
    bad = {"registers": 129, "shared_bytes": 49153, "vector_loads": 0}
    for key, value in (bad | dict.fromkeys(aot.FORBIDDEN, 8)).items():
        assert len(aot.problems(copy.copy(row) | {key: value})) == 1


def test_counts_are_read_from_the_assembly() -> None:
    assembly = (
        ".private_segment_fixed_size: 12\n.vgpr_count: 7\n"
        "global_load_dwordx4 v[0:3]\nv_add_f64 v0\nglobal_atomic_add_f32 v0\nglobal_atomic_add_u32 v0\n"
    )
    assert aot.read_amd(assembly) == {
        "registers": 7, "spill_bytes": 12, "vector_loads": 1, "float64": 1, "float_atomics": 1, "fused": None
    }  # fmt: skip
