"""One timing of one operation, shape, number of rows, types, layout and provider: what `run.py` hands to pytest.

`benchmark` (pytest-benchmark) times the host: the call without waiting for the device. On a GPU the device is timed by
events around a replayed graph, behind a write that flushes the L2 cache; so neither the host nor a warm cache shows.
Each case adds its row to a file as soon as it is done, so that a run that is cut short keeps what it has. On a CPU
"kernels, host only" runs our operators with the launches left out.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flow_grpo
import pytest
import torch
from plan import Case
from timed import TIMED, Outputs, Timed, first_rows, inputs
from torch import Tensor

from adascope_fast import ops, reference

SETTINGS = json.loads(Path(os.environ["KERNEL_BENCH"]).read_text())
DEVICE = SETTINGS["device"]
IS_GPU = DEVICE == "cuda"
CHECKED_ROWS = 8
FLUSH_BYTES = 256 << 20
BYTES_NEEDED = 200  # an element, by the reference in float32 with its intermediates, and by the checks
CASES = [Case(*case) for case in SETTINGS["cases"]]
OPERATIONS = {operation.name: operation for operation in TIMED}


@pytest.fixture(autouse=True)
def in_time() -> None:
    if time.time() > SETTINGS["deadline"]:
        pytest.skip("the time allowed had passed")


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_kernel(benchmark: Any, case: Case) -> None:
    operation, size = OPERATIONS[case.operation], tuple(map(int, case.shape.split("x")))
    num_elements = case.rows * math.prod(size)
    if IS_GPU and num_elements * BYTES_NEEDED > torch.cuda.mem_get_info()[0]:
        pytest.skip("it would not fit in memory")
    data = inputs(case.rows, size, case.dtype, case.layout, DEVICE)
    call, context = provided(operation, case.provider, data)
    row = case._asdict() | {"timed": operation.timed}
    row["bytes_moved"] = operation.bytes_moved(case.dtype) * num_elements
    synchronize = torch.cuda.synchronize if IS_GPU else None
    with context as launches:
        outputs = call()
        if IS_GPU or case.provider != "kernels":
            row["error"] = relative_error(operation, data, outputs)
        else:
            row["launches"] = len(launches)
        if IS_GPU:
            del outputs
            row |= device_facts(call)
        benchmark.pedantic(call, setup=synchronize, rounds=SETTINGS["rounds"], iterations=1, warmup_rounds=3)
    row["host_us"] = round(benchmark.stats["median"] * 1e6, 1)
    with Path(SETTINGS["rows_file"]).open("a") as file:
        file.write(json.dumps(row) + "\n")


def provided(operation: Timed, provider: str, data: SimpleNamespace) -> tuple[Callable[[], Outputs], Any]:
    """The call to time, and the context to time it in."""
    if provider == "eager":
        return lambda: operation.call(reference, data), nullcontext()
    graph_call = operation.graph_call or operation.call
    if provider == "flow_grpo":
        theirs = SimpleNamespace(**vars(data) | {"coef": data.schedule})
        return lambda: graph_call(flow_grpo, theirs), nullcontext()
    if provider == "compile":
        torch.compiler.reset()
        function = torch.compile(getattr(reference, operation.function), dynamic=False)
        compiled = SimpleNamespace(**{operation.function: function})
        return lambda: graph_call(compiled, data), nullcontext()
    if IS_GPU:
        return lambda: operation.call(ops, data), ops.strict()
    from launches import kernels_for_cpu, recorded

    kernels = kernels_for_cpu()
    return lambda: operation.call(kernels, data), recorded()


def relative_error(operation: Timed, data: SimpleNamespace, outputs: Outputs) -> float:
    """The largest difference from float64 over the first rows, as a share of the largest exact number."""
    rows = first_rows(data, CHECKED_ROWS)
    got = tuple(x[:CHECKED_ROWS].detach() for x in outputs)
    errors = [
        ((x.double() - exact).abs().max() / exact.abs().max()).item()
        for x, exact in zip(got, operation.exact(rows, got), strict=True)
    ]
    return max(errors)


def device_facts(call: Callable[[], Any]) -> dict[str, Any]:
    """Microseconds on the device, launches, and the memory that a call needs beyond its inputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return {"peak_memory_mb": round(peak / 2**20, 2), "launches": launches_of(call), **device_us(call)}


def launches_of(call: Callable[[], Any]) -> int | None:
    """Kernels, copies and fills that a call starts; None where the profiler sees no device."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    events = profiled.events() or []
    return sum(event.device_type == DeviceType.CUDA for event in events) or None


def device_us(call: Callable[[], Any]) -> dict[str, Any]:
    """Median time of a replayed graph of the call with a cold L2 cache; without a graph where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph, timed_by = torch.cuda.CUDAGraph(), "graph"
    run: Callable[[], Any] = graph.replay
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        run, timed_by = call, "events"
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    return {"device_us": statistics.median(timed(run, flush)), "timed_by": timed_by}


def timed(run: Callable[[], Any], flush: Tensor) -> Iterator[float]:
    """Microseconds of each run, behind a flush long enough for the host to get ahead."""
    pairs = []
    for _ in range(SETTINGS["rounds"]):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return (1000 * start.elapsed_time(end) for start, end in pairs)
