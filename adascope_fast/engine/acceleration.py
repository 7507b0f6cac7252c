"""What makes the same computation faster: compilation, memory layout, matrix precision, batches that fit.

Each is a key of the configuration's `acceleration` section; "auto" turns on what pays on the device at hand.
"""

import resource
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from adascope_fast.engine.graphs import CudaBackend, Graphs
from adascope_fast.engine.settings import Acceleration as Acceleration
from adascope_fast.engine.settings import Switch

T = TypeVar("T")

AUTOCAST: dict[str, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The type that `train.mixed_precision` casts to."""


def autocast_of(mixed_precision: str, device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """Makes the context in which a denoiser runs with this `train.mixed_precision`."""
    dtype = AUTOCAST[mixed_precision]
    return nullcontext if dtype is None else partial(torch.autocast, device_type, dtype)


def accelerate(
    denoiser: nn.Module, acceleration: Acceleration, device: torch.device, *, decoder: nn.Module | None = None
) -> dict[str, str]:
    """Prepare the denoiser, in place, on its device; what was done for each key, and why, in words.

    Args:
        decoder: what makes pictures of latents, whose memory layout is chosen with the denoiser's.

    Raises:
        ValueError: something was asked for that this device or model has not.
    """
    torch.set_float32_matmul_precision(acceleration.matmul_precision)
    return {
        "channels_last": _channels_last((denoiser, decoder), acceleration.channels_last),
        "compile": _compile(denoiser, acceleration, device),
        "cuda_graphs": _cuda_graphs(acceleration.cuda_graphs, device),
        "fused_optimizer": "on" if acceleration.is_fused else "off",
        "fold_adapter": "on" if acceleration.folds else "off",
        "matmul_precision": acceleration.matmul_precision,
    }


def _channels_last(models: tuple[nn.Module | None, ...], choice: Switch) -> str:
    if choice == "off":
        return "off"
    chosen = [model for model in models if model is not None and (choice == "on" or _convolves(model))]
    for model in chosen:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return f"on: {', '.join(type(model).__name__ for model in chosen)}" if chosen else "off: pays for convolutions"


def _convolves(model: nn.Module) -> bool:
    """Whether it has convolutions whose windows overlap; those that cut a picture into patches gain nothing."""
    return any(isinstance(layer, nn.Conv2d) and layer.kernel_size > layer.stride for layer in model.modules())


def _compile(denoiser: nn.Module, acceleration: Acceleration, device: torch.device) -> str:
    choice = acceleration.compile
    if choice == "auto":
        if device.type != "cuda":
            return "off: takes minutes on a CPU"
        choice = "regional"
    if choice == "off":
        return "off"
    # One graph a batch size: the rollout's, the update's, and their last ones.
    # None of them is a CUDA graph: compiled parts are recorded with what surrounds them, as the kernels that they are.
    options: dict[str, Any] = {"backend": acceleration.compile_backend, "dynamic": False}
    if choice == "full":
        denoiser.compile(**options)
        return "full"
    # diffusers names the blocks to compile, or (SD3) only those that must stay on one device: the same ones.
    blocks = set(getattr(denoiser, "_repeated_blocks", None) or getattr(denoiser, "_no_split_modules", None) or ())
    found = [module for module in denoiser.modules() if type(module).__name__ in blocks]
    if not found:
        raise ValueError(
            f"regional compilation needs a model that names its repeated blocks, got {type(denoiser).__name__}; "
            f"set acceleration.compile = 'full' or 'off'"
        )
    for block in found:
        block.compile(**options)
    return f"regional: {len(found)} blocks"


def _cuda_graphs(choice: Switch, device: torch.device) -> str:
    if choice == "on" and device.type != "cuda":
        raise ValueError(
            f'acceleration.cuda_graphs = "on" needs a CUDA device, got {device.type!r}; set it to "auto" or "off"'
        )
    if choice == "auto":
        return "off: not seen on a GPU yet" if device.type == "cuda" else "off: needs a GPU"
    return choice


def graphs_of(acceleration: Acceleration, device: torch.device, tell: Callable[[str], None]) -> Graphs | None:
    """What an engine records by, if that is asked for; `tell` is given lines on what is recorded and what is not."""
    return Graphs(CudaBackend(device), tell=tell) if acceleration.cuda_graphs == "on" else None


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had so far: of tensors on a GPU, elsewhere of all that is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def halving(attempt: Callable[[int], T], size: int, name: str) -> tuple[T, int]:
    """`attempt(size)`, again with half the size as often as memory runs out; the result, and the size that did it.

    Raises:
        torch.OutOfMemoryError: a size of 1 does not fit either.
    """
    while True:
        try:
            return attempt(size), size
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise torch.OutOfMemoryError(
                    f"memory runs out even with {name} = 1; "
                    f"set model.gradient_checkpointing = true or model.dtype = 'bfloat16'"
                ) from error
        # Outside the handler: the traceback holds on to the tensors of the attempt.
        size = -(-size // 2)
        torch.cuda.empty_cache()
