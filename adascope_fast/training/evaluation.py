"""Held-out reward on fixed seeds, before and after, with a 95 % interval; and how varied the images are.

Images of one prompt resemble each other, so the interval is over prompts (means of their images), not images.
A reward that rises while `diversity` or `contrast` falls is a policy that has found a way around the task.

An image that is not finite is shown to no reward: its score is NaN, the means leave it out, and it is counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from adascope_fast.backbone import Backbone, in_double
from adascope_fast.distributed import Ranks, bounds_of, most_batches
from adascope_fast.engine.scoring import decoded_whole, score_finite
from adascope_fast.rollout import EncodedPrompts, OwnNoise, rollout
from adascope_fast.schedules import Schedule

NORMAL_95 = 1.959964


@dataclass(frozen=True)
class HeldOutScores:
    """Scores [prompts, samples], NaN where an image is not finite, and the images of the first prompts, row by row."""

    scores: Float32[Tensor, "p s"]
    shown: Float[Tensor, "n 3 h w"]
    breakdown: dict[str, float]
    diversity: float | None
    contrast: float
    clip_score: float | None = None
    spread: dict[str, float] = field(default_factory=dict)
    """Standard deviation over prompts of diversity, contrast and CLIP score: what a change of them is measured by."""

    @property
    def num_not_finite(self) -> int:
        """Images that are not finite."""
        return int((~self.scores.isfinite()).sum())

    def summary(self) -> dict[str, Any]:
        """Mean with its 95 % interval, number of images, their variety, and the reward's parts where it has any."""
        parts = {"attributes": self.breakdown} if self.breakdown else {}
        variety = {"diversity": self.diversity, "contrast": self.contrast}
        variety |= {} if self.clip_score is None else {"clip_score": self.clip_score}
        counts = {"num_images": self.scores.numel(), "num_not_finite": self.num_not_finite, "spread": self.spread}
        return {**interval(self.scores), **counts, **variety, **parts}


def interval(scores: Float32[Tensor, "p s"]) -> dict[str, float]:
    """`mean`, `low` and `high`: the normal 95 % interval of the mean over prompts; what is NaN is left out."""
    means = in_double(scores).nanmean(1)
    means = means[means.isfinite()]
    mean = means.mean().item() if len(means) else float("nan")
    reach = NORMAL_95 * means.std().item() / len(means) ** 0.5 if len(means) > 1 else float("nan")
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def diversity(images: Float[Tensor, "p s 3 h w"]) -> float | None:
    """Root mean square difference of two images of the same prompt, mean over pairs, then over prompts.

    0: all images of a prompt are alike; black against white is 1. None with a single image a prompt.
    """
    return None if (values := _diversities(images)) is None else values.nanmean().item()


def contrast(images: Float[Tensor, "n 3 h w"]) -> float:
    """Standard deviation of an image's values, mean over images; 0 is an image of one grey, 0.5 the most."""
    return _contrasts(images).nanmean().item()


def _diversities(images: Float[Tensor, "p s 3 h w"]) -> Float[Tensor, "p pairs"] | None:
    num = images.shape[1]
    if num < 2:
        return None
    rows = images.flatten(2).float()
    pairs = [rows[:, i + 1 :] - rows[:, i : i + 1] for i in range(num - 1)]  # [p, s - 1 - i, d] each
    return torch.cat([pair.square().mean(2).sqrt() for pair in pairs], 1)


def _contrasts(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    return images.flatten(1).float().std(1, correction=0)


def _spread(values: Float[Tensor, "p s"]) -> float:
    means = in_double(values).nanmean(1)
    return means[means.isfinite()].std().item() if int(means.isfinite().sum()) > 1 else float("nan")


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
    num_shown: int,
    breakdown: Callable[[Tensor, list[str]], dict[str, float]] | None = None,
    similarity: Callable[[Tensor, list[str]], Tensor] | None = None,
    on_step: Callable[[int], None] | None = None,
    ranks: Ranks | None = None,
) -> HeldOutScores:
    """Score `samples_per_prompt` images of each prompt; the same seed gives the same noise to any policy.

    Args:
        similarity: of image and prompt, whose mean is the CLIP score.
        ranks: the processes among which images are dealt out; each has the result, and the first one the images shown.

    Raises:
        FloatingPointError: no image is finite.
    """
    ranks = Ranks() if ranks is None else ranks
    repeated = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    bounds = bounds_of(len(repeated), batch, ranks.size, needs_all=False)
    own = slice(*bounds[ranks.rank : ranks.rank + 2])
    mine = repeated[own]
    trajectory = rollout(
        backbone,
        schedule,
        EncodedPrompts.of(backbone, prompts),
        mine,
        guidance_scale=guidance_scale,
        noise=OwnNoise(seed),
        batch=batch,
        numbers=range(own.start, own.stop),
        num_batches=most_batches(bounds, batch) if ranks.are_in_step else None,
        on_step=on_step,
    )
    device = schedule.coef.device
    if mine:
        images = decoded_whole(backbone, trajectory.latents[:, -1])
        scores = score_finite(score, images, mine)
    else:  # there are fewer batches than processes
        images = torch.empty(0, 3, backbone.resolution, backbone.resolution, device=device)
        scores = torch.empty(0)
    scores = ranks.whole(scores.to(device, torch.float32), bounds).cpu()
    if not scores.isfinite().any():
        raise FloatingPointError(f"none of the {len(scores)} held-out images is finite")
    images = ranks.to_first(images, bounds)
    shape = len(prompts), samples_per_prompt
    found = ranks.by_first(lambda: _of_images(images, scores, repeated, shape, breakdown, similarity))
    return HeldOutScores(scores.view(shape), images[: num_shown * samples_per_prompt].cpu(), **found)


def _of_images(
    images: Float[Tensor, "n 3 h w"],
    scores: Float32[Tensor, " n"],
    prompts: list[str],
    shape: tuple[int, int],
    breakdown: Callable[[Tensor, list[str]], dict[str, float]] | None,
    similarity: Callable[[Tensor, list[str]], Tensor] | None,
) -> dict[str, Any]:
    """What `HeldOutScores` has besides scores and images."""
    rows = scores.isfinite().nonzero()[:, 0]
    whole, named = images[rows.to(images.device)], [prompts[row] for row in rows.tolist()]
    of_pairs, by_clip = _diversities(images.unflatten(0, shape)), None
    spread = {"contrast": _spread(_contrasts(images).view(shape))}
    spread |= {} if of_pairs is None else {"diversity": _spread(of_pairs)}
    if similarity is not None:
        by_clip = in_double(similarity(whole, named))
        spread["clip_score"] = _spread(
            torch.full((len(images),), torch.nan).double().index_copy(0, rows, by_clip.cpu()).view(shape)
        )
    return {
        "breakdown": breakdown(whole, named) if breakdown else {},
        "diversity": None if of_pairs is None else of_pairs.nanmean().item(),
        "contrast": contrast(images),
        "clip_score": None if by_clip is None else by_clip.mean().item(),
        "spread": spread,
    }
