"""Device work that repeats, as CUDA graphs: recorded once for each shape, then launched as a whole.

A small denoiser leaves a GPU waiting for the host, which launches its kernels one by one. A graph is one launch. In
return everything that the host decided while it was recorded is frozen: numbers, branches, and the address of every
tensor. So of what a piece of work depends on,

- what differs from call to call is an input: it is copied to where the graph reads it;
- tables that are read and written in place are `fixed`: a graph serves the addresses that it was recorded with;
- what else the host decides (a switch, a number) is told as `host`: other values are another graph;
- weights and gradients stay where they are and change in place, as optimisers, `Ema.swap` and `Folding` change them.
  `GradientBuffers` holds `.grad` in its place, and `watch` notices weights that have moved.

How it differs from `torch.cuda.make_graphed_callables`: forward, loss and backward are one graph; nothing runs twice to
warm up, since work that adds to a gradient may not; and what cannot be recorded runs as it would without graphs.
"""

import dataclasses
import gc
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

MOST_GRAPHS = 32

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """What records and replays: `CudaBackend`."""

    def aside(self, work: Callable[[], T]) -> T:
        """Do the work once, where work is recorded."""
        ...

    def capture(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """What replays the work, and where that leaves its results; the work is not done.

        RuntimeError where it cannot be recorded.
        """
        ...

    def num_bytes(self) -> int:
        """Memory that the recorded work holds."""
        ...

    def forget(self) -> None:
        """Give up all that was recorded."""
        ...


class Graphs:
    """Runs work, as a graph from the second time on that its shapes are met.

    Args:
        most: how many graphs are kept; work whose shapes come later runs as it would without.
        tell: called with a line for each graph, and for what will not be one.
    """

    def __init__(self, backend: Backend, *, most: int = MOST_GRAPHS, tell: Callable[[str], None] = logger.info) -> None:
        self._backend, self._most, self._tell = backend, most, tell
        self._graphs: dict[Hashable, _Graph] = {}
        self._seen: set[Hashable] = set()
        self._refused: dict[str, str] = {}
        self._addresses: list[int] = []
        self._held: dict[str, Tensor] = {}
        self._is_full = False
        self.num_replays = self.num_calls = 0

    def __call__(
        self, name: str, work: Callable[..., T], *inputs: Any, fixed: Sequence[Tensor] = (), host: Hashable = ()
    ) -> T:
        """`work(*inputs)`. Its result lies in memory that the next call, of whatever work, may write over.

        Args:
            name: of the work, for people; a name is one function, called with the same closure.
            inputs: tensors, and tuples, dicts and dataclasses of them; what is no tensor is part of `host`.
            fixed: tensors that the work reads or writes where they are.
            host: what else the host decides by within the work.
        """
        self.num_calls += 1
        given: list[Tensor] = []
        rest = _taken(inputs, given)
        context = torch.is_grad_enabled(), *_autocast(given)
        key = name, host, rest, context, tuple(_place(x) for x in given), tuple(_address(x) for x in fixed)
        graph = self._graphs.get(key)
        if graph is None and key in self._seen and name not in self._refused and self._has_room():
            graph = self._capture(key, name, work, inputs, fixed)
        if graph is not None:
            self.num_replays += 1
            return graph(given)
        if name in self._refused:
            return work(*inputs)
        self._seen.add(key)
        with _no_autocast_cache():  # with the alignment that a graph's own inputs have, as kernels are compiled for it
            return self._backend.aside(lambda: work(*_mapped(inputs, torch.clone)))

    def _has_room(self) -> bool:
        has_room = len(self._graphs) < self._most
        if not has_room and not self._is_full:
            self._tell(f"CUDA graphs: no more than {self._most} are kept, so further shapes run without")
        self._is_full = not has_room
        return has_room

    def _capture(
        self, key: Hashable, name: str, work: Callable[..., T], inputs: tuple[Any, ...], fixed: Sequence[Tensor]
    ) -> "_Graph | None":
        own = _mapped(inputs, torch.clone)
        try:
            with _no_autocast_cache():
                replay, result = self._backend.capture(lambda: work(*own))
        except RuntimeError as error:  # what the device's library and torch raise alike, for lack of memory too
            self._refused[name] = reason = _first_line(error)
            self._tell(f"CUDA graphs: {name} cannot be recorded and runs without: {reason}")
            return None
        graph = self._graphs[key] = _Graph(replay, _tensors(own), result, tuple(fixed))
        count, size = len(self._graphs), self._backend.num_bytes() / 2**30
        self._tell(f"CUDA graphs: {name} is recorded, graph {count} of at most {self._most}, {size:.2f} GiB in all")
        return graph

    def hold(self, name: str, value: Tensor, *, room: int = 0) -> Tensor:
        """The same values where graphs read them: a name is one place, as long as its values have one shape.

        Args:
            room: rows that there may be; those that are not given are what they were, zero at first.
        """
        own, rows = self._held.get(name), max(room, len(value))
        has_room = own is not None and (len(own) == rows or (room > 0 and len(own) > rows))
        if own is None or not has_room or _kind(own) != _kind(value):
            own = self._held[name] = value.new_zeros((rows, *value.shape[1:]))
        own[: len(value)].copy_(value)
        return own

    def refuse(self, name: str, why: str) -> None:
        """Run work of this name without graphs."""
        if name not in self._refused:
            self._refused[name] = why
            self._tell(f"CUDA graphs: {name} runs without: {why}")

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Forget all graphs if any of these tensors, which they read where they are, has moved since the last call."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        if self._addresses not in ([], addresses) and self._graphs:
            self._tell("CUDA graphs: the weights have moved in memory, so graphs are recorded anew")
            self.forget()
        self._addresses = addresses

    def forget(self) -> None:
        """Give up all graphs and their memory."""
        self._graphs.clear()
        self._seen.clear()
        self._backend.forget()

    def words(self) -> str:
        """What became graphs and what did not, in a line."""
        size = self._backend.num_bytes() / 2**30
        said = f"on: {len(self._graphs)} graphs of {size:.2f} GiB served {self.num_replays} of {self.num_calls} calls"
        return "; ".join([said, *(f"not {name}: {why}" for name, why in self._refused.items())])


class GradientBuffers:
    """Holds the `.grad` of each parameter where it is, as a recorded backward pass adds to that memory.

    `zero_grad(set_to_none=True)` would leave a graph adding to memory that is no longer anybody's.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._buffers = [torch.zeros_like(parameter) for parameter in self._parameters]

    def clear(self) -> None:
        """Zero gradients, in their place."""
        torch._foreach_zero_(self._buffers)
        for parameter, buffer in zip(self._parameters, self._buffers, strict=True):
            parameter.grad = buffer


class CudaBackend:
    """`torch.cuda.CUDAGraph`s on one device, recorded on one stream into one pool of memory.

    The pool is shared, so a replay may write over the results of another graph. What is not recorded yet runs on that
    stream too: autograd remembers the stream of a parameter's first use, and cuBLAS keeps memory for each stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self.forget()

    def aside(self, work: Callable[[], T]) -> T:
        """See `Backend`."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                result = work()
        finally:
            current.wait_stream(self._stream)
        for tensor in _tensors(result):
            if tensor.is_cuda:
                tensor.record_stream(current)
        return result

    def capture(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """See `Backend`. Work of other threads, such as a reward's, may go on meanwhile."""
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)  # even if it fails: a graph that is destroyed takes the stream's cuBLAS memory along
        gc.collect()  # what a collection amid the recording would free may call what cannot be recorded
        is_enabled = gc.isenabled()
        gc.disable()
        try:
            # The outer context brings the stream back where the inner one cannot, after a recording that failed.
            recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
            with torch.cuda.stream(self._stream), recording:
                result = work()
        finally:
            if is_enabled:
                gc.enable()
        return graph.replay, result

    def num_bytes(self) -> int:
        """Of the pool."""
        pool = tuple(self._pool)
        return sum(part["total_size"] for part in torch.cuda.memory_snapshot() if part["segment_pool_id"] == pool)

    def forget(self) -> None:
        """See `Backend`."""
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._pool = torch.cuda.graph_pool_handle()


class _Graph:
    """A recorded piece of work, its own inputs and its results."""

    def __init__(
        self, replay: Callable[[], None], inputs: list[Tensor], result: Any, fixed: tuple[Tensor, ...]
    ) -> None:
        self._replay, self._inputs, self._result = replay, inputs, result
        self._fixed = fixed  # kept, so that no other tensor comes to lie there
        dtypes = dict.fromkeys(x.dtype for x in inputs)
        self._groups = [[i for i, x in enumerate(inputs) if x.dtype == dtype] for dtype in dtypes]

    def __call__(self, given: list[Tensor]) -> Any:
        for group in self._groups:
            torch._foreach_copy_([self._inputs[i] for i in group], [given[i] for i in group])
        self._replay()
        return self._result


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Weights are cast where they are used: a cast that was kept would be frozen, and freed with its context."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _autocast(tensors: list[Tensor]) -> tuple[Hashable, ...]:
    kinds = dict.fromkeys(tensor.device.type for tensor in tensors)
    return tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds)


def _kind(tensor: Tensor) -> tuple[Hashable, ...]:
    return tensor.shape[1:], tensor.dtype, tensor.device


def _place(tensor: Tensor) -> tuple[Hashable, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _address(tensor: Tensor) -> tuple[Hashable, ...]:
    return tensor.data_ptr(), *_place(tensor)


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(part, change) for name, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value)]
        return type(value)(**{name: _mapped(getattr(value, name), change) for name in fields})
    return value


def _taken(value: Any, tensors: list[Tensor]) -> Hashable:
    """The structure without its tensors, as a key; they are added to `tensors`, in the order of `_mapped`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return Tensor
    if isinstance(value, dict):
        return tuple([(name, _taken(part, tensors)) for name, part in value.items()])
    if isinstance(value, list | tuple):
        return type(value), *[_taken(part, tensors) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), *[_taken(getattr(value, field.name), tensors) for field in dataclasses.fields(value)]
    return value


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a structure, in its order."""
    found: list[Tensor] = []
    _taken(value, found)
    return found


def _first_line(error: BaseException) -> str:
    """What went wrong first: the end of a recording that failed raises again."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
