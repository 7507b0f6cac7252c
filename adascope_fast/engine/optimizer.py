"""The learning rate of each update, and AdamW whose moments have 8 bits.

The rate of an update depends on its number and the run's updates alone, so a resumed run needs no state for it.
"""

from collections.abc import Callable

import torch

Rate = Callable[[int], float]


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
