"""Rewards of `b` samples to advantages of their `t` steps: the final reward is credited to every step.

Statistics are those of all rewards given, whatever steps are trained later. Unlike in the code bases they come from,
they are summed in float64 in the order of the values: neither the order of the batch nor the number of ranks that it
was gathered from changes an advantage. A group whose rewards are all equal has advantage exactly 0.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor


class Advantage(Protocol):
    """What an algorithm needs of an advantage estimator."""

    def __call__(self, rewards: Float[Tensor, " b"], prompts: list[str], num_steps: int) -> Float[Tensor, "b t"]:
        """Advantage of each step of each sample; `prompts` says which rewards are comparable."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the next call depends on, as JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        ...


@dataclass
class PerPromptTracker:
    """(reward - mean) / (std + 1e-6) over the last rewards of the same prompt (DDPO, 2305.13301).

    The present rewards are remembered first. A prompt with fewer than `min_count` remembered rewards takes mean and std
    of the whole batch. The std is the population's.
    """

    buffer_size: int = 32
    min_count: int = 16
    advantage_clip: float = 5.0
    _buffers: dict[str, deque[float]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, rewards: Float[Tensor, " b"], prompts: list[str], num_steps: int) -> Float[Tensor, "b t"]:
        """Remember the rewards, then compare each with those of its prompt."""
        values = _checked(rewards, prompts)
        batch = values.tolist()
        for prompt, value in zip(prompts, batch, strict=True):
            self._buffers.setdefault(prompt, deque(maxlen=self.buffer_size)).append(value)
        names, group = _groups(prompts)
        known = [self._buffers[name] if len(self._buffers[name]) >= self.min_count else batch for name in names]
        owner = torch.arange(len(known)).repeat_interleave(torch.tensor([len(buffer) for buffer in known]))
        remembered = torch.tensor([value for buffer in known for value in buffer], dtype=torch.float64)
        mean, std = _mean_std(remembered, owner, correction=0)
        return _spread((values - mean[group]) / (std[group] + 1e-6), self.advantage_clip, rewards, num_steps)

    def state_dict(self) -> dict[str, Any]:
        """The remembered rewards of each prompt, oldest first."""
        return {"buffers": {prompt: list(buffer) for prompt, buffer in self._buffers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with remembered rewards; of buffers that are too long the newest are kept."""
        self._buffers = {prompt: deque(buffer, self.buffer_size) for prompt, buffer in state["buffers"].items()}


class _Stateless:
    def state_dict(self) -> dict[str, Any]:
        """Empty: each call stands alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept the empty state alone."""
        if state:
            raise ValueError(
                f"{type(self).__name__} has no state, but is given {sorted(state)}; the checkpoint is another's"
            )


@dataclass
class GroupRelative(_Stateless):
    """(reward - mean of its prompt) / (std + eps), with one of the field's three scales.

    "global": population std of the whole batch + 1e-4 (Flow-GRPO's default, 2505.05470); "group": population std of the
    prompt + 1e-4; "group_sample": sample std of the prompt + 1e-8 (DanceGRPO, 2505.07818; MixGRPO, 2507.21802).
    """

    advantage_scale: Literal["global", "group", "group_sample"] = "global"
    advantage_clip: float = 5.0

    def __post_init__(self) -> None:
        if self.advantage_scale not in ("global", "group", "group_sample"):
            raise ValueError(f"advantage_scale is global, group or group_sample, not {self.advantage_scale!r}")

    def __call__(self, rewards: Float[Tensor, " b"], prompts: list[str], num_steps: int) -> Float[Tensor, "b t"]:
        """Compare each reward with those of the same prompt in this call."""
        values = _checked(rewards, prompts)
        _, group = _groups(prompts)
        mean, std = _mean_std(values, group, correction=1 if self.advantage_scale == "group_sample" else 0)
        if self.advantage_scale == "global":
            _, std = _mean_std(values, torch.zeros_like(group), correction=0)
        divisor = (
            std[0] + 1e-4
            if self.advantage_scale == "global"
            else std[group] + (1e-4 if self.advantage_scale == "group" else 1e-8)
        )
        return _spread((values - mean[group]) / divisor, self.advantage_clip, rewards, num_steps)


@dataclass
class Whiten(_Stateless):
    """(reward - mean) / (std + 1e-8) over the whole batch, whatever the prompts; the std is the population's."""

    advantage_clip: float = 5.0

    def __call__(self, rewards: Float[Tensor, " b"], prompts: list[str], num_steps: int) -> Float[Tensor, "b t"]:
        """Compare each reward with the whole batch."""
        values = _checked(rewards, prompts)
        mean, std = _mean_std(values, torch.zeros(len(values), dtype=torch.int64), correction=0)
        return _spread((values - mean) / (std + 1e-8), self.advantage_clip, rewards, num_steps)


def added(
    advantage: GroupRelative,
    parts: Mapping[str, Float[Tensor, " b"]],
    weights: Mapping[str, float],
    prompts: list[str],
    num_steps: int,
) -> Float[Tensor, "b t"]:
    """The weighted sum of each reward's own advantages, clipped as a whole (MixGRPO's advantage_aggr, 2507.21802)."""
    whole = _added(advantage, parts, weights, prompts)
    return _spread(whole, advantage.advantage_clip, next(iter(parts.values())), num_steps)


def decoupled(
    advantage: GroupRelative,
    parts: Mapping[str, Float[Tensor, " b"]],
    weights: Mapping[str, float],
    prompts: list[str],
    num_steps: int,
) -> Float[Tensor, "b t"]:
    """The same sum divided by its sample std over the batch + 1e-4 (GDPO, 2601.05242; the epsilon is TRL's).

    GDPO takes the batch's mean off before, which is 0: each group's is.
    """
    whole = _added(advantage, parts, weights, prompts)
    _, std = _mean_std(whole, torch.zeros(len(whole), dtype=torch.int64), correction=1)
    return _spread(whole / (std + 1e-4), advantage.advantage_clip, next(iter(parts.values())), num_steps)


def standardized(
    advantage: GroupRelative,
    parts: Mapping[str, Float[Tensor, " b"]],
    weights: Mapping[str, float],
    prompts: list[str],
    num_steps: int,
) -> Float[Tensor, "b t"]:
    """Advantages of one reward: the weighted sum of each part's (score - mean) / std over all images of the call.

    The accumulated and re-normalised rewards of AdaScope (2605.15855). The std is the population's; a part whose scores
    are all equal adds 0. Unlike in `added` a part keeps the differences between prompts, so one whose spread lies
    mostly between them counts less within a group.
    """
    whole = torch.zeros(len(prompts), dtype=torch.float64)
    for name, scores in parts.items():
        values = _checked(scores, prompts)
        (mean,), (std,) = _mean_std(values, torch.zeros(len(values), dtype=torch.int64), correction=0)
        if std > 0:
            whole += weights.get(name, 1.0) * (values - mean) / std
    return advantage(whole, prompts, num_steps).to(next(iter(parts.values())).device, torch.float32)


def _added(
    advantage: GroupRelative, parts: Mapping[str, Tensor], weights: Mapping[str, float], prompts: list[str]
) -> Float64[Tensor, " b"]:
    alone = replace(advantage, advantage_clip=float("inf"))
    return torch.stack(
        [weights.get(name, 1.0) * alone(scores.cpu().double(), prompts, 1)[:, 0] for name, scores in parts.items()]
    ).sum(0)


def tracked(section: Any, advantage_clip: float) -> PerPromptTracker | Whiten:
    """What the keys of a section describe that compares with remembered rewards, or with the batch."""
    if section.advantage == "batch":
        return Whiten(advantage_clip)
    return PerPromptTracker(section.buffer_size, section.min_count, advantage_clip)


def _checked(rewards: Float[Tensor, " b"], prompts: list[str]) -> Float64[Tensor, " b"]:
    if rewards.shape != (len(prompts),) or not prompts:
        raise ValueError(
            f"a reward for each prompt is needed, but rewards are {list(rewards.shape)}, prompts {len(prompts)}"
        )
    values = rewards.detach().cpu().double()
    if not values.isfinite().all():
        index = int((~values.isfinite()).nonzero()[0])
        raise ValueError(
            f"rewards must be finite, but it is {values[index]} for prompt {prompts[index]!r}; check the reward"
        )
    return values


def _groups(prompts: list[str]) -> tuple[list[str], Int[Tensor, " b"]]:
    """The distinct prompts, and the index among them of each prompt."""
    index: dict[str, int] = {}
    group = torch.tensor([index.setdefault(prompt, len(index)) for prompt in prompts])
    return list(index), group


def _mean_std(
    values: Float64[Tensor, " n"], group: Int[Tensor, " n"], *, correction: int
) -> tuple[Float64[Tensor, " g"], Float64[Tensor, " g"]]:
    """Mean and std of each group; of a constant group its value and 0, without rounding."""
    order = values.argsort()
    values, group = values[order], group[order]
    count = group.bincount()
    low, high = (
        values.new_zeros(len(count)).scatter_reduce(0, group, values, reduce, include_self=False)
        for reduce in ("amin", "amax")
    )
    mean = torch.where(low == high, low, group.bincount(values) / count)
    variance = group.bincount((values - mean[group]).square()) / (count - correction).clamp(min=1)
    return mean, variance.sqrt()


def _spread(advantage: Float64[Tensor, " b"], clip: float, rewards: Tensor, num_steps: int) -> Float[Tensor, "b t"]:
    """Clip, and give every step of a sample the same; at least float32, where the rewards are."""
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return advantage.clamp(-clip, clip).to(rewards.device, dtype).unsqueeze(1).expand(-1, num_steps)
