"""What an engine's iteration costs outside the denoiser: kernel launches, torch operations, and the bytes of both.

Torch operations are seen by a dispatch mode, below autograd and inside our operators; views and allocations move
nothing and are left out. Launches run in Triton's interpreter, so values are right, and every load and store that a
kernel makes is counted as it is made: in elements that its mask lets through, as often as the program asks for them.

What happens between the denoiser's inputs and its output, and in its backward pass, is the model's business and is not
counted; nor is how its inputs were made, which is told apart. Needs TRITON_INTERPRET=1 and tensors on the CPU.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CHECKOUT = Path(__file__).parents[2]
FEW = 64
"""Elements of one access from which it is of latents: what a kernel reads of a few rows' numbers is less."""
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "set_"}
MADE_LIKE = {"new_full", "new_ones", "new_zeros", "full_like", "ones_like", "zeros_like", "rand_like", "randn_like"}
GATHERS = {"index", "index_select", "gather", "embedding"}
OVERWRITES = {"copy_", "fill_", "zero_", "index_put_", "_index_put_impl_", "normal_", "random_", "uniform_"}


@dataclass
class Operation:
    """One torch operation: its name and line, whether a tensor of latent size is in it, and the bytes it moves."""

    name: str
    line: str
    is_large: bool
    num_bytes: int
    inputs: list[int]
    is_models: bool = False
    """It made what the denoiser is given."""


@dataclass
class Counts:
    """What one section of an iteration did outside the denoiser."""

    launches: list[str] = field(default_factory=list)
    kernel_bytes: int = 0
    """Read and written by our kernels, of latents."""
    operations: list[Operation] = field(default_factory=list)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.launches + other.launches,
            self.kernel_bytes + other.kernel_bytes,
            self.operations + other.operations,
        )

    def told(self, num_elements: int) -> dict[str, Any]:
        """As JSON; bytes are of one of the `num_elements` latent elements."""
        large, small, models = (
            [one for one in self.operations if which(one)]
            for which in (
                lambda one: one.is_large and not one.is_models,
                lambda one: not one.is_large and not one.is_models,
                lambda one: one.is_models,
            )
        )
        return {
            "launches": len(self.launches),
            "latent_operations": len(large),
            "small_operations": len(small),
            "model_input_operations": len(models),
            "kernel_bytes": round(self.kernel_bytes / num_elements, 2),
            "operation_bytes": round(sum(one.num_bytes for one in large) / num_elements, 2),
            "kernels": dict(Counter(self.launches)),
            "latent_lines": dict(Counter(f"{one.name} {one.line}" for one in large)),
            "small_lines": dict(Counter(f"{one.name} {one.line}" for one in small)),
            "model_input_lines": dict(Counter(f"{one.name} {one.line}" for one in models)),
        }


class Counting(TorchDispatchMode):
    """Counts from one `cut` to the next, while it is entered.

    Args:
        denoiser: what happens inside of it is left out.
        latent_size: elements of one latent; an operation is of latent size if a tensor in it has as many.
    """

    def __init__(self, denoiser: nn.Module, latent_size: int) -> None:
        super().__init__()
        self._latent_size = latent_size
        self._counts, self._kept = Counts(), []
        self._made_by: dict[int, list[Operation]] = {}
        self._is_paused = False
        denoiser.register_forward_pre_hook(self._enter_model, with_kwargs=True)
        denoiser.register_forward_hook(self._leave_model, always_call=True)

    def cut(self) -> Counts:
        """What was counted since the last cut."""
        counts, self._counts = self._counts, Counts()
        self._kept, self._made_by = [], {}
        return counts

    @contextmanager
    def everything(self) -> Iterator[None]:
        """Count torch operations, launches, and what these load and store."""
        from triton.runtime import interpreter

        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        replaced = [
            (builder, "create_masked_load", self._counting_load),
            (builder, "create_masked_store", self._counting_store),
            (executor, "__call__", self._counting_launch),
            (torch.autograd, "backward", self._ending_model),
            (torch.autograd, "grad", self._ending_model),
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
        for (owner, name, wrap), (_, _, function) in zip(replaced, before, strict=True):
            setattr(owner, name, wrap(function))
        try:
            with self:
                yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "adascope_fast":  # one of our operators: what its launcher does is counted
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        result = func(*args, **kwargs)
        if not self._is_paused:
            self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func._opname
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        given = {_storage(x) for x in inputs}
        if name in ALLOCATIONS or (not func._schema.is_mutable and outputs and {_storage(x) for x in outputs} <= given):
            return
        written, read = outputs, [x for x in inputs if x is not kwargs.get("out")]
        if name in GATHERS:
            source = max(inputs, key=Tensor.numel)
            read = [*outputs, *(x for x in inputs if x is not source)]
        elif name in MADE_LIKE:
            read = []
        elif name in OVERWRITES:
            read = inputs[1:]
            written = inputs[-1:] if "index_put" in name else outputs
        touched = [*read, *written]
        operation = Operation(
            name,
            _line(),
            any(x.numel() >= self._latent_size for x in touched),
            sum(_num_bytes(x) for x in touched),
            [_storage(x) for x in inputs if x.is_floating_point()],
        )
        self._counts.operations.append(operation)
        self._kept += outputs  # a storage that lives on is not another's
        for x in outputs:
            self._made_by.setdefault(_storage(x), []).append(operation)

    def _enter_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._is_paused = True
        waiting = [_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        while waiting:
            for operation in self._made_by.pop(waiting.pop(), []):
                operation.is_models = True
                waiting += operation.inputs

    def _leave_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self._is_paused = False
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(self._enter_backward)

    def _enter_backward(self, gradient: Tensor) -> None:
        self._is_paused = True

    def _ending_model(self, differentiate: Callable[..., Any]) -> Callable[..., Any]:
        """A backward pass ends in the denoiser, or does not come to it."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            try:
                return differentiate(*args, **kwargs)
            finally:
                self._is_paused = False

        return wrapped

    def _counting_launch(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self._counts.launches.append(executor.fn.__name__)
            self._is_paused = True
            try:
                return call(executor, *args, **kwargs)
            finally:
                self._is_paused = False

        return wrapped

    def _counting_load(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self._add(mask, ptrs.get_element_ty())
            return load(builder, ptrs, mask, *rest)

        return wrapped

    def _counting_store(self, store: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._add(mask, ptrs.get_element_ty())
            return store(builder, ptrs, value, mask, *rest)

        return wrapped

    def _add(self, mask: Any, dtype: Any) -> None:
        num_elements = int(mask.data.sum())
        if num_elements >= FEW:
            self._counts.kernel_bytes += num_elements * dtype.primitive_bitwidth // 8


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _num_bytes(x: Tensor) -> int:
    """Of the elements that differ in memory: an expanded axis is read once."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride != 0)
    return torch.Size(sizes).numel() * x.element_size()


def _line() -> str:
    """The innermost line of the package that is running."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(CHECKOUT) and not path.is_relative_to(CHECKOUT / "bench"):
            return f"{path.relative_to(CHECKOUT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
