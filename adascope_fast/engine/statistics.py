"""What the updates of an iteration did, gathered on the device and read by the host once."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

MEANS = ("loss", "kl", "approx_kl", "clipfrac", "rollout_drift")


@dataclass
class UpdateStatistics:
    """`add` each update, `read` at the end; no value is looked at in between.

    `num_steps` is the number of denoising steps, t.
    """

    num_steps: int
    _sums: list[Tensor] = field(default_factory=list)
    _deviations: list[Tensor] = field(default_factory=list)
    _drifts: list[Tensor] = field(default_factory=list)
    _norms: list[Tensor] = field(default_factory=list)
    _by_step: list[Tensor] = field(default_factory=list)
    _num_trained: int = 0
    _num_skipped: int = 0

    def add(
        self,
        microbatches: list[dict[str, Float32[Tensor, " n"]]],
        norm: Float32[Tensor, ""],
        *,
        num_skipped: int = 0,
    ) -> None:
        """One update: of each row of its microbatches what the algorithm's loss tells, and the gradient's norm.

        "step" is the denoising step of each row, "output_gradient" the norm of the loss' gradient in the model output.

        Args:
            num_skipped: rows that were not trained, since their loss has no gradient.
        """
        self._num_skipped += num_skipped
        for stats in microbatches:
            zero, nonfinite = torch.zeros_like(stats["loss"]), ~stats["loss"].isfinite()
            values = [*(stats.get(name, zero) for name in MEANS), nonfinite]
            self._num_trained += len(zero)
            self._sums.append(torch.stack([value.float().sum() for value in values]))
            deviation = (stats["ratio"] - 1).abs() if "ratio" in stats else zero
            self._deviations.append(deviation.max())
            if not self._norms and "rollout_drift" in stats:  # later the policy has moved
                self._drifts.append(stats["rollout_drift"].float().max())
            rows = [torch.ones_like(zero), deviation, stats.get("clipfrac", zero), stats.get("output_gradient", zero)]
            steps = torch.arange(self.num_steps, device=zero.device)
            where = (stats["step"].unsqueeze(1) == steps).float()  # sums in a fixed order, unlike atomic additions
            self._by_step.append(torch.stack([row.float().nan_to_num(0.0, 0.0, 0.0) for row in rows]) @ where)
        self._norms.append(norm)

    def read(self) -> dict[str, Any]:
        """Means over trained rows (the loss: over all), counts, the largest |ratio - 1|, the mean norm; waits.

        `rollout_drift_max` is that of the first update, before any parameter has moved: what rounding does.
        """
        norms = torch.stack(self._norms) if self._norms else torch.zeros(0)
        good = norms.isfinite()
        norm = torch.where(good, norms, 0.0).sum() / good.sum()  # nan if every update was skipped
        deviation = torch.stack(self._deviations or [torch.zeros_like(norm)]).max()
        drift = torch.stack(self._drifts or [torch.zeros_like(norm)]).max()
        rest = torch.stack([deviation, drift, norm, (~good).sum()]).float()
        nothing = torch.zeros(len(MEANS) + 1, device=norm.device)
        sums = torch.stack(self._sums).sum(0) if self._sums else nothing
        *means, nonfinite, deviation, drift, norm, skipped = torch.cat([sums, rest]).tolist()
        count = {"loss": max(1, self._num_trained + self._num_skipped)}
        return {
            **{
                name: value / count.get(name, max(1, self._num_trained))
                for name, value in zip(MEANS, means, strict=True)
            },
            "nonfinite": round(nonfinite),
            "ratio_max_deviation": deviation,
            "rollout_drift_max": drift,
            "grad_norm": norm,
            "updates_skipped": round(skipped),
            "pairs_trained": self._num_trained,
            "pairs_skipped": self._num_skipped,
        }

    def by_step(self) -> dict[str, list[float | None]]:
        """For each denoising step its pairs, mean |ratio - 1|, clipped share, and share of the output gradients' norms.

        None where a step had no pair, or no gradient was seen; waits for the device.
        """
        nothing = torch.zeros(4, self.num_steps)
        parts = torch.stack(self._by_step).sum(0) if self._by_step else nothing
        pairs, deviation, clipped, gradient = parts.double().cpu()
        total = gradient.sum().item()
        return {
            "pairs": [float(count) for count in pairs.tolist()],
            "ratio_deviation": _where(deviation / pairs, pairs),
            "clipfrac": _where(clipped / pairs, pairs),
            "gradient_share": _where(gradient / total, pairs if total > 0 else torch.zeros_like(pairs)),
        }


def as_json(values: Tensor) -> list[float | None]:
    """Six digits of each value; None where it is not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def _where(values: Tensor, counts: Tensor) -> list[float | None]:
    return as_json(values.masked_fill(counts == 0, math.nan))
