"""Curves of the samples of all ranks, so that a prompt whose samples are spread over ranks gets one decision."""

from typing import Any

import numpy as np
from torch import distributed


def gathered(
    prompts: list[str], sensed: dict[str, np.ndarray] | None
) -> tuple[list[str], dict[str, np.ndarray] | None, slice]:
    """(prompts, curves) of all ranks in the order of the ranks, and which rows are this rank's.

    Without `torch.distributed`, or with one rank, what was given. Every rank calls it, in the same iteration.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return prompts, sensed, slice(0, len(prompts))
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, (prompts, sensed))
    first = sum(len(part[0]) for part in parts[: distributed.get_rank()])
    curves = None
    if sensed is not None:
        curves = {name: np.concatenate([part[1][name] for part in parts]) for name in sensed}
    return [prompt for part in parts for prompt in part[0]], curves, slice(first, first + len(prompts))
