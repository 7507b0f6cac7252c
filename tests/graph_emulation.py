"""CUDA graphs on the CPU: every operation is recorded with its tensors, and done again on the same tensors.

It freezes what a CUDA graph freezes. Numbers are those of the recording. Addresses are too: of a tensor that is given
other memory later, as `parameter.data = ...` does, the old memory is read. Recording leaves no trace: tensors from
outside are as before, and those that were made hold bytes of 255 (NaN, -1) until a replay. A replay leaves such bytes
in the tensors of all other graphs, with which a pool of memory is shared. It refuses what waits for the device, copies
from the host, draws random numbers, and asks a generator for its state.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Never, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

T = TypeVar("T")


@dataclass
class Operation:
    """One that was done, with its tensors by address, and those that it made."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[tuple[int, Tensor]]
    """Place among the leaves of what it returns, and the tensor."""

    def __call__(self) -> None:
        leaves = tree_leaves(self.function(*self.args, **self.kwargs))
        for place, tensor in self.made:
            tensor.copy_(leaves[place])


class Recorder(TorchDispatchMode):
    """Records what is done within it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.made: dict[int, Any] = {}
        """Storages of tensors that were made, by address."""
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse(func, args)
        used = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func._schema.is_mutable:
            for tensor in _written(func, args, kwargs):
                self._remember(tensor)
        generator = kwargs.get("generator") or torch.default_generator
        state = generator.get_state()
        result = func(*args, **kwargs)
        if not torch.equal(state, generator.get_state()):
            generator.set_state(state)
            raise RuntimeError(f"{func} draws from a generator that is not registered with the graph")
        known = {_address(tensor) for tensor in used}
        made = [
            (place, tensor.data)
            for place, tensor in enumerate(tree_leaves(result))
            if isinstance(tensor, Tensor) and _address(tensor) not in known
        ]
        for _, tensor in made:
            storage = tensor.untyped_storage()
            self.made[storage.data_ptr()] = storage
        if made or func._schema.is_mutable:
            own_args, own_kwargs = tree_map(lambda x: x.data if isinstance(x, Tensor) else x, (args, kwargs))
            self.operations.append(Operation(func, own_args, own_kwargs, made))
        return result

    def _remember(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self.made and place not in self._before:
            self._before[place] = storage, storage.clone()

    def undo(self) -> None:
        """Leave what was outside as it was, and nothing in what was made."""
        for storage, before in self._before.values():
            storage.copy_(before)
        self.spoil()

    def spoil(self) -> None:
        """What other work that shares the memory does to it."""
        for storage in self.made.values():
            storage.fill_(255)


@dataclass
class Emulation:
    """A `Backend` of the CPU."""

    recorders: list[Recorder] = field(default_factory=list)
    num_replays: int = 0

    def aside(self, work: Callable[[], T]) -> T:
        return work()

    def capture(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        recorder = Recorder()
        try:
            with recorder, mock.patch("torch.get_rng_state", _refuse_state):
                result = work()
        finally:
            recorder.undo()
        self.recorders.append(recorder)

        @torch.no_grad()
        def replay() -> None:
            self.num_replays += 1
            for other in self.recorders:
                if other is not recorder:
                    other.spoil()
            with torch.autocast("cpu", enabled=False):  # casts were recorded
                for operation in recorder.operations:
                    operation()

        return replay, result

    def num_bytes(self) -> int:
        return sum(storage.nbytes() for recorder in self.recorders for storage in recorder.made.values())

    def forget(self) -> None:
        self.recorders.clear()


def _refuse_state() -> Never:
    raise RuntimeError("the state of a generator cannot be known during capture")


def _refuse(func: Any, args: tuple[Any, ...]) -> None:
    """RuntimeError for what a stream that is being recorded does not permit."""
    waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
    if func is torch.ops.aten.index.Tensor:
        waits = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if waits:
        raise RuntimeError(f"operation not permitted when stream is capturing: {func} waits for the device")
    if func is torch.ops.aten.lift_fresh.default:
        raise RuntimeError("operation not permitted when stream is capturing: a tensor of the host's values is copied")


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that the schema says are written."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.name in kwargs else args[place]
            found += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return found


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
