"""Policy-gradient losses of packed steps: pure and unreduced, `n` (sample, step) pairs in, `n` losses out.

ddpo-pytorch averages inside its loss; here the caller divides by a fixed count, so that microbatch size cannot matter.
log_prob is the mean over latent elements: clip ranges such as 1e-4 are only meaningful for it.
"""

from jaxtyping import Float
from torch import Tensor

from adascope_fast import ops


def ppo_clip(
    log_prob: Float[Tensor, " n"],
    old_log_prob: Float[Tensor, " n"],
    advantage: Float[Tensor, " n"],
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """PPO's clipped loss max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range_high)) and the ratio r.

    Args:
        log_prob: of the current policy; the gradient flows to it.
        old_log_prob: recorded by the rollout.
        clip_range_high: clip_range if None.
    """
    return ops.clipped_policy_loss(
        log_prob, old_log_prob, advantage, clip_range=clip_range, clip_range_high=clip_range_high
    )


def reinforce(log_prob: Float[Tensor, " n"], advantage: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The score-function loss -A log_prob; right only for one update after each rollout."""
    return -advantage.detach() * log_prob
