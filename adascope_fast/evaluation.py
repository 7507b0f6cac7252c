"""Held-out reward on fixed seeds, before and after, with a 95 % interval.

Pictures of one prompt resemble each other, so the interval is over prompts (means of their pictures), not pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from adascope_fast.backbones.protocol import Backbone
from adascope_fast.rollout import EncodedPrompts, rollout
from adascope_fast.schedules import Schedule

NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Evaluation:
    """Scores [prompts, samples] and the pictures of the first prompts, row by row."""

    scores: Float32[Tensor, "p s"]
    pictures: Float[Tensor, "n 3 h w"]
    breakdown: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """Mean with its 95 % interval, number of pictures, and the reward's parts where it has any."""
        parts = {"attributes": self.breakdown} if self.breakdown else {}
        return {**interval(self.scores), "num_images": self.scores.numel(), **parts}


def interval(scores: Float32[Tensor, "p s"]) -> dict[str, float]:
    """`mean`, `low` and `high`: the normal 95 % interval of the mean over prompts."""
    means = scores.double().mean(1)
    mean = means.mean().item()
    reach = NORMAL_95 * means.std().item() / len(means) ** 0.5 if len(means) > 1 else float("nan")
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def evaluate(
    backbone: Backbone,
    schedule: Schedule,
    score: Callable[[Tensor, list[str]], Tensor],
    prompts: Sequence[str],
    *,
    samples_per_prompt: int,
    guidance_scale: float,
    seed: int,
    batch: int,
    num_pictured: int,
    breakdown: Callable[[Tensor, list[str]], dict[str, float]] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score `samples_per_prompt` pictures of each prompt; the same seed gives the same noise to any policy."""
    repeated = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    generator = torch.Generator(schedule.coef.device).manual_seed(seed)
    trajectory = rollout(
        backbone,
        schedule,
        EncodedPrompts.of(backbone, prompts),
        repeated,
        guidance_scale=guidance_scale,
        generator=generator,
        batch=batch,
        on_step=on_step,
    )
    images = backbone.decode(trajectory.latents[:, -1])
    scores = score(images, repeated).cpu().view(len(prompts), samples_per_prompt)
    parts = breakdown(images, repeated) if breakdown else {}
    return Evaluation(scores, images[: num_pictured * samples_per_prompt].cpu(), parts)
