"""What a reward is, and its scores, checked. Higher is better, always."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from adascope_fast.backbone import Reward as Reward
from adascope_fast.settings import Section


def load(settings: Section) -> Reward:
    """The reward that a `[reward]` section describes; ValueError where that is no function of (images, prompts)."""
    reward: Any = settings.build()
    if not callable(reward):
        name = getattr(settings, "name", "")
        raise ValueError(
            f"reward {name!r} must be a function of (images, prompts), got {type(reward).__name__}; name a function"
        )
    return cast(Reward, reward)


def score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward's scores [b] as float32 on the pictures' device; ValueError unless one finite number a picture."""
    scores = score_guesses(reward, images, prompts)
    if not bool(scores.isfinite().all()):
        first = int((~scores.isfinite()).nonzero()[0, 0])
        raise ValueError(
            f"reward {_name(reward)!r} must be finite, got {scores[first].item()} for {prompts[first][:80]!r}; "
            f"return a low score where a picture cannot be judged"
        )
    return scores


def score_guesses(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The same of unfinished pictures, some of which cannot be judged: their scores may be NaN."""
    scores: Any = reward(images, list(prompts))
    try:
        scores = torch.as_tensor(scores, dtype=torch.float32).to(images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"reward {_name(reward)!r} must return a tensor or numbers, got {type(scores).__name__}: {error}"
        ) from None
    if scores.shape != (len(prompts),):
        raise ValueError(
            f"reward {_name(reward)!r} must return one number a picture, shape [{len(prompts)}], "
            f"got shape {list(scores.shape)}; reduce over everything but the first axis"
        )
    return scores


def _name(reward: Reward) -> str:
    return getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__)
