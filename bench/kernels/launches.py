"""Kernel launches on a machine without a GPU: recorded instead of made.

The operators are given CPU tensors and run all of their Python; `JITFunction.run` notes what it was called with. So the
compiler can be shown exactly what a launch would compile, and the host's share of a call can be timed.
Must be imported before anything imports a kernel, in a process of its own: operators get their devices at import.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from triton import JITFunction

FOLDER = Path(__file__).parents[2] / "kernels"


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its programs, its arguments in order, and the compiler's options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


def kernels_for_cpu() -> SimpleNamespace:
    """The public functions of all kernel files, made to accept CPU tensors; for use inside `recorded`."""
    library = import_module("adascope_fast.kernels.library")
    library.IS_INTERPRETED = True  # an operator is then registered for CPU tensors as well
    found: dict[str, Any] = {}
    for path in sorted(FOLDER.glob("*.py")):
        module = import_module(f"adascope_fast.kernels.{path.stem}")
        found |= {name: value for name, value in vars(module).items() if not name.startswith("_") and callable(value)}
    return SimpleNamespace(**found)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches of a block, in order; none is made, and results are uninitialised memory."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments |= {name: kwargs.pop(name) for name in self.arg_names if name in kwargs}
        launches.append(Launch(self, grid, arguments, kwargs))

    before, JITFunction.run = JITFunction.run, run
    try:
        yield launches
    finally:
        JITFunction.run = before
