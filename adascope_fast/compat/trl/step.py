"""One step of a DDIM scheduler with its log-probability, as TRL's `scheduler_step`, without a copy to the CPU.

Axes: `b` samples. The mean over all elements of a sample, not their sum, is its log-probability. The step after the
last is that to timestep 0, whatever `set_alpha_to_one` says.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


@dataclass
class DDPOSchedulerOutput:
    """Where a step led, in the type of its sample, and the log-probability [b] of that."""

    latents: Tensor
    log_probs: Tensor


def scheduler_step(
    scheduler: Any,
    model_output: Tensor,
    timestep: Tensor | int,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Any = None,
    prev_sample: Tensor | None = None,
) -> DDPOSchedulerOutput:
    """DDIM with eta (Song et al. 2021, eq. 12 and 16) from a guided output; the log-probability of its result.

    Args:
        timestep: of all samples, or one of each [b].
        use_clipped_model_output: the noise is computed again from a clipped guess.
        prev_sample: where the step led; None: it is drawn here.
    """
    if scheduler.num_inference_steps is None:
        raise ValueError("num_inference_steps must be set before a step, got None; call scheduler.set_timesteps first")
    if prev_sample is not None and generator is not None:
        raise ValueError("prev_sample is drawn by nobody, got a generator beside it; pass one of the two")
    config = scheduler.config
    if scheduler.alphas_cumprod.device != sample.device:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(sample.device)
    now = torch.as_tensor(timestep, device=sample.device)
    then = (now - config.num_train_timesteps // scheduler.num_inference_steps).clamp(0, config.num_train_timesteps - 1)
    shape = (-1, *[1] * (sample.dim() - 1))
    alpha, next_alpha = (scheduler.alphas_cumprod[at].view(shape) for at in (now, then))
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    if config.prediction_type == "epsilon":
        guess, noise = (sample - sigma * model_output) / signal, model_output
    elif config.prediction_type == "v_prediction":
        guess, noise = signal * sample - sigma * model_output, signal * model_output + sigma * sample
    elif config.prediction_type == "sample":
        guess, noise = model_output, (sample - signal * model_output) / sigma
    else:
        raise ValueError(
            f"prediction_type must be epsilon, sample or v_prediction, got {config.prediction_type!r}; correct the "
            f"scheduler's configuration"
        )
    if config.thresholding:
        guess = scheduler._threshold_sample(guess)
    elif config.clip_sample:
        guess = guess.clamp(-config.clip_sample_range, config.clip_sample_range)
    std = eta * ((1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)).sqrt()
    if use_clipped_model_output:
        noise = (sample - signal * guess) / sigma
    mean = next_alpha.sqrt() * guess + (1 - next_alpha - std.square()).sqrt() * noise
    drawn = torch.zeros(())
    if prev_sample is None:
        drawn = randn_tensor(
            tuple(model_output.shape), generator=generator, device=model_output.device, dtype=model_output.dtype
        )
    led = mean + std * drawn if prev_sample is None else prev_sample
    z = (led.detach() - mean) / std
    log_prob = -0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)
    return DDPOSchedulerOutput(led.to(sample.dtype), log_prob.flatten(1).mean(1))


def is_affine(scheduler: Any) -> bool:
    """Whether its steps are affine in the output, as the fused operations have them."""
    return not (scheduler.config.get("clip_sample") or scheduler.config.get("thresholding"))
