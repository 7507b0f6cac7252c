"""How structure forms and preference saturates along a trajectory: what AdaScope's rule looks at.

Axes: `b` samples, `t` denoising steps, noisiest first; state t is the final latent.

The paper scores the decoded guess of every step with CLIP and the reward (`DecodedSensor`); the latent mode reads two
correlations instead, with no decoder, no CLIP and no reward, and is next to free. Every sensor is a function of a
trajectory; a row with a value that is not finite says that its sample was not sensed, and the rule leaves it out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from adascope_fast import ops
from adascope_fast.backbone import Reward, in_double
from adascope_fast.rollout import Trajectory
from adascope_fast.theory import successive_correlations


class Curves(NamedTuple):
    """What was sensed; structure comes as values at the states or as volatility of the steps."""

    preference: Float32[Tensor, "b t+1"]
    volatility: Float32[Tensor, "b t"] | None = None
    structure: Float32[Tensor, "b t+1"] | None = None


class Sensor(Protocol):
    """Curves of a trajectory."""

    @property
    def is_causal(self) -> bool:
        """Whether a state's values are known when the rollout reaches it."""
        ...

    @property
    def every(self) -> int:
        """Iterations from one that is sensed to the next."""
        ...

    def __call__(self, trajectory: Trajectory) -> Curves: ...


@dataclass(frozen=True)
class LatentSensor:
    """Correlation of successive guesses, and of each guess with the final latent."""

    every: int = 1

    @property
    def is_causal(self) -> bool:
        """False: preference is likeness to the final latent."""
        return False

    def __call__(self, trajectory: Trajectory) -> Curves:
        """See `latent_curves`."""
        structure, preference = latent_curves(trajectory)
        return Curves(preference, volatility=structure)

    def tensors(self) -> dict[str, Tensor]:
        """Empty: it learns nothing."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """There is nothing to load."""


@dataclass(frozen=True)
class DecodedSensor:
    """The reward, and the text-image similarity if there is one, of the decoded guess at every state.

    Args:
        decode: latents [n, *latent] to images; one that learns has `prepare`, `tensors` and `load_tensors` besides.
        reward: the reward in training, which is the preference.
        similarity: similarity of picture and prompt, which is the structure; None takes the volatility of the latents.
        stride: states from one that is decoded to the next; the picture is always judged. Between them preference is
            linear and structure a cubic spline: its second differences are what the rule reads, and those of straight
            lines are zero but at the states that were judged.
        num_samples: of each prompt that are decoded, those first in the batch; 0: all.
        every: iterations from one that is sensed to the next.
        batch: images decoded at once.
    """

    decode: Callable[[Tensor], Tensor]
    reward: Reward
    similarity: Reward | None = None
    stride: int = 1
    num_samples: int = 0
    every: int = 1
    batch: int = 64

    @property
    def is_causal(self) -> bool:
        """Values between strides depend on later states."""
        return self.stride == 1

    def __post_init__(self) -> None:
        if min(self.stride, self.batch, self.every, self.num_samples + 1) < 1:
            raise ValueError(
                f"stride, batch and every are at least 1, num_samples at least 0, got {self.stride}, {self.batch}, "
                f"{self.every} and {self.num_samples}"
            )

    @torch.no_grad()
    def __call__(self, trajectory: Trajectory) -> Curves:
        """Judge each chosen state of each chosen sample; samples that are not chosen have NaN."""
        b, t = trajectory.log_prob.shape
        device = trajectory.x0.device
        rows = torch.tensor(first_of_each(trajectory.prompts, self.num_samples), device=device)
        states = [*range(0, t, self.stride), t]
        prompts = [trajectory.prompts[row] for row in rows.tolist()]
        preference = torch.full((b, t + 1), torch.nan, device=device)
        structure = torch.full((b, t + 1), torch.nan, device=device)
        if (prepare := getattr(self.decode, "prepare", None)) is not None:
            prepare(trajectory.latents[:, -1])
        judged = [self._judge(_state(trajectory, rows, state), prompts) for state in states]
        preference[rows] = interpolated(torch.stack([reward for reward, _ in judged], 1), states)
        if self.similarity is None:
            volatility, _ = latent_curves(trajectory)
            return Curves(preference, volatility=volatility.to(device))
        structure[rows] = splined(torch.stack([likeness for _, likeness in judged], 1), states)
        return Curves(preference, structure=structure)

    def tensors(self) -> dict[str, Tensor]:
        """Those of the decoder, if it has any."""
        found = getattr(self.decode, "tensors", None)
        return {} if found is None else found()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Give the decoder what `tensors` gave."""
        if (load := getattr(self.decode, "load_tensors", None)) is not None:
            load(tensors)

    def _judge(self, latents: Tensor, prompts: list[str]) -> tuple[Float32[Tensor, " n"], Float32[Tensor, " n"]]:
        """Reward and similarity; NaN for latents that are not finite, which no judge sees."""
        finite = latents.flatten(1).isfinite().all(1)
        scores = torch.full((2, len(latents)), torch.nan, device=latents.device)
        usable, similarity = finite.nonzero()[:, 0], self.similarity
        for part in usable.split(self.batch):
            images: Tensor = self.decode(latents[part])
            whole = images.flatten(1).isfinite().all(1)
            part, images = part[whole], images[whole]
            if not len(part):
                continue
            said = [prompts[row] for row in part.tolist()]
            scores[0, part] = self.reward(images, said).float().to(scores.device)
            if similarity is not None:
                scores[1, part] = similarity(images, said).float().to(scores.device)
        return scores[0], scores[1]


def first_of_each(prompts: list[str], count: int) -> list[int]:
    """Rows of the first `count` samples of each prompt, in order; all if 0."""
    seen: dict[str, int] = {}
    rows = []
    for row, prompt in enumerate(prompts):
        seen[prompt] = seen.get(prompt, 0) + 1
        if count == 0 or seen[prompt] <= count:
            rows.append(row)
    return rows


def interpolated(values: Float32[Tensor, "n k"], states: list[int]) -> Float32[Tensor, "n t+1"]:
    """Values at all states 0..t, linear between those at the given `states`, which hold 0 and t."""
    from scipy.interpolate import interp1d  # slow to import, and the latent mode has no use for it

    return _between(values, states, lambda known: interp1d(states, known, axis=0))


def splined(values: Float32[Tensor, "n k"], states: list[int]) -> Float32[Tensor, "n t+1"]:
    """The same, by a cubic spline whose third derivative is continuous next to its ends."""
    from scipy.interpolate import CubicSpline

    return _between(values, states, lambda known: CubicSpline(states, known, axis=0))


def _between(values: Tensor, states: list[int], curve: Callable[[np.ndarray], Callable[[Any], np.ndarray]]) -> Tensor:
    """A sample with a value that is not finite is NaN throughout; what was given stays as it is."""
    if len(states) == states[-1] + 1:
        return values
    weights = curve(np.eye(len(states)))(np.arange(states[-1] + 1))
    weights[states] = np.eye(len(states))
    known = in_double(values)
    filled = known @ torch.from_numpy(weights.T).to(known.device)
    finite = known.isfinite().all(1, keepdim=True)
    return torch.where(finite, filled, torch.nan).to(values.dtype).to(values.device)


@torch.no_grad()
def latent_curves(trajectory: Trajectory) -> tuple[Float32[Tensor, "b t"], Float32[Tensor, "b t+1"]]:
    """Volatility 1 - corr(x0_i, x0_{i+1}) of the guided x0 guesses, and preference corr(x0_i, x_t), which ends at 1.

    x0_t is the final latent x_t. NaN where a latent is constant or not finite. On the CPU, in one transfer. The rollout
    told the correlations of successive guesses on its way; those with the final latent are one pass over the table.
    """
    successive = trajectory.x0_correlation
    if successive is None:
        curves = curves_of_guesses(trajectory.x0, trajectory.latents[:, -1])
        assert curves.volatility is not None
        return curves.volatility.cpu(), curves.preference.cpu()
    final = ops.correlations(trajectory.x0, trajectory.latents[:, -1]).float()
    successive, preference = torch.stack([successive, final]).cpu()
    volatility = 1 - torch.cat([successive[:, :-1], preference[:, -1:]], 1)
    return volatility, torch.cat([preference, torch.ones(len(preference), 1)], 1)


@torch.no_grad()
def curves_of_guesses(x0: Float[Tensor, "b t *latent"], final: Float[Tensor, "b *latent"]) -> Curves:
    """The same from x0 guesses of any sampler and the final latents, for loops that are not ours; where they are."""
    preference = ops.correlations(x0, final.to(x0.dtype)).float()
    volatility = 1 - torch.cat([successive_correlations(x0).float(), preference[:, -1:]], 1)
    return Curves(torch.cat([preference, torch.ones_like(preference[:, :1])], 1), volatility=volatility)


def _state(trajectory: Trajectory, rows: Tensor, state: int) -> Tensor:
    if state == trajectory.num_steps:
        return trajectory.latents[rows, -1]
    return trajectory.x0[rows, state]
