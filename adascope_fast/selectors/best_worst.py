"""Which images of a group are trained: its best and its worst, the sample-wise sibling of choosing steps.

`b` images. Advantages compare an image with all of its group; those in the middle have small ones and cost as much.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def best_and_worst(rewards: Float[Tensor, " b"], prompts: list[str], k: int) -> Bool[Tensor, " b"]:
    """True for the `k` images with the highest reward of each prompt and the `k` with the lowest; on the CPU.

    All of a group of 2 k or fewer; of equal rewards the earlier image counts as the lower.
    """
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    values, chosen = rewards.double().cpu().tolist(), torch.zeros(len(prompts), dtype=torch.bool)
    for rows in groups.values():
        ranked = sorted(rows, key=lambda row: values[row])
        chosen[[*ranked[:k], *ranked[-k:]]] = True
    return chosen
