"""The rollout's step and the training step as flow_grpo's scripts compute them: plain PyTorch, nothing fused.

Written from the formulas of Flow-GRPO (2505.05470) and of PPO's clipped loss, under the signatures of `reference`. It
differs from that in this: `coef` [n, 3] is (t, next t, noise level) of each row, and each call derives the step's
coefficients from it; latents are made float32 first, and so is what a step returns, so the log-probability is that of a
sample not yet rounded; guidance is taken in the model's own type, as diffusers' pipelines do. Their look-up of a step's
noise levels on the host, which waits for the device, is left out.
"""

import math

import torch
from torch import Tensor


def _transition(sample: Tensor, output: Tensor, schedule: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the Gaussian that the next sample is drawn from, in float32, and its standard deviation."""
    t, next_t, level = (column.view(-1, *[1] * (sample.dim() - 1)) for column in schedule.unbind(1))
    dt = next_t - t
    diffusion = level * torch.sqrt(t / (1 - t))
    drift = diffusion**2 / (2 * t)
    mean = sample.float() * (1 + drift * dt) + output.float() * (1 + drift * (1 - t)) * dt
    return mean, diffusion * torch.sqrt(-dt)


def _log_prob(prev_sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    log_prob = -((prev_sample.detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_prob.mean(dim=tuple(range(1, log_prob.dim())))


@torch.no_grad()
def transition_step(
    sample: Tensor, output: Tensor, noise: Tensor, coef: Tensor, *, output_uncond: Tensor, guidance_scale: float
) -> tuple[Tensor, Tensor]:
    """The next sample, in float32, and its log-probability."""
    output = output_uncond + guidance_scale * (output - output_uncond)
    mean, std = _transition(sample, output, coef)
    prev_sample = mean + std * noise
    return prev_sample, _log_prob(prev_sample, mean, std)


def transition_log_prob(sample: Tensor, output: Tensor, prev_sample: Tensor, coef: Tensor) -> Tensor:
    """Mean over a row's elements of log N(prev_sample; mean, std^2)."""
    return _log_prob(prev_sample.float(), *_transition(sample, output, coef))


def transition_policy_loss(
    sample: Tensor,
    output: Tensor,
    prev_sample: Tensor,
    coef: Tensor,
    old_log_prob: Tensor | None,
    advantage: Tensor,
    *,
    clip_range: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss of each row, not yet averaged so that rows can be checked, and what is logged beside it."""
    log_prob = transition_log_prob(sample, output, prev_sample, coef)
    old_log_prob = log_prob.detach() if old_log_prob is None else old_log_prob
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    with torch.no_grad():
        approx_kl = 0.5 * torch.mean((log_prob - old_log_prob) ** 2)
        clipfrac = torch.mean((torch.abs(ratio - 1) > clip_range).float())
    return loss, {"approx_kl": approx_kl, "clipfrac": clipfrac}
