"""How structure forms and preference saturates along a trajectory, read from latents alone.

Axes: `b` samples, `t` denoising steps, noisiest first; state t is the final latent.

The paper scores decoded guesses with CLIP and the reward at every step; these correlations need no decoder, no reward.
"""

import torch
from jaxtyping import Float32
from torch import Tensor

from adascope_fast import ops
from adascope_fast.trajectory import Trajectory


@torch.no_grad()
def latent_curves(
    trajectory: Trajectory, *, steps_per_chunk: int = 8
) -> tuple[Float32[Tensor, "b t"], Float32[Tensor, "b t+1"]]:
    """Volatility 1 - corr(x0_i, x0_{i+1}) of the guided x0 guesses, and preference corr(x0_i, x_t), which ends at 1.

    x0_t is the final latent x_t. NaN where a latent is constant or not finite.

    Args:
        steps_per_chunk: steps that are copied to rows at once; bounds memory, changes nothing else.
    """
    final = trajectory.latents[:, -1:].to(trajectory.x0.dtype)  # [b, 1, *latent]
    b, t = trajectory.x0.shape[:2]
    structure, preference = [], []
    for first in range(0, t, steps_per_chunk):
        last = min(first + steps_per_chunk, t)
        now = trajectory.x0[:, first:last]
        after = trajectory.x0[:, first + 1 : last + 1]
        if last == t:
            after = torch.cat([after, final], 1)
        structure.append(_correlation(now, after))
        preference.append(_correlation(now, final.expand_as(now)))
    ends_at = torch.ones(b, 1, device=final.device)
    return 1 - torch.cat(structure, 1), torch.cat([*preference, ends_at], 1)


def _correlation(x: Tensor, y: Tensor) -> Float32[Tensor, "b k"]:
    rows = ops.correlation(x.flatten(2).flatten(0, 1), y.flatten(2).flatten(0, 1), center="sample")
    return rows.view(x.shape[:2]).float()
