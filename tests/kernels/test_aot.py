"""Every kernel compiled, without a GPU, for the GPUs it is meant for: what the compiler made of it.

No spills, no double arithmetic, no atomics (sums have one order), wide loads, little shared memory. Nothing runs here.
"""

import os
import re
import subprocess
from importlib.util import find_spec

import pytest

if os.environ.get("TRITON_INTERPRET") == "1" or find_spec("triton") is None:
    pytest.skip("needs triton and not its interpreter, which replaces the compiler", allow_module_level=True)

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adascope_fast.kernels import correlation, gaussian_kl, policy_loss, transition
from adascope_fast.kernels.rows import BLOCK, MAX_SPLITS

KERNELS = {
    name: kernel
    for module in (transition, gaussian_kl, policy_loss, correlation)
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
}
REDUCING = ("residual_square_kernel", "output_square_kernel", "moments_kernel")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
VARIANTS = [(name, "bf16", target) for name in KERNELS for target in TARGETS]
VARIANTS += [(name, "fp32", "sm_90") for name in REDUCING]
LATENTS = {"sample", "output", "uncond", "prev", "ref", "noise", "x", "y", "grad_output", "grad_uncond"}
SCALARS = {"guidance_scale", "kl_weight", "low", "high"}
FLAGS = ("IS_GUIDED", "NEEDS_UNCOND", "HAS_REF", "HAS_PENALTY")


def _compile(name, dtype, target):
    """The kernel as a launch with aligned latents whose length is a multiple of 16 would specialise it."""
    constants = dict.fromkeys(FLAGS, True) | {"BLOCK": BLOCK, "NUM_SPLITS": MAX_SPLITS, "ROWS": transition.FINISH_ROWS}
    if name in ("state_kernel", "correlation_kernel"):
        constants["ROWS"] = correlation.FINISH_ROWS
    signature, attributes = {}, {}
    for index, parameter in enumerate(KERNELS[name].params):
        argument = parameter.name
        if parameter.is_constexpr:
            signature[argument] = "constexpr"
        elif argument in SCALARS:
            signature[argument] = "fp32"
        else:
            pointee = dtype if argument.removesuffix("_ptr") in LATENTS else "fp32"
            signature[argument] = f"*{pointee}" if argument.endswith("_ptr") else "i32"
            if argument not in ("n", "groups"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    used = {argument: constants[argument] for argument, kind in signature.items() if kind == "constexpr"}
    source = ASTSource(fn=KERNELS[name], signature=signature, constexprs=used, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": 4, "enable_fp_fusion": False})


def _cuda_resources(compiled, folder):
    """(registers, stack, local memory) of a thread, from the binary."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed)
    assert found, printed
    return tuple(int(number) for number in found.groups())


def test_every_kernel_is_found():
    assert len(KERNELS) == 13
    assert set(REDUCING) <= set(KERNELS)


@pytest.mark.parametrize(("name", "dtype", "target"), VARIANTS)
def test_kernel_compiles_lean(name, dtype, target, tmp_path):
    compiled = _compile(name, dtype, target)
    assert compiled.metadata.shared <= 48 * 1024
    if target == "gfx942":
        assembly = compiled.asm["amdgcn"]
        counts = {key: int(count) for key, count in re.findall(r"\.(\w+_count):\s*(\d+)", assembly)}
        assert counts["vgpr_spill_count"] == counts["sgpr_spill_count"] == 0
        assert counts["vgpr_count"] <= 128
        assert not re.search(r"\bv_\w+_f64\b|\b(global|buffer|flat|ds)_atomic", assembly)
        return
    registers, stack, local = _cuda_resources(compiled, tmp_path)
    assert stack == local == 0
    assert registers <= 128
    ptx = compiled.asm["ptx"]
    assert ".f64" not in ptx
    assert not re.search(r"\b(atom|red)\.", ptx)
    if "BLOCK" in KERNELS[name].arg_names:
        assert re.search(r"ld\.global[^\n]*\.v4\.b32|cp\.async\.cg\.shared\.global[^\n]*, 0x10,", ptx)


@pytest.mark.parametrize("name", REDUCING)
def test_sums_are_not_fused(name):
    ptx = _compile(name, "bf16", "sm_90").asm["ptx"]
    assert "add.f32" in ptx or "add.rn.f32" in ptx
    assert "fma" not in ptx
