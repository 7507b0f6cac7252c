"""Policy-gradient objectives of packed steps: pure and unreduced, `n` (sample, step) pairs in, `n` losses out.

ddpo-pytorch averages inside its loss; here the caller divides by a fixed count, so that microbatch size cannot matter.
log_prob is the mean over latent elements: clip ranges such as 1e-4 are only meaningful for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from adascope_fast import ops

Objective = Callable[
    [Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]], tuple[Float[Tensor, " n"], Float[Tensor, " n"]]
]
"""(log_prob, old_log_prob, advantage) -> (loss, ratio), all [n]; the engine averages."""


@dataclass(frozen=True)
class Clipped:
    """The clipped losses, for which there is a fused operation.

    "ppo": max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range_high)); "dpok": -A clip(r), so a ratio outside the range
    has no gradient whatever the sign of A (google-research/dpok).
    """

    clip_range: float = 1e-4
    clip_range_high: float | None = None
    """`clip_range` if None."""
    form: Literal["ppo", "dpok"] = "ppo"

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest ratio that is not clipped."""
        high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        return 1 - self.clip_range, 1 + high

    def __call__(
        self, log_prob: Float[Tensor, " n"], old_log_prob: Float[Tensor, " n"], advantage: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """The loss and the ratio r = exp(log_prob - old_log_prob)."""
        loss = ops.clipped_policy_loss if self.form == "ppo" else ops.dpok_policy_loss
        bounds = {"clip_range": self.clip_range, "clip_range_high": self.clip_range_high}
        return loss(log_prob, old_log_prob, advantage, **bounds)


def score_function(
    log_prob: Float[Tensor, " n"], old_log_prob: Float[Tensor, " n"], advantage: Float[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """REINFORCE's loss -A log_prob and the ratio; right only for one update after each rollout."""
    return -advantage.detach() * log_prob, (log_prob.detach() - old_log_prob.detach()).exp()


def clipped_value_loss(
    value: Float[Tensor, " n"], old_value: Float[Tensor, " n"], target: Float[Tensor, " n"], value_clip: float
) -> Float[Tensor, " n"]:
    """Half of max((v - G)^2, (old + clip(v - old) - G)^2), unreduced: a critic moves by `value_clip` at most."""
    near = old_value + (value - old_value).clamp(-value_clip, value_clip)
    return 0.5 * torch.maximum((value - target).square(), (near - target).square())
