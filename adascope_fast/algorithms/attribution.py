"""Which steps the final reward is credited to, and how much of it each gets.

Axes: `b` samples, `t` steps, noisiest first. Weights multiply the advantages after they were normalised, so statistics
of the rewards stay what they were; over the credited steps of a sample they add up to the number of those steps, so a
weighting moves credit between steps and not the size of an update.
"""

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from torch.nn.functional import cosine_similarity

from adascope_fast.algorithms import settings
from adascope_fast.backbone import in_double
from adascope_fast.rollout import Trajectory


class Attribution(settings.Attribution):
    """How a selector's choice is credited; see `settings.Attribution`.

    If the guess falls at all of a sample's steps, or no gain is positive, they are credited alike.
    """

    @property
    def is_known_ahead(self) -> bool:
        """Whether the weights follow from the chosen steps alone, so that they are known before the rollout."""
        return self.attribution in ("uniform", "discount")

    def steps(self, chosen: Bool[Tensor, "b t"], trainable: Bool[Tensor, " t"]) -> Bool[Tensor, "b t"]:
        """The steps to train, of those a selector has chosen."""
        trainable = trainable.to(chosen.device)
        if self.backfill == "interval":
            return chosen
        if self.backfill == "sparse":
            trainable = trainable & (trainable.cumsum(0) == trainable.sum())
        return trainable.expand_as(chosen)

    def credit(self, steps: Bool[Tensor, "b t"], gains: Float[Tensor, "b t"] | None = None) -> Float32[Tensor, "b t"]:
        """Weight of each step, 0 outside `steps`; a row's weights add up to the number of its steps.

        Args:
            gains: what each step adds, for "gain" and "similarity"; what is not finite counts as nothing.
        """
        t, kept = steps.shape[1], in_double(steps)
        if self.is_known_ahead:
            gamma = self.gamma if self.attribution == "discount" else 1.0
            raw = gamma ** torch.arange(t - 1, -1, -1, device=kept.device, dtype=torch.float64)
        elif gains is None:
            raise ValueError(
                f'attribution = "{self.attribution}" needs a selector that has sensed the preference along this '
                f"rollout, and this one has not; sense every rollout of 4 steps or more, or use another attribution"
            )
        else:
            raw = in_double(gains).to(kept.device).nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
        raw = raw * kept
        raw = torch.where(raw.sum(1, keepdim=True) > 0, raw, kept)
        weight = raw * (kept.sum(1, keepdim=True) / raw.sum(1, keepdim=True).clamp(min=1e-300))
        return weight.float().to(steps.device)


@torch.no_grad()
def similarity_gains(trajectory: Trajectory) -> Float32[Tensor, "b t"]:
    """What each step adds to the cosine of the guess of the final latent and the final latent itself.

    Step i leads from guess i to the next; the last leads to the final latent, whose cosine is 1.
    """

    def gains(own: Trajectory, _: slice) -> Tensor:
        final = own.latents[:, -1].flatten(1).float()
        cosines = [cosine_similarity(guess.flatten(1).float(), final) for guess in own.x0.unbind(1)]
        return torch.stack([*cosines, torch.ones_like(cosines[0])], 1).diff(dim=1)

    return trajectory.over(gains)
