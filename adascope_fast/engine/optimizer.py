"""The learning rate of each update, and AdamW whose moments have 8 bits.

The rate of an update depends on its number and the run's updates alone, so a resumed run needs no state for it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Rate = Callable[[int], float]

LEAST_8BIT = 4096
"""Elements of a tensor below which bitsandbytes keeps its moments in float32."""


def rate_of(learning_rate: float, schedule: str, *, warmup_updates: int, num_updates: int, num_cycles: int = 1) -> Rate:
    """The learning rate of update 0, 1, ... as diffusers' `get_scheduler` has it.

    Unlike there, `constant` has a warm-up too. With one, the first update has the rate 0.

    Args:
        schedule: a name of `get_scheduler`.
        warmup_updates: updates in which the rate rises from 0.
        num_updates: of the whole run, skipped ones included; the rate falls to 0 behind the last.
        num_cycles: times that `cosine_with_restarts` falls.
    """
    if schedule == "constant" and not warmup_updates:
        return lambda number: learning_rate
    from diffusers.optimization import get_scheduler

    scheduler = get_scheduler(
        "constant_with_warmup" if schedule == "constant" else schedule,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        num_warmup_steps=warmup_updates,
        num_training_steps=num_updates,
        num_cycles=num_cycles,
    )
    (factor,) = scheduler.lr_lambdas
    return lambda number: learning_rate * factor(number)


def adamw_8bit(parameters: Iterable[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with moments of 8 bits; tensors of fewer than 4,096 elements keep theirs in float32.

    bitsandbytes lays weights out anew at the first update. It is done here before, so that a run has the same layout,
    and its resumed half the same rounding, from the start.

    Args:
        settings: of torch's AdamW.

    Raises:
        ValueError: bitsandbytes is not installed, or cannot update weights on their device.
    """
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"AdamW in 8 bits needs bitsandbytes, got {type(error).__name__}: {error}; "
            f"pip install 'adascope-fast[bnb]', or set train.optimizer = \"adamw\""
        ) from error
    parameters = list(parameters)
    for parameter in parameters:
        parameter.data = parameter.data.contiguous()
    for device in {parameter.device for parameter in parameters}:
        tried = nn.Parameter(torch.zeros(LEAST_8BIT, device=device))
        tried.grad = torch.zeros_like(tried)
        try:
            AdamW8bit([tried], **settings).step()
        except Exception as error:  # which one, depends on how it was built
            raise ValueError(
                f"AdamW in 8 bits needs a bitsandbytes that works on the device of the weights, got {device.type}, on "
                f'which it raises {type(error).__name__}: {error}; upgrade it, or set train.optimizer = "adamw"'
            ) from error
    return AdamW8bit(parameters, **settings)
