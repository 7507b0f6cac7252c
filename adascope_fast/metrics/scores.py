"""Scores of images one by one: any reward as a metric, and the CLIP score."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adascope_fast.metrics.metric import MeanScore
from adascope_fast.rewards import given, score


class ScoreOf(MeanScore):
    """The mean of a reward; higher is better, always.

    Args:
        reward: a function of (images, prompts), as `reward.name` takes.
        name: what tables call it.
        facts: what else a reader must know: weights, version.
    """

    name, title, higher_is_better = "score", "a reward", True

    def __init__(self, reward: Any, name: str = "score", facts: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.reward, self.name, self._facts = given(reward, name), name, dict(facts or {})

    def rows(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return score(self.reward, images, prompts)

    def facts(self) -> dict[str, Any]:
        return self._facts


class ClipScore(MeanScore):
    """Mean cosine of image and prompt by a CLIP, in [-1, 1], neither scaled nor clamped.

    Hessel et al. (2021) publish 2.5 times it, at least 0; tables of ViT-L/14 near 0.24 are of the bare one.

    Args:
        features: images to embeddings [n, d] that are not normalised, with `facts`.
        clip: a `ClipSimilarity`, for the prompts.
    """

    name, title, higher_is_better = "CLIP", "CLIP score", True

    def __init__(self, features: Any, clip: Any) -> None:
        super().__init__()
        self.features, self.clip = features, clip

    @torch.no_grad()
    def rows(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        found = F.normalize(self.features(images), dim=-1)
        return (found * self.clip.embed_prompts(prompts, found.device)).sum(1)

    def facts(self) -> dict[str, Any]:
        return self.features.facts
