"""A kernel that was compiled before is started by its handle: by the right one, with the arguments in their order."""

import importlib.util
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1" or find_spec("triton") is None:
    pytest.skip("needs triton and not its interpreter, which compiles nothing", allow_module_level=True)

from adascope_fast.kernels import gaussian_kl, library

BENCH = Path(__file__).parents[2] / "bench" / "kernels" / "launches.py"


def _launches() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_launches", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch):
    """(compiled function, programs, arguments) of every launch that reaches the driver."""
    launches, found = _launches(), []

    class Recording(launches._NoDriver):
        def __init__(self) -> None:
            super().__init__()
            self.utils.load_binary = lambda *_: (1, object(), 32, 0, 1024)  # a function of its own for each binary

        def launcher_cls(self, *_: Any) -> Any:
            return lambda *args: found.append((args[4], args[:3], args[9:]))

    monkeypatch.setattr(launches, "_NoDriver", Recording)
    monkeypatch.setattr(library, "_held", {})
    with launches.driven():
        yield found


def _values(arguments: tuple) -> list:
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]


def _call(output: torch.Tensor, ref: torch.Tensor, d: int = 64, stride: int = 64, block: int = 1024) -> None:
    partial = torch.zeros(8)
    library.launch(
        gaussian_kl.output_square_kernel, (2, 1), partial, output, ref, d, 1024, 1, stride, stride, BLOCK=block
    )


LATENTS = torch.zeros(4, 64)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "another type": {"output": LATENTS.bfloat16()},
    "misaligned": {"ref": torch.zeros(260)[1:257].view(4, 64)},
    "an odd length": {"d": 63},
    "a length of 1": {"d": 1},
    "an odd stride": {"stride": 65},
    "a large stride": {"stride": 2**31},
    "another constant": {"block": 512},
}


def test_a_handle_is_that_of_the_kernel_that_triton_would_find(started: list):
    functions: dict[str, Any] = {}
    for name, changes in VARIANTS.items():
        arguments: dict[str, Any] = {"output": LATENTS, "ref": LATENTS} | changes
        _call(**arguments)
        _call(**arguments)
        library._held.clear()
        _call(**arguments)
        first, held, again = started[-3:]
        assert first[0] is held[0] is again[0], name
        assert first[1] == held[1] == again[1] == (2, 1, 1)
        fresh = [_values(launch[2])[1:] for launch in (first, held, again)]  # but for the memory that is written
        assert fresh[0] == fresh[1] == fresh[2], name
        functions[name] = first[0]
    assert len(set(map(id, functions.values()))) == len(VARIANTS), "Triton compiles each anew"


def test_handles_do_not_mix(started: list):
    """One after another without forgetting: each variant keeps its own kernel."""
    for _ in range(2):
        for changes in VARIANTS.values():
            arguments: dict[str, Any] = {"output": LATENTS, "ref": LATENTS} | changes
            _call(**arguments)
    first, second = started[: len(VARIANTS)], started[len(VARIANTS) :]
    assert [launch[0] for launch in first] == [launch[0] for launch in second]
    assert len(library._held) == len(VARIANTS)


def test_no_programs_are_no_launch(started: list):
    library.launch(gaussian_kl.output_square_kernel, (0, 1), torch.zeros(1), LATENTS, LATENTS, 64, 1024, 1, 64, 64)
    assert started == []
