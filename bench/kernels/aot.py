"""What the compiler makes of every kernel for each GPU, without one.

    python bench/kernels/aot.py [--quick] [--out FILE] [--version-only] [--interpret] [--before]

Every operation is called with aligned latents of 64 rows of 16 x 128 x 128, all its branches on, and each launch is
compiled for sm_80, sm_90, sm_100 and gfx942; again with 1 row of 4 x 33 x 7, for what the compiler does with a 1 and
with lengths that no vector divides. Writes registers, spills, shared memory, 128-bit loads, double instructions, float
atomics, fused multiply-adds, barriers and shuffles (of 1,024 elements, or of a program that reads no latents), and the
programs of a launch for 8 rows of 4 x 64 x 64; prints the tables of kernels/README.md; exits with 1 if a kernel breaks
a rule. `--before` writes the rows that a later table is compared with. Nothing is run, so nothing here is a time.
"""

import argparse
import datetime
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
RESULTS = CHECKOUT / "bench" / "results" / "aot.json"
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {
    "bf16": ("bfloat16", "bfloat16"),
    "fp16": ("float16", "float16"),
    "fp32": ("float32", "float32"),
    "mixed": ("float32", "bfloat16"),
}
"""Types of latents and of model outputs; the last is what a run with `model.dtype = "bfloat16"` has."""
ALIGNED, ODD, SMALL = (64, (16, 128, 128)), (1, (4, 33, 7)), (8, (4, 64, 64))
FULL = {(dtype, is_aligned): list(TARGETS) for dtype in DTYPES for is_aligned in (True, False)}
QUICK = {key: [] for key in FULL} | {
    ("bf16", True): list(TARGETS),
    ("bf16", False): ["sm_100"],
    ("fp32", True): ["sm_90"],
    ("mixed", True): ["sm_90"],
}
GUIDANCE = 3.5
Row = dict[str, Any]


def kernel_names() -> dict[str, str]:
    """Every kernel of `kernels/` that a launch can name, and its file: found in the text, whatever calls it."""
    pattern = re.compile(r"^@triton\.jit\b.*\ndef (\w+_kernel)\(", re.MULTILINE)
    files = sorted((CHECKOUT / "kernels").glob("*.py"))
    return {name: path.name for path in files for name in pattern.findall(path.read_text(encoding="utf-8"))}


def problems(row: Row) -> list[str]:
    """The rules that a compiled kernel breaks."""
    broken = [f"{row[key]} {words}" for key, words in FORBIDDEN.items() if row[key]]
    limit = MAX_REGISTERS[TARGETS[row["target"]][0]]
    if row["registers"] > limit:
        broken.append(f"{row['registers']} registers, more than {limit}")
    if row["shared_bytes"] > 48 * 1024:
        broken.append(f"{row['shared_bytes']} bytes of shared memory, more than 48 KiB")
    if row["reads_latents"] and row["is_aligned"] and not row["vector_loads"]:
        broken.append("no 128-bit loads")
    return [f"{row['kernel']}, {row['dtype']}, {row['target']}: {what}" for what in broken]


MAX_REGISTERS = {"cuda": 128, "hip": 256}  # four programs of 128 threads a multiprocessor, two waves a SIMD unit
LOG_FUSED = 12
"""Fused multiply-adds in the compiler's own logarithm, which every caller shares."""
FORBIDDEN = {
    "spill_bytes": "bytes spilled",
    "float64": "double instructions",
    "float_atomics": "atomics on floats, whose sums have no order",
    "fused": "fused multiply-adds, which round otherwise than the reference",
}


def call_operations(kernels: Any, n: int, shape: tuple[int, ...], types: tuple[str, str]) -> None:
    """Call every operation with all its branches on, forward and backward."""
    import torch

    def latents() -> Any:
        return torch.empty(n, *shape, dtype=getattr(torch, types[0]))

    def frozen() -> Any:
        return torch.empty(n, *shape, dtype=getattr(torch, types[1]))

    def output() -> Any:
        return frozen().requires_grad_()

    def row(*width: int) -> Any:
        return torch.ones(n, *width)

    guided: dict[str, Any] = {"output_uncond": output(), "guidance_scale": GUIDANCE}
    policy = {"clip_range": 0.1, "ref_output": frozen(), "kl_weight": row(), **guided}
    plain, noise, coef = latents(), latents(), row(3)
    for kind in ("gaussian", "squared_error"):
        kernels.transition_step(plain, frozen(), noise, coef, **guided, kind=kind)
    for rows in (None, torch.arange(n)):
        for kind in ("gaussian", "squared_error"):
            outputs = output(), output(), GUIDANCE
            log_prob = kernels.guided_transition_log_prob(plain, *outputs, noise, coef, kind=kind, rows=rows)
            log_prob.sum().backward()
        kernels.transition_log_prob_grad(plain, output(), noise, coef, row(), **guided, rows=rows)
        tables = {} if rows is None else {"rows": rows, "out": kernels.Step(latents(), row(), latents(), row(), row())}
        kernels.transition_step_with_x0(plain, frozen(), noise, coef, row(2), prev_x0=plain, **guided, **tables)
        for clip in ("ppo", "dpok"):
            for old in (row(), None):
                inputs = (plain, output(), noise, coef, old, row())
                kernels.transition_policy_loss(*inputs, clip=clip, **policy, rows=rows)[0].sum().backward()
                kernels.transition_policy_grad(*inputs, clip=clip, scale=0.5, **policy, rows=rows)
    for loss in (kernels.clipped_policy_loss, kernels.dpok_policy_loss):
        loss(row().requires_grad_(), row(), row(), clip_range=0.1)[0].sum().backward()
    kernels.gaussian_kl(output(), frozen(), coef).sum().backward()
    kernels.correlation(plain, noise, center="channel", num_channels=shape[0])
    kernels.correlations(torch.stack([plain, noise], 1), noise)
    kernels.correlation_update(row(6), plain, noise)


def specialise(launch: Any, is_hip: bool) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """(signature, constants, attributes) as Triton's launcher would derive them from the arguments."""
    import torch

    pointees = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        divisible = [["tt.divisibility", 16]]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{pointees[value.dtype]}"
            hints = divisible if value.data_ptr() % 16 == 0 else []
            if is_hip and value.untyped_storage().size() < 2**31:
                hints = [*hints, ["tt.pointer_range", 32]]
            attributes[(index,)] = hints
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = divisible
    return signature, constants, {index: hints for index, hints in attributes.items() if hints}


def compile_row(launch: Any, dtype: str, target: str, case: tuple[int, tuple[int, ...]], turns: int) -> Row:
    """Compile one launch for one GPU and read what came out; a program goes through so many blocks in a loop."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    is_hip = TARGETS[target][0] == "hip"
    signature, constants, attributes = specialise(launch, is_hip)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    num_warps = max(1, launch.options["num_warps"] * 32 // TARGETS[target][2])  # as many threads
    options = launch.options | {"num_warps": num_warps}
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    n, shape = case
    tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
    row = {
        "kernel": launch.kernel.__name__,
        "dtype": dtype,
        "target": target,
        "reads_latents": max(x.numel() for x in tensors) >= n * torch.Size(shape).numel(),
        "is_aligned": case == ALIGNED,
        "shared_bytes": compiled.metadata.shared,
    }
    assembly = compiled.asm["amdgcn" if is_hip else "ptx"]
    row |= read_amd(assembly) if is_hip else _read_cuda(compiled.asm)
    return row | {name: round(executed(assembly, which, turns) / turns, 2) for name, which in EXCHANGES.items()}


EXCHANGES = {
    "barriers": r"\b(?:bar\.sync|barrier\.sync|s_barrier)\b",
    "shuffles": r"\bshfl\.sync\b|\bds_b?permute_b32\b|\bds_swizzle_b32\b|_dpp\b|\bv_permlane\w*",
}
"""Instructions by which the threads of a program wait for each other, and exchange registers."""


def executed(assembly: str, which: str, turns: int) -> int:
    """Instructions that a thread runs: those in a loop, as the compiler remarks, in each of so many turns."""
    total, is_in_loop = 0, False
    for line in assembly.splitlines():
        if re.match(r"\s*(?:\.LBB\d+_\d+:|\$L__BB\d+_\d+:|(?:;|//) %bb\.\d+:)", line):
            is_in_loop = False
        is_in_loop |= re.search(r"(?:;|//).*\bLoop\b", line) is not None
        total += len(re.findall(which, line)) * (turns if is_in_loop else 1)
    return total


def _read_cuda(asm: dict[str, Any]) -> Row:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed)
    assert found, printed
    registers, stack, local = map(int, found.groups())
    num_fused = len(re.findall(r"\bfma\.", asm["ptx"]))
    wide = r"ld\.global[^\n]*\.v(?:4\.b32|8\.b32|2\.b64)|cp\.async\.cg\.shared\.global[^\n]*, 0x10,"
    return {
        "registers": registers,
        "spill_bytes": stack + local,
        "vector_loads": len(re.findall(wide, asm["ptx"])),
        "float64": asm["ptx"].count(".f64"),
        "float_atomics": len(re.findall(r"\b(?:atom|red)\.[\w.]*\.(?:f|bf)\d+", asm["ptx"])),
        "fused": 0 if "math.log " in asm["ttgir"] and num_fused % LOG_FUSED == 0 else num_fused,
    }


def read_amd(assembly: str) -> Row:
    counts = {
        key: int(count) for key, count in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly)
    }
    return {
        "registers": counts["vgpr_count"],
        "spill_bytes": counts["private_segment_fixed_size"],
        "vector_loads": len(re.findall(r"\b(?:global|buffer|flat)_load_(?:dwordx4|b128)", assembly)),
        "float64": len(re.findall(r"\bv_\w+_f64\b", assembly)),
        "float_atomics": len(re.findall(r"\b(?:global|buffer|flat|ds)_atomic_\w*f\d+", assembly)),
        "fused": None,  # a division is made of fused multiply-adds there, so a count says nothing
    }


def compile_all(quick: bool) -> Iterator[Row]:
    """A row for every launch that differs; `quick` leaves out fp16, and most of fp32, mixed and of the odd lengths."""
    from launches import kernels_for_cpu, recorded

    kernels = kernels_for_cpu()
    with recorded() as launches:
        call_operations(kernels, *SMALL, DTYPES["bf16"])
    small = {launch.kernel.__name__: launch for launch in sorted(launches, key=lambda launch: math.prod(launch.grid))}
    for dtype in DTYPES:
        for case in (ALIGNED, ODD):
            targets = (QUICK if quick else FULL)[dtype, case == ALIGNED]
            with recorded() as launches:
                call_operations(kernels, *case, DTYPES[dtype])
            seen = set()
            for launch in launches:
                key = (launch.kernel.__name__, str(specialise(launch, False)), str(launch.options))
                if key not in seen:
                    seen.add(key)
                    example = small[key[0]]
                    block = example.arguments.get("BLOCK", 0)
                    turns = example.arguments.get("chunk", block) // block if block else 1
                    more = {"programs": math.prod(example.grid)}
                    yield from (compile_row(launch, dtype, target, case, turns) | more for target in targets)


def worst(rows: list[Row]) -> list[Row]:
    """One row for each kernel, dtype and target: over its aligned variants the most of each cost, the fewest loads."""
    merged: dict[tuple, Row] = {}
    for row in rows:
        if row["is_aligned"]:
            one = merged.setdefault((row["kernel"], row["dtype"], row["target"]), row | {"variants": 0})
            one["variants"] += 1
            for key in ("registers", "spill_bytes", "shared_bytes", "float64", "float_atomics", *EXCHANGES):
                one[key] = max(one[key], row[key])
            one["vector_loads"] = min(one["vector_loads"], row["vector_loads"])
    return [{key: value for key, value in row.items() if key != "is_aligned"} for row in merged.values()]


def markdown(rows: list[Row]) -> str:
    """The table of kernels/README.md: one line a kernel, registers for bf16, all other figures over every dtype."""
    files = kernel_names()
    lines = [
        f"| kernel | file | registers, bf16: {', '.join(TARGETS)} | spills | shared memory | 128-bit loads | double | "
        "float atomics |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in files:
        mine = [row for row in rows if row["kernel"] == name]
        registers = [row["registers"] for row in mine if row["dtype"] == "bf16"]
        loads = "yes" if all(row["vector_loads"] for row in mine) else "no" if mine[0]["reads_latents"] else "-"
        most = {
            key: max(row[key] for row in mine) for key in ("spill_bytes", "shared_bytes", "float64", "float_atomics")
        }
        lines.append(
            f"| `{name}` | `{files[name]}` | {', '.join(map(str, registers))} | {most['spill_bytes']} | "
            f"{most['shared_bytes']} B | {loads} | {most['float64']} | {most['float_atomics']} |"
        )
    return "\n".join(lines)


def comparison(result: dict[str, Any]) -> str:
    """The second table of kernels/README.md: before and after, in bf16."""
    columns = {
        "registers, sm_90": ("sm_90", "registers"),
        "registers, gfx942": ("gfx942", "registers"),
        "spills": ("sm_90", "spill_bytes"),
        "barriers": ("sm_90", "barriers"),
        "shuffles": ("sm_90", "shuffles"),
        "programs": ("sm_90", "programs"),
    }
    before, after = (
        {(row["kernel"], row["target"]): row for row in rows if row["dtype"] == "bf16"}
        for rows in (result["before"]["rows"], result["rows"])
    )
    lines = [f"| kernel | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name in sorted({name for name, _ in before | after}):
        pairs = [
            [f"{rows[name, target][key]:g}" if (name, target) in rows else "-" for rows in (before, after)]
            for target, key in columns.values()
        ]
        lines.append(f"| `{name}` | {' | '.join(' → '.join(pair) for pair in pairs)} |")
    return "\n".join(lines)


def _commit() -> str | None:
    command = ["git", "log", "-1", "--format=%H", "--", "kernels"]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False).stdout.strip() or None


def _write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result).replace("}, {", "},\n{").replace('"rows": [', '"rows": [\n') + "\n")


def interpreted_tests() -> str:
    """The closing line of the kernels' tests under Triton's interpreter."""
    harmless = "ignore:Conversion of an array:DeprecationWarning"  # in the interpreter of Triton 3.6
    command = [sys.executable, "-m", "pytest", "-q", "-W", harmless, "-p", "no:cacheprovider", "tests/kernels"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    return re.sub(r" in .*", "", done.stdout.strip().splitlines()[-1])


def main() -> int:
    """Compile, write and print; 1 if a rule is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="bf16 alone, nearly")
    parser.add_argument("--version-only", action="store_true", help="record how this Triton did, keep the table")
    parser.add_argument("--interpret", action="store_true", help="run tests/kernels in the interpreter too")
    parser.add_argument("--before", action="store_true", help="write the table that a later one is compared with")
    chosen = parser.parse_args()
    import torch
    import triton

    rows = list(compile_all(chosen.quick))
    broken = [line for row in rows for line in problems(row)]
    result = json.loads(chosen.out.read_text()) if chosen.out.exists() else {"triton": {}}
    if chosen.before:
        result["before"] = {"commit": _commit(), "triton": triton.__version__, "rows": worst(rows)}
        _write(result, chosen.out)
        return 0
    result["triton"][triton.__version__] = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "numpy": version("numpy"),  # the interpreter of Triton 3.6 fails with numpy from 2.4 on
        "variants_compiled": len(rows),
        "problems": broken,
        "interpreted_tests": interpreted_tests() if chosen.interpret else "not run",
    }
    if not chosen.version_only:
        table = worst(rows)
        result |= {"rows_are_of": triton.__version__, "rows": table}
        if not chosen.quick:
            print(markdown(table))
            print(comparison(result) if "before" in result else "")
    _write(result, chosen.out)
    print(f"{len(rows)} variants, {len(broken)} problems, Triton {triton.__version__}: {chosen.out.name}")
    print("\n".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
