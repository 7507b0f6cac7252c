"""Several rewards as one: their weighted sum, and each of them by name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from adascope_fast.backbone import in_double
from adascope_fast.rewards.reward import (
    Reward,
    check_prompts,
    given,
    hand_metadata,
    refuses_several,
    score_guesses,
    takes_metadata,
    training_begins,
    training_ends,
    training_stage,
    weighed,
)
from adascope_fast.rewards.settings import reward_named


class Mixed:
    """The weighted sum of rewards; an algorithm may be told each of them, see `algorithm.mixing`.

    Args:
        rewards: functions of (images, prompts), by name.
        weights: of each of them.
    """

    name = "mixed"

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        if rewards.keys() != weights.keys() or not rewards:
            raise ValueError(f"each reward must have a weight, got {sorted(rewards)} and {sorted(weights)}; name both")
        self.rewards = {name: given(reward, name) for name, reward in rewards.items()}
        self.weights = dict(weights)
        self.take_metadata = self._hand_on if any(map(takes_metadata, self.rewards.values())) else None

    @classmethod
    def of(cls, parts: Mapping[str, float]) -> "Mixed":
        """Of rewards by the names that `reward.name` takes, or `module:object`; each with its defaults."""
        return cls({name: reward_named(name).build() for name in parts}, parts)

    @property
    def refuses_several(self) -> str:
        """What the first of its rewards says that cannot serve several processes."""
        return next(filter(None, map(refuses_several, self.rewards.values())), "")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The weighted sum [b]."""
        return weighed(self.parts(images, prompts), self.weights)

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores [b] of each reward, without its weight."""
        return {name: score_guesses(reward, images, prompts) for name, reward in self.rewards.items()}

    def breakdown(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """The mean of each reward."""
        return {name: in_double(scores).mean().item() for name, scores in self.parts(images, prompts).items()}

    def check_prompts(self, prompts: Sequence[str], where: str) -> None:
        """ValueError where one of the rewards cannot judge a prompt."""
        for reward in self.rewards.values():
            check_prompts(reward, prompts, where)

    def training_begins(self, folder: Path, images: Mapping[str, int]) -> str | None:
        """What the rewards say of a training that begins."""
        said = [training_begins(reward, folder, images=images) for reward in self.rewards.values()]
        return "\n".join(filter(None, said)) or None

    def training_stage(self, words: str) -> None:
        """Tell the rewards what the next images are of."""
        for reward in self.rewards.values():
            training_stage(reward, words)

    def training_ends(self) -> None:
        """Tell the rewards that the training has ended."""
        for reward in self.rewards.values():
            training_ends(reward)

    def _hand_on(self, metadata: Mapping[str, Mapping[str, Any]]) -> None:
        for reward in self.rewards.values():
            hand_metadata(reward, metadata)
