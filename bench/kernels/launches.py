"""Kernel launches on a machine without a GPU: recorded instead of made, or made up to the driver.

The operators are given CPU tensors and run all of their Python. `recorded`: `JITFunction.run` notes what it was called
with, so the compiler can be shown exactly what a launch would compile. `driven`: Triton compiles and launches, for a
driver that does nothing; so the host's share of a call can be timed, but for the driver's own few microseconds.
Must be imported before anything imports a kernel, in a process of its own: operators get their devices at import.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its programs, its arguments in order, and the compiler's options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


def kernels_for_cpu() -> SimpleNamespace:
    """The public functions of all kernel files, made to accept CPU tensors; for use inside `recorded`."""
    library: Any = import_module("adascope_fast.kernels.library")
    library.IS_INTERPRETED = True  # an operator is then registered for CPU tensors as well
    found: dict[str, Any] = {}
    (folder,) = import_module("adascope_fast.kernels").__path__
    for path in sorted(Path(folder).glob("*.py")):
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


@contextmanager
def driven() -> Iterator[None]:
    """Launches of a block go through all of Triton, for sm_90, and end at the driver; results are as in `recorded`.

    Not in one process with `recorded`: a kernel that was compiled here may be started without `JITFunction.run` there.
    """
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_NoDriver())
    try:
        yield
    finally:
        triton.runtime.driver._active = before


class _NoDriver(DriverBase):
    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 227 << 10},
            unload_module=lambda _: None,
        )

    @staticmethod
    def is_active() -> bool:
        return True

    def launcher_cls(self, *_: Any) -> Any:
        """What would call the driver."""
        return lambda *_: None

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0
