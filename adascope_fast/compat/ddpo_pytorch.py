"""ddpo-pytorch's functions (kvablack/ddpo-pytorch, commit 1958463) under their names, with the numbers that they give.

    from adascope_fast.compat.ddpo_pytorch import PerPromptStatTracker, ddim_step_with_logprob, pipeline_with_logprob

Its DDIM ends at alphas_cumprod[0], whatever the scheduler's `set_alpha_to_one` says, so the last step has noise.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adascope_fast.compat.steps import Generator, as_timesteps, ddim_tables, kept, recording, step
from adascope_fast.compat.trl.statistics import PerPromptStatTracker as PerPromptStatTracker
from adascope_fast.reference.rows import per_row


def ddim_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Generator = None,
    prev_sample: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(prev_sample in the type of `sample`, log_prob [n] in float32) of one DDIM step (Song et al. 2021, eq. 12, 16).

    Args:
        self: a DDIMScheduler after `set_timesteps`.
        timestep: one, or one for each sample.
        eta: 0 deterministic, where the log-probability is NaN; 1 ancestral.
        prev_sample: what was drawn before; None draws it.

    Raises:
        ValueError: `set_timesteps` was not called, or both `prev_sample` and `generator` are given.
    """
    if self.num_inference_steps is None:
        raise ValueError("the scheduler must know its steps, got num_inference_steps = None; call set_timesteps first")
    if prev_sample is not None and generator is not None:
        raise ValueError("prev_sample and generator exclude each other, got both; leave one of them None")
    coef, x0_coef = ddim_tables(self, float(eta), sample.device)
    at = as_timesteps(timestep, sample).long()
    rows = coef[at]
    if self.config.clip_sample or self.config.thresholding:
        mean = _clipped_mean(self, model_output, sample, at, rows, x0_coef[at], use_clipped_model_output)
        model_output, rows = (
            mean,
            torch.stack([torch.zeros_like(rows[:, 0]), torch.ones_like(rows[:, 0]), rows[:, 2]], 1),
        )
    prev_sample, log_prob = step(sample, model_output, rows, prev_sample=prev_sample, generator=generator)
    return prev_sample.type(sample.dtype), log_prob


def _clipped_mean(
    scheduler: Any, output: Tensor, sample: Tensor, at: Tensor, rows: Tensor, x0_coef: Tensor, again: bool
) -> Tensor:
    """The mean where the guess of x0 is clipped or thresholded, which no row of a table can say."""
    alphas = kept(
        scheduler,
        scheduler.alphas_cumprod,
        ("alphas", str(sample.device)),
        lambda: scheduler.alphas_cumprod.to(sample.device).float(),
    )
    total, num_steps = scheduler.config.num_train_timesteps, scheduler.num_inference_steps
    signal, next_alpha = alphas[at].sqrt(), alphas[(at - total // num_steps).clamp(min=0)]
    sigma = (1 - alphas[at]).sqrt()
    of_x, of_output = (per_row(column, sample) for column in x0_coef.unbind(1))
    sample, output = sample.float(), output.float()
    x0 = of_x * sample + of_output * output
    noise = (sample - per_row(signal, sample) * x0) / per_row(sigma, sample)
    if scheduler.config.thresholding:
        x0 = scheduler._threshold_sample(x0)
    else:
        limit = scheduler.config.clip_sample_range
        x0 = x0.clamp(-limit, limit)
    if again:
        noise = (sample - per_row(signal, sample) * x0) / per_row(sigma, sample)
    left = (1 - next_alpha - rows[:, 2].square()).clamp(min=0).sqrt()
    return per_row(next_alpha.sqrt(), sample) * x0 + per_row(left, sample) * noise


@torch.no_grad()
def pipeline_with_logprob(
    self: Any,
    prompt: str | list[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str | list[str] | None = None,
    num_images_per_prompt: int | None = 1,
    eta: float = 0.0,
    generator: Generator = None,
    latents: Tensor | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    output_type: str | None = "pil",
    return_dict: bool = True,
    callback: Callable[[int, int, Tensor], None] | None = None,
    callback_steps: int = 1,
    cross_attention_kwargs: dict[str, Any] | None = None,
    guidance_rescale: float = 0.0,
) -> tuple[Any, list[bool] | None, list[Tensor], list[Tensor]]:
    """(images, has_nsfw, latents of all states, log-probabilities of all steps) of a StableDiffusionPipeline.

    `return_dict` changes nothing, as in the original.
    """
    more: dict[str, Any] = {}
    if callback is not None:

        def at_end(pipeline: Any, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if number % callback_steps == 0:
                callback(number, timestep, tensors["latents"])
            return {}

        more["callback_on_step_end"] = at_end
    with recording(self, ddim_step_with_logprob) as found:
        images, has_nsfw = self(
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            return_dict=False,
            cross_attention_kwargs=cross_attention_kwargs,
            guidance_rescale=guidance_rescale,
            **more,
        )
    return images, has_nsfw, found.latents, found.log_probs
