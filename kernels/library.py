"""Launching a kernel, and registering its launcher as an opaque operator `torch.ops.adascope_fast.<name>`.

Opaque, so that torch.compile neither traces into a launcher (there may be no GPU driver to ask) nor hands the kernels
to Inductor, which would make float arguments double and pick its own configuration. Autograd stays outside.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

NUM_THREADS = 128  # of a program, with 8 elements each: loads of 128 bits where these have 16
WAVE = 64 if torch.version.hip else 32
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

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


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument, multiply-adds unfused; a grid with no programs is no launch."""
    if 0 in grid:
        return
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants, num_warps=NUM_THREADS // WAVE, enable_fp_fusion=False)
