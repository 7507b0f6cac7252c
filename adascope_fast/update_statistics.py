"""What the updates of an iteration did, gathered on the device and read by the host once."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

MEANS = ("loss", "kl", "approx_kl", "clipfrac", "rollout_drift")


@dataclass
class UpdateStatistics:
    """`add` each update, `read` at the end; no value is looked at in between."""

    _sums: list[Tensor] = field(default_factory=list)
    _deviations: list[Tensor] = field(default_factory=list)
    _norms: list[Tensor] = field(default_factory=list)

    def add(self, microbatches: list[dict[str, Float32[Tensor, " n"]]], norm: Float32[Tensor, ""]) -> None:
        """One update: of each pair of its microbatches what `transition_policy_loss` tells, and the gradient's norm."""
        for stats in microbatches:
            zero, nonfinite = torch.zeros_like(stats["loss"]), ~stats["loss"].isfinite()
            values = [*(stats.get(name, zero) for name in MEANS), nonfinite]
            self._sums.append(torch.stack([value.float().sum() for value in values]))
            self._deviations.append((stats["ratio"] - 1).abs().max() if "ratio" in stats else zero.sum())
        self._norms.append(norm)

    def read(self, num_pairs: int) -> dict[str, Any]:
        """Means over pairs, counts, the largest |ratio - 1| and the mean norm; waits for the device."""
        norms = torch.stack(self._norms)
        good = norms.isfinite()
        norm = torch.where(good, norms, 0.0).sum() / good.sum()  # nan if every update was skipped
        deviation = torch.stack(self._deviations).max()
        rest = torch.stack([deviation, norm, (~good).sum()]).float()
        *means, nonfinite, deviation, norm, skipped = torch.cat([torch.stack(self._sums).sum(0), rest]).tolist()
        return {
            **{name: value / num_pairs for name, value in zip(MEANS, means, strict=True)},
            "nonfinite": round(nonfinite),
            "ratio_max_deviation": deviation,
            "grad_norm": norm,
            "updates_skipped": round(skipped),
            "pairs_trained": num_pairs,
        }
