"""How an engine carries an iteration out: batches, updates, and what of the rollout is saved."""

from dataclasses import dataclass
from typing import Literal

from adascope_fast.algorithms import Algorithm

ROWS_THAT_PAY = 64
"""Rows of a training forward up to which more of them are cheaper each (a quarter on a CPU, from 16 to 64)."""


@dataclass(frozen=True)
class Settings:
    """How an iteration is carried out. Batches change memory and speed, never the result beyond rounding.

    `microbatch` None is the rollout's batch, or what makes 64 rows of a forward if that is more; both batches are
    halved where memory runs out. `update` "one_pass" saves the replay's forward pass, see `adascope_fast.one_pass`;
    `fold_adapter` adds LoRA to float32 base weights while nothing is differentiated. `tail_share` below 1 replaces the
    steps after a sample's last trained one by that share of them, of a second-order ODE solver; they have to be known
    beforehand, and a rollout that the selector looks at is sampled in full.
    """

    guidance_scale: float
    rollout_batch: int
    microbatch: int | None = None
    updates_per_iteration: int = 1
    max_grad_norm: float = 1.0
    update: Literal["replay", "one_pass"] = "replay"
    fold_adapter: bool = False
    tail_share: float = 1.0

    def check(self, algorithm: Algorithm) -> None:
        """ValueError where `algorithm` cannot be carried out like this."""
        if self.update == "one_pass" and (self.updates_per_iteration != 1 or algorithm.kl_weight):
            raise ValueError(
                "one_pass makes one update an iteration, without KL, got "
                f"{self.updates_per_iteration} updates and kl_weight = {algorithm.kl_weight}; use update = 'replay'"
            )
        is_early = self.update == "one_pass" or self.tail_share < 1
        if is_early and not algorithm.attribution.is_known_ahead:
            raise ValueError(
                "one_pass and a tail_share below 1 need the weights before the rollout, and "
                f"{algorithm.attribution.weights!r} is known after it; use weights 'uniform' or 'discount', or "
                f"update = 'replay' and tail_share = 1"
            )


def usual_microbatch(rollout_batch: int, guidance_scale: float) -> int:
    """Pairs of a training forward where none are asked for; guidance makes two rows of each."""
    return max(rollout_batch, ROWS_THAT_PAY // (1 if guidance_scale == 1 else 2))
