"""The sum behind a log-probability, as the compiler understood it: the same numbers added in the same order everywhere.

On a GPU the order of `tl.sum` is that of the register layout, which the compiler picks anew for each kernel. Here every
kernel that sums a squared residual is compiled, and the expression that it stores is read back from the compiler's
program. Nothing runs, and no GPU is needed.
"""

import os
import re
from importlib.util import find_spec

import pytest

if os.environ.get("TRITON_INTERPRET") == "1" or find_spec("triton") is None:
    pytest.skip("needs triton and not its interpreter, which replaces the compiler", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adascope_fast.kernels import gaussian_kl, policy_loss, step, training_gradient, training_step, transition
from adascope_fast.kernels.library import NUM_THREADS
from adascope_fast.kernels.rows import BLOCK, SPREAD

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
WIDTH = 4
SCALARS = {"guidance_scale", "kl_weight", "scale", "low", "high"}
KERNELS = {
    name: kernel
    for module in (transition, step, gaussian_kl, policy_loss, training_step, training_gradient)
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
}


def _compile(kernel, target, types, **flags):
    """The kernel for aligned latents; `types` names the pointers that are not to float32."""
    constants = {"BLOCK": BLOCK, "WIDTH": WIDTH, "SUMS": 3, "OF_A_CHUNK": 8, **flags}
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif name in SCALARS:
            signature[name] = "fp32"
        else:
            pointee = "i64" if name == "rows_ptr" else types.get(name.removesuffix("_ptr"), "fp32")
            signature[name] = f"*{pointee}" if name.endswith("_ptr") else "i32"
            attributes[(index,)] = [["tt.divisibility", 16]]
    used = {name: constants[name] for name, kind in signature.items() if kind == "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=attributes)
    options = {"num_warps": NUM_THREADS // TARGETS[target].warp_size, "enable_fp_fusion": False}
    return triton.compile(source, target=TARGETS[target], options=options)


NAME = r"%[\w#]+"


class Program:
    """The compiler's program, with every value as the number of its expression: equal numbers, equal expressions.

    `prev` stands for the stored prev_sample, whether it is read from memory or about to be written.
    """

    numbers: dict[tuple, int] = {}  # noqa: RUF012 -- shared, so that numbers of different kernels can be compared

    def __init__(self, text):
        self.defined, self.carried, self.yielded, self.stored = {}, {}, [], {}
        text = re.sub(r' ?loc\((?:[^()"]|"[^"]*"|\((?:[^()]|\([^()]*\))*\))*\)', "", text)
        for line in re.sub(r"\(\{\n.*?\}\)", "", text, flags=re.DOTALL).splitlines():
            self._read(line.strip())

    def _read(self, line):
        results, found, rest = line.partition(" = ")
        if line.startswith("tt.store"):
            pointer, value = re.findall(NAME, line)[:2]
            self.stored.setdefault(self._base(pointer), value)  # the first one that is stored there
        elif line.startswith("scf.yield"):
            self.yielded = re.findall(NAME, line)
        elif found and results.startswith("%"):
            names = results.split(", ")
            if "scf.for" in rest:
                self.carried = dict(re.findall(rf"({NAME}) = ({NAME})", rest.partition("iter_args")[2]))
                label, _, count = names[0].partition(":")
                names = [f"{label}#{i}" for i in range(int(count))] if count else [label]
                rest = "scf.for"
            for place, name in enumerate(names):
                self.defined[name] = (place, rest)

    def _base(self, pointer):
        """The argument that an address starts from."""
        while pointer in self.defined:
            pointer = re.findall(NAME, self.defined[pointer][1])[0]
        return pointer

    def number(self, name):
        if name == self.stored.get("%prev_ptr"):
            return self._number("prev")
        if name in self.carried:
            return self._number("carried", self.number(self.carried[name]))
        if name not in self.defined:
            return self._number(name)
        place, text = self.defined[name]
        if text == "scf.for":
            return self._number("sum", self.number(self.yielded[place]))
        operands = re.findall(NAME, text)
        if text.startswith("tt.load") and self._base(operands[0]) == "%prev_ptr":
            return self._number("prev")
        return self._number(place, re.sub(NAME, "_", text), *map(self.number, operands))

    def _number(self, *expression):
        return self.numbers.setdefault(expression, len(self.numbers))

    def written(self, pointer):
        """What is stored first, but for the levels of a sum below SPREAD numbers, which may be left to the finish."""
        name = self.stored[pointer]
        while not self.defined[name][1].endswith(f"tensor<{SPREAD.value}xf32>"):
            name = re.findall(NAME, self.defined[name][1])[0]
        return self.number(name)

    def operations(self, name, seen):
        """The operations that a value is made of."""
        if name in seen or name not in self.defined:
            return set()
        seen.add(name)
        place, text = self.defined[name]
        operands = [self.yielded[place]] if text == "scf.for" else re.findall(NAME, text)
        return {text}.union(*(self.operations(operand, seen) for operand in operands))


PLAIN = {"HAS_REF": False, "HAS_PENALTY": False, "IS_ON_POLICY": False}
FLAGS = {"HAS_KL_WEIGHTS": False, "HAS_SCALES": False, "NEEDS_UNCOND": True, "IS_GAUSSIAN": True}
LOG_PROB = (transition.residual_square_kernel, PLAIN | {"HAS_ROWS": False})
SUMMING = {
    "of tables": (transition.residual_square_kernel, PLAIN | {"HAS_ROWS": True}),
    "with reference": (transition.residual_square_kernel, PLAIN | {"HAS_ROWS": False, "HAS_REF": True}),
    "on policy": (transition.residual_square_kernel, dict.fromkeys([*PLAIN, "HAS_ROWS"], True)),
    "step": (step.step_kernel, {"HAS_ROWS": False, "HAS_X0": False, "HAS_PREV_X0": False}),
    "step with x0": (step.step_kernel, {"HAS_ROWS": False, "HAS_X0": True, "HAS_PREV_X0": False}),
    "step with structure": (step.step_kernel, {"HAS_ROWS": True, "HAS_X0": True, "HAS_PREV_X0": True}),
}
MIXES = [("bf16", "bf16", "bf16"), ("fp32", "fp32", "fp32"), ("fp32", "bf16", "fp32"), ("fp16", "fp32", "bf16")]


def _types(sample, output, noise):
    latents = dict.fromkeys(("sample", "prev", "x0", "prev_x0"), sample)
    return latents | dict.fromkeys(("output", "uncond", "ref"), output) | {"noise": noise}


CASES = [
    pytest.param(target, types, is_guided, marks=() if (types, is_guided) == (MIXES[-1], True) else pytest.mark.slow)
    for target in TARGETS
    for types in MIXES
    for is_guided in (True, False)
]


@pytest.mark.parametrize(("target", "types", "is_guided"), CASES)
def test_every_log_prob_sums_one_expression_in_one_order(target, types, is_guided):
    compiled = {}
    for name, (kernel, flags) in {"log-prob": LOG_PROB, **SUMMING}.items():
        if "structure" not in name or is_guided:
            compiled[name] = _compile(kernel, target, _types(*types), IS_GUIDED=is_guided, **FLAGS | flags)
    programs = {name: Program(kernel.asm["ttir"]) for name, kernel in compiled.items()}
    for has_rows, plain in ((False, "log-prob"), (True, "of tables")):  # a table's rows have other addresses
        alike = [name for name in compiled if ({"log-prob": LOG_PROB} | SUMMING)[name][1]["HAS_ROWS"] == has_rows]
        want = programs[plain].written("%partial_ptr")
        assert {name: programs[name].written("%partial_ptr") for name in alike} == dict.fromkeys(alike, want)
    for name, kernel in compiled.items():
        operations = programs[name].operations(programs[name].stored["%partial_ptr"], set())
        reduced = {text.rpartition(" : ")[2] for text in operations if "tt.reduce" in text}
        last = 3 if "step" in name else 0
        pairs = {f"(tensor<{2**level}x2xf32>) -> tensor<{2**level}xf32>" for level in range(last, 10)}
        assert reduced == pairs | (set() if "step" in name else {"(tensor<1xf32>) -> f32"})
        assert not re.search(r"\bf(?:add|sub|mul|div) (?:fast|reassoc|contract|afn|nnan)", kernel.asm["llir"])
        fused = r"\bfma\." if target != "gfx942" else r"\bv_(?:pk_)?(?:fma|fmac|mac)_f32"
        if target != "gfx942" or name != "on policy":  # a division is made of them there
            assert not re.search(fused, kernel.asm["ptx" if target != "gfx942" else "amdgcn"])


@pytest.mark.parametrize("name", KERNELS)
def test_rows_are_addressed_in_64_bits(name):
    """A row number is widened before anything is multiplied by it: 100,000 rows of 65,536 elements pass 2^31."""
    flags = [
        parameter.name for parameter in KERNELS[name].params if parameter.name.startswith(("IS_", "HAS_", "NEEDS_"))
    ]
    compiled = _compile(KERNELS[name], "sm_90", _types("bf16", "bf16", "bf16"), ROWS=64, **dict.fromkeys(flags, True))
    (row,) = re.findall(rf"({NAME}) = tt.get_program_id x", compiled.asm["ttir"])
    uses = [line for line in compiled.asm["ttir"].splitlines() if re.search(rf"{row}(?![\w#])", line)]
    assert len(uses) >= 2
    assert all("tt.get_program_id x" in line or "arith.extsi" in line for line in uses), uses
