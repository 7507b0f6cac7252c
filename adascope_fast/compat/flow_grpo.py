"""flow_grpo's functions (yifan123/flow_grpo) under their names, with the numbers that they give.

    from adascope_fast.compat.flow_grpo import PerPromptStatTracker, pipeline_with_logprob, sde_step_with_logprob

Flow-CPS has no constants in its log-probability there: it is minus the mean squared distance from the mean.
"""

import hashlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adascope_fast.compat.steps import Generator, as_timesteps, kept, mean_of, recording, rows_at, step, with_nan
from adascope_fast.reference.rows import per_row
from adascope_fast.schedules import samplers


def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Generator = None,
    sde_type: str | None = "sde",
    return_sqrt_dt: bool | None = False,
) -> tuple[Tensor, ...]:
    """(prev_sample, log_prob [n], mean, std) of one step, all float32; with `return_sqrt_dt` sqrt(-dt) too.

    `std` [n, 1, ...] is sigma_t, before sqrt(-dt), of Flow-SDE, and that of the step of Flow-CPS.

    Args:
        self: a FlowMatchEulerDiscreteScheduler after `set_timesteps`.
        timestep: one, or one for each sample, of the scheduler's; others give NaN.
        sde_type: "sde" (2505.05470), or "cps" (2509.05952).
    """
    if sde_type not in ("sde", "cps"):
        raise ValueError(f"sde_type must be sde or cps, got {sde_type!r}; choose one of them")
    sigmas = self.sigmas.to(sample.device, torch.float32)
    key = (sde_type, float(noise_level), str(sample.device))

    def make() -> Tensor:
        flow = self.sigmas.detach().cpu()
        table = samplers.flow_sde(flow, noise_level=noise_level)
        if sde_type == "cps":
            table = samplers.flow_cps(flow, eta=noise_level)
        return with_nan(table.coef).to(sample.device)

    at = rows_at(self.timesteps.to(sample.device), as_timesteps(timestep, sample))
    coef = kept(self, self.sigmas, key, make)[at]
    sigma, following = with_nan(sigmas[:-1, None])[at, 0], with_nan(sigmas[1:, None])[at, 0]
    kind = "gaussian" if sde_type == "sde" else "squared_error"
    model_output = model_output.float()
    drawn, log_prob = step(sample, model_output, coef, prev_sample=prev_sample, generator=generator, kind=kind)
    sqrt_dt = (sigma - following).sqrt()
    if sde_type == "sde":
        below = torch.where(sigma == 1, sigmas[1], sigma)
        std = (sigma / (1 - below)).sqrt() * noise_level
    else:
        std = following * math.sin(noise_level * math.pi / 2)
    found = (drawn.float(), log_prob, mean_of(sample, model_output, coef), per_row(std, sample))
    return (*found, per_row(sqrt_dt, sample)) if return_sqrt_dt else found


@torch.no_grad()
def pipeline_with_logprob(
    self: Any,
    *arguments: Any,
    noise_level: float = 0.7,
    sde_type: str = "sde",
    return_prev_sample_mean: bool = False,
    **options: Any,
) -> tuple[Any, ...]:
    """Images and what was recorded on the way, of a StableDiffusion3Pipeline or a FluxPipeline.

    SD3: (images, latents of all states, log-probabilities of all steps), with the means where they are asked for.
    FLUX: (images, latents, latent_image_ids, text_ids, log-probabilities).

    Args:
        arguments, options: of the pipeline's own call, but for `return_dict`; the names and the order are diffusers'.
    """
    options["return_dict"] = False

    def take(scheduler: Any, output: Tensor, timestep: Any, sample: Tensor, **more: Any) -> tuple[Tensor, ...]:
        # The generator draws the first latents alone: the steps' noise is torch's own, as in the original.
        return sde_step_with_logprob(scheduler, output, timestep, sample, noise_level=noise_level, sde_type=sde_type)

    with recording(self, take) as found:
        images = self(*arguments, **options)[0]
    found.latents[0] = found.latents[0].float()
    if type(self).__name__ != "FluxPipeline":
        told = (images, found.latents, found.log_probs)
        return (*told, found.means) if return_prev_sample_mean else told
    if return_prev_sample_mean:
        raise ValueError("return_prev_sample_mean is of SD3, got it for FLUX; leave it out")
    text_ids, image_ids = _ids(self, found.latents[0], options)
    return images, found.latents, image_ids, text_ids, found.log_probs


def _ids(pipeline: Any, latents: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The positions of FLUX's text and image tokens as its call has them."""
    factor = pipeline.vae_scale_factor * 2
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    height, width = (int(options.get(name) or side) // factor for name in ("height", "width"))
    dtype = pipeline.text_encoder.dtype
    length = options.get("max_sequence_length") or 512
    text_ids = torch.zeros(length, 3, device=latents.device, dtype=dtype)
    return text_ids, pipeline._prepare_latent_image_ids(len(latents), height, width, latents.device, dtype)


class PerPromptStatTracker:
    """Advantages within the groups of a prompt.

    Args:
        global_std: divide by the standard deviation of the whole batch, not of the prompt.
    """

    def __init__(self, global_std: bool = False) -> None:
        self.global_std = global_std
        self.stats: dict[Any, Any] = {}
        self.history_prompts: set[str] = set()

    def update(self, prompts: Any, rewards: Any, dists: Any = None, type: str = "grpo") -> np.ndarray:
        """Advantages, float64, shaped as `rewards` [n] or [n, t].

        Args:
            type: "grpo", (r - mean) / (std + 1e-4); "rwr", the reward itself; "sft", 1 for a group's best and 0 for
                the others; "dpo", 1 for its best, -1 for its worst and 0 for the others.
        """
        if type not in ("grpo", "rwr", "sft", "dpo") or dists is not None:
            if type == "gardo" or dists is not None:
                raise ValueError("gardo, with distances of images, is not here, got it; use flow_grpo's own tracker")
            raise ValueError(f"type must be grpo, rwr, sft or dpo, got {type!r}; choose one of them")
        prompts, rewards = np.array(prompts), np.array(rewards, dtype=np.float64)
        advantages = np.zeros_like(rewards)
        for prompt in np.unique(prompts):
            own = rewards[prompts == prompt]
            before = self.stats.get(prompt)
            self.stats[prompt] = own if before is None else np.concatenate([before, own])
            self.history_prompts.add(hashlib.sha256(str(prompt).encode()).hexdigest())
        for prompt in np.unique(prompts):
            rows = prompts == prompt
            own, known = rewards[rows], self.stats[prompt]
            if type == "grpo":
                std = np.std(rewards if self.global_std else known, axis=0, keepdims=True) + 1e-4
                advantages[rows] = (own - known.mean(axis=0, keepdims=True)) / std
            elif type == "rwr":
                advantages[rows] = own
            elif type == "sft":
                advantages[rows] = own == own.max()
            else:
                advantages[rows] = _best_and_worst(own)
        return advantages

    def get_stats(self) -> tuple[float, int]:
        """Mean group size, and the number of different prompts so far."""
        sizes = [len(own) for own in self.stats.values()]
        return (sum(sizes) / len(sizes) if sizes else 0), len(self.history_prompts)

    def clear(self) -> None:
        """Forget the groups."""
        self.stats = {}


def _best_and_worst(rewards: np.ndarray) -> np.ndarray:
    best, worst = int(rewards.argmax()), int(rewards.argmin())
    if best == worst:
        worst, best = 0, 1
    found = np.zeros_like(rewards)
    found[best], found[worst] = 1, -1
    return found
