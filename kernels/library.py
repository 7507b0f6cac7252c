"""Launching a kernel, and registering its launcher as an opaque operator `torch.ops.adascope_fast.<name>`.

Opaque, so that torch.compile neither traces into a launcher (there may be no GPU driver to ask) nor hands the kernels
to Inductor, which would make float arguments double and pick its own configuration. Autograd stays outside.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

NUM_THREADS = 128  # of a program, with 8 elements each: loads of 128 bits where these have 16
WAVE = 64 if torch.version.hip else 32
"""Threads that need not wait for one another: those of a program that finishes a row."""
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IS_HELD = not IS_INTERPRETED and torch.version.hip is None  # there a kernel depends on the size of memory as well

_library = torch.library.Library("adascope_fast", "FRAGMENT")


def register(schema: str, launcher: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator of a schema, served by `launcher` on CUDA (and on the CPU, interpreted) and by `fake` for shapes.

    A file imported under a second name, `kernels.step` beside `adascope_fast.kernels.step`, gets the operator of the
    first. One with another schema is from another copy of the kernels, and torch refuses it.
    """
    name = schema[: schema.index("(")]
    defined = getattr(torch.ops.adascope_fast, name, None)
    if defined is not None and defined.default._schema == torch._C.parse_schema(f"adascope_fast::{schema}"):
        return defined.default
    _library.define(schema)
    _library.impl(name, launcher, "CUDA")
    if IS_INTERPRETED:
        _library.impl(name, launcher, "CPU")
    torch.library.register_fake(f"adascope_fast::{name}", fake, lib=_library)
    return getattr(torch.ops.adascope_fast, name).default


_held: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""Compiled kernels and their constants in order, by all that Triton would compile anew for."""


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_threads: int = NUM_THREADS, **constants: Any
) -> None:
    """Run a kernel on the device of its first argument, multiply-adds unfused; a grid with no programs is no launch.

    A kernel that was compiled for such arguments before is started by its handle: Triton takes 15 us to find it again.
    """
    if 0 in grid:
        return
    device = arguments[0].device
    if device.index is not None and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, *arguments, num_threads=num_threads, **constants)
    key = (id(kernel), device, num_threads, *constants.values(), *_specialised(arguments))
    held = _held.get(key)
    if held is not None:
        compiled, values = held
        compiled[grid if len(grid) == 3 else (*grid, 1, 1)[:3]](*arguments, *values)
        return
    options = {"num_warps": max(1, num_threads // WAVE), "enable_fp_fusion": False}
    compiled = kernel[grid](*arguments, **constants, **options)
    if compiled is not None and IS_HELD:
        _held[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def _specialised(arguments: tuple[Any, ...]) -> list[Any]:
    """What a kernel may be compiled anew for: type and alignment of memory, and the whole numbers."""
    found: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        if kind is int:
            found.append(argument)
        elif kind is float:
            found.append(None)
        else:
            found.append(argument.dtype)
            found.append(argument.data_ptr() % 16 == 0)
    return found
