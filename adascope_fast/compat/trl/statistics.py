"""Rewards compared with those of their prompt, as TRL and ddpo-pytorch count them."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np


class PerPromptStatTracker:
    """(reward - mean) / (std + 1e-6) over the last `buffer_size` rewards of the same prompt, the new ones among them.

    A prompt with fewer than `min_count` takes mean and std of the batch. Unlike there, integer rewards give advantages
    that are not cut to integers.
    """

    def __init__(self, buffer_size: int, min_count: int) -> None:
        self.buffer_size, self.min_count = buffer_size, min_count
        self.stats: dict[str, deque[Any]] = {}

    def update(self, prompts: Sequence[str] | np.ndarray, rewards: Sequence[float] | np.ndarray) -> np.ndarray:
        """Remember the rewards; the advantage of each."""
        names, scores = np.array(prompts), np.array(rewards)
        scores = scores if np.issubdtype(scores.dtype, np.floating) else scores.astype(np.float32)
        advantages = np.empty_like(scores)
        for name in np.unique(names):
            here = names == name
            known = self.stats.setdefault(str(name), deque(maxlen=self.buffer_size))
            known.extend(scores[here])
            compared = scores if len(known) < self.min_count else np.array(known)
            advantages[here] = (scores[here] - compared.mean()) / (compared.std() + 1e-6)
        return advantages

    def get_stats(self) -> dict[str, dict[str, Any]]:
        """Mean, std and count of what is remembered of each prompt."""
        return {
            name: {"mean": np.mean(known), "std": np.std(known), "count": len(known)}
            for name, known in self.stats.items()
        }

    def state_dict(self) -> dict[str, list[float]]:
        """The remembered rewards of each prompt, oldest first."""
        return {name: [float(value) for value in known] for name, known in self.stats.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Continue with remembered rewards."""
        self.stats = {
            name: deque((np.float32(value) for value in known), maxlen=self.buffer_size)
            for name, known in state.items()
        }
