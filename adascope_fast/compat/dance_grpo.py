"""DanceGRPO's steps (XueZeyue/DanceGRPO) under their names, with the numbers that they give.

    from adascope_fast.compat.dance_grpo import ddim_step_with_logprob, flux_step, sd3_time_shift

Its log-probability of a flow's step has no constants: -(x - mean)^2 / (2 std^2), mean over the latent.
Its DDIM step is ddpo-pytorch's.
"""

from typing import Any

import torch
from torch import Tensor

from adascope_fast.compat.ddpo_pytorch import ddim_step_with_logprob as ddim_step_with_logprob
from adascope_fast.compat.ddpo_pytorch import pipeline_with_logprob as pipeline_with_logprob
from adascope_fast.compat.steps import mean_of, step


def sd3_time_shift(shift: float, t: Any) -> Any:
    """shift * t / (1 + (shift - 1) * t)."""
    return (shift * t) / (1 + (shift - 1) * t)


def flux_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
) -> tuple[Tensor, ...]:
    """(prev_sample, guess of x0, log_prob [n]) of one step of a flow; without `grpo` (mean, guess of x0).

    Args:
        sigmas: [t + 1] of the states, noisiest first.
        index: of the step.
        prev_sample: what was drawn before; None draws it.
        sde_solver: the mean is that of the SDE with noise eta, else that of the ODE.
    """
    sigmas = sigmas.to(latents.device, torch.float64)
    sigma, following = sigmas[index], sigmas[index + 1]
    change, one = following - sigma, torch.ones((), dtype=torch.float64, device=latents.device)
    weights = [one, change, eta * (-change).sqrt()]
    if sde_solver:  # the score -(x - (1 - sigma) x0) / sigma^2 with x0 = x - sigma * output
        drift = 0.5 * eta**2 / sigma
        weights[:2] = [1 + drift * change, change * (1 + drift * (1 - sigma))]
    coef = torch.stack(weights).float().expand(len(latents), 3)
    guess = latents - sigma.to(latents.dtype) * model_output
    if not grpo:
        return mean_of(latents, model_output, coef), guess
    drawn, error = step(latents, model_output, coef, prev_sample=prev_sample, generator=None, kind="squared_error")
    return drawn, guess, error / (2 * coef[:, 2].square())
