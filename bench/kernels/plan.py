"""What `run.py` may be asked to time, and in which order: the rows that the goals are about, then the rest."""

import argparse
import re
from collections.abc import Callable, Iterable
from itertools import product
from typing import NamedTuple

import flow_grpo
from timed import DTYPES, LAYOUTS, MIX, TIMED

PROVIDERS = {
    "kernels": "the Triton kernels",
    "compile": "torch.compile of the reference",
    "eager": "the reference in plain PyTorch",
    "flow_grpo": "flow_grpo's formulas in plain PyTorch",
}
SHAPES = ("16x128x128", "4x64x64", "4x128x128", "16x64x64")
ROWS = (64, 8, 512, 1)
COPY_CELL, SPEED_CELL = ("16x128x128", 64), ("4x64x64", 8)
NAMES = tuple(operation.name for operation in TIMED)


class Case(NamedTuple):
    """One timing."""

    operation: str
    shape: str
    rows: int
    dtype: str
    layout: str
    provider: str

    @property
    def id(self) -> str:
        """As pytest shows it."""
        return "-".join(map(str, self))

    @property
    def is_goal(self) -> bool:
        """Whether a goal is about it: the shapes and rows of one, the types that the engine uses."""
        return (self.shape, self.rows) in (COPY_CELL, SPEED_CELL) and self[3:5] == (MIX, "contiguous")


def serves(provider: str, operation: str) -> bool:
    """Whether a provider has an operation: flow_grpo has those of its scripts, the others have all."""
    (timed,) = (one for one in TIMED if one.name == operation)
    return provider != "flow_grpo" or hasattr(flow_grpo, timed.function)


def cases(
    *,
    operations: Iterable[str],
    shapes: Iterable[str],
    rows: Iterable[int],
    dtypes: Iterable[str],
    layouts: Iterable[str],
    providers: Iterable[str],
) -> list[Case]:
    """Every case once: goals first, operation by operation, then types, layouts, shapes, rows."""
    operations = [name for name in NAMES if name in set(operations)]
    cells = product(dtypes, layouts, shapes, rows, operations, providers)
    every = [Case(name, shape, n, dtype, layout, who) for dtype, layout, shape, n, name, who in cells]
    every = [case for case in dict.fromkeys(every) if serves(case.provider, case.operation)]
    order = {name: index for index, name in enumerate(operations)}
    goals = sorted((case for case in every if case.is_goal), key=lambda case: (order[case.operation], -case.rows))
    return [*goals, *(case for case in every if not case.is_goal)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--ops` and so on: lists, each value checked; None where the device decides."""
    parser.add_argument("--ops", nargs="+", type=_among(NAMES), default=list(NAMES), help=_listed(NAMES))
    parser.add_argument("--shapes", nargs="+", type=_shape, help="channels x height x width, such as 4x64x64")
    parser.add_argument("--rows", nargs="+", type=_count, help="rows of latents in a call")
    parser.add_argument("--dtypes", nargs="+", type=_among(DTYPES), help=f"{_listed(DTYPES)}; of latents+outputs")
    parser.add_argument("--layouts", nargs="+", type=_among(LAYOUTS), help=f"{_listed(LAYOUTS)}: outputs otherwise")
    parser.add_argument("--providers", nargs="+", type=_among(PROVIDERS), help=_listed(PROVIDERS))


def _listed(choices: Iterable[str]) -> str:
    return ", ".join(choices)


def _among(choices: Iterable[str]) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in choices:
            raise argparse.ArgumentTypeError(f"must be among {_listed(choices)}, not {value!r}")
        return value

    return check


def _shape(value: str) -> str:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", value):
        raise argparse.ArgumentTypeError(f"must be three lengths such as {_listed(SHAPES)}, not {value!r}")
    return value


def _count(value: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", value):
        raise argparse.ArgumentTypeError(f"must be whole numbers from 1 on, not {value!r}")
    return int(value)


def liger_note(installed: str | None) -> str:
    """Why Liger's GRPO loss is no provider."""
    found = f"liger_kernel {installed} is installed" if installed else "liger_kernel is not installed"
    return (
        f"Liger's GRPO loss is no provider ({found}): triton_grpo_loss takes logits and token ids and works on a "
        "log-softmax over the vocabulary, where these operations work on a Gaussian over latents."
    )
