"""Rewards by name: the built-in ones, or `module:function` of the user's own. Higher is better, always."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from adascope_fast.rewards.clip import ClipSimilarity
from adascope_fast.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility
from adascope_fast.rewards.scene_attributes import SceneAttributes

Reward = Callable[[Tensor, list[str]], Tensor]
"""(pictures [b, 3, h, w] in [0, 1], prompts) -> scores [b]."""

BUILT_IN: dict[str, Callable[[], Reward]] = {
    "scene_attributes": SceneAttributes,
    "jpeg_compressibility": lambda: jpeg_compressibility,
    "jpeg_incompressibility": lambda: jpeg_incompressibility,
}


def load(name: str, *, clip: str = "scenes-clip") -> Reward:
    """The reward of that name; `module:function` is imported from the current folder or the installed packages.

    Args:
        clip: the CLIP of `clip_similarity`, as `ClipSimilarity.load` takes it.
    """
    if name == "clip_similarity":
        return ClipSimilarity.load(clip)
    if name in BUILT_IN:
        return BUILT_IN[name]()
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(
            f"reward.name is one of {', '.join((*BUILT_IN, 'clip_similarity'))} or module:function, got {name!r}"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        reward: Any = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward {name!r} could not be imported ({error}); run from the folder of its module"
        ) from None
    if not callable(reward):
        raise ValueError(
            f"reward {name!r} must be a function of (pictures, prompts), got {type(reward).__name__}; name a function"
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
