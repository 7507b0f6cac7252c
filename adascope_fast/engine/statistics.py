"""What the updates of an iteration did, gathered on the device and read by the host once."""

import itertools
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from adascope_fast.distributed import Ranks

MEANS = ("loss", "kl", "approx_kl", "clipfrac", "rollout_drift")
KNOWN = {*MEANS, "ratio", "step", "nonfinite", "output_gradient", "log_prob", "rollout_log_prob"}
"""What every algorithm may tell of a row; other names are its own."""


@dataclass
class UpdateStatistics:
    """`add` each update, `read` at the end; no value is looked at, and nothing is computed, in between.

    `num_steps` is the number of denoising steps, t.
    """

    num_steps: int
    ranks: Ranks | None = None
    """Whose rows are read together, as each adds those that it trained; None: every rank adds all."""
    _rows: list[dict[str, Float32[Tensor, " n"]]] = field(default_factory=list)
    _norms: list[Tensor] = field(default_factory=list)
    _num_skipped: int = 0
    _num_first: int = 0

    def add(
        self,
        microbatches: list[dict[str, Float32[Tensor, " n"]]],
        norm: Float32[Tensor, ""],
        *,
        num_skipped: int = 0,
    ) -> None:
        """One update: of each row of its microbatches what the algorithm's loss tells, and the gradient's norm.

        "step" is the denoising step of each row, "output_gradient" the norm of the loss' gradient in the model output.
        What has a name of the algorithm's own is told as its mean.

        Args:
            num_skipped: rows that were not trained, since their loss has no gradient.
        """
        self.__dict__.pop("_told", None)
        self._rows += microbatches
        if not self._norms:
            self._num_first = sum(len(rows["loss"]) for rows in microbatches)
        self._norms.append(norm)
        self._num_skipped += num_skipped

    def read(self) -> dict[str, Any]:
        """Means over trained rows (the loss: over all), counts, the largest deviations, the mean norm; waits.

        `rollout_drift_max` is that of the first update, before any parameter has moved: what rounding does.
        """
        return self._told[0]

    def by_step(self) -> dict[str, list[float | None]]:
        """For each denoising step its pairs, mean |ratio - 1|, clipped share, and share of the output gradients' norms.

        None where a step had no pair, or no gradient was seen; waits for the device.
        """
        return self._told[1]

    @cached_property
    def _told(self) -> tuple[dict[str, Any], dict[str, list[float | None]]]:
        """What `read` and `by_step` say, in one transfer."""
        norms = torch.stack(self._norms).float() if self._norms else torch.zeros(0)
        rows = {name: self._column(name, norms.device) for name in ("loss", "kl", "approx_kl", "clipfrac", "step")}
        rows |= {name: self._column(name, norms.device) for name in ("output_gradient", "log_prob", "rollout_log_prob")}
        rows["ratio"] = self._column("ratio", norms.device, nothing=1.0)
        rows["rollout_drift"] = (rows["log_prob"] - rows["rollout_log_prob"]).abs()
        own = sorted({name for part in self._rows for name in part} - KNOWN)
        rows |= {name: self._column(name, norms.device) for name in own}
        num_first = self._num_first
        if self.ranks is not None and not self.ranks.is_alone:
            rows, own, num_first = self._of_all(self.ranks, rows, own)
        deviation = (rows["ratio"] - 1).abs()
        num_trained = len(deviation)
        first = rows["rollout_drift"][:num_first]
        largest = torch.stack([part.max() if len(part) else norms.new_zeros(()) for part in (deviation, first)])
        sums = torch.stack([*(rows[name] for name in MEANS), (~rows["loss"].isfinite()).float()]).sum(1)
        good = norms.isfinite()
        norm = torch.where(good, norms, 0.0).sum() / good.sum()  # nan if every update was skipped
        by_step = self._by_step(rows, deviation)
        means_of_own = torch.stack([norm] + [rows[name].mean() for name in own])[1:]
        told = torch.cat([means_of_own, sums, largest, torch.stack([norm, (~good).sum()]), by_step.flatten()]).cpu()
        own_values, told = dict(zip(own, told.tolist(), strict=False)), told[len(own) :]
        *means, nonfinite, deviation, drift, norm, skipped = told[: len(MEANS) + 5].tolist()
        count = {"loss": max(1, num_trained + self._num_skipped)}
        values = {
            **{name: value / count.get(name, max(1, num_trained)) for name, value in zip(MEANS, means, strict=True)},
            "nonfinite": round(nonfinite),
            "ratio_max_deviation": deviation,
            "rollout_drift_max": drift,
            "grad_norm": norm,
            "updates_skipped": round(skipped),
            "pairs_trained": num_trained,
            "pairs_skipped": self._num_skipped,
            **own_values,
        }
        return values, _told_by_step(told[len(MEANS) + 5 :].view_as(by_step).double())

    def _of_all(
        self, ranks: Ranks, rows: dict[str, Tensor], own: list[str]
    ) -> tuple[dict[str, Tensor], list[str], int]:
        """The rows of all ranks, those of first updates first; the algorithm's own names; how many are of the first."""
        told = ranks.objects((len(rows["loss"]), self._num_first, own))
        every = sorted({name for *_, names in told for name in names})
        names = [*(name for name in rows if name not in own), *every]
        nothing = torch.zeros_like(rows["loss"])
        mine = torch.stack([rows.get(name, nothing) for name in names], 1)
        bounds = [0, *itertools.accumulate(count for count, *_ in told)]
        whole = ranks.whole(mine, bounds)
        where = [torch.arange(bounds[rank], bounds[rank] + first) for rank, (_, first, _) in enumerate(told)]
        where += [torch.arange(bounds[rank] + first, bounds[rank + 1]) for rank, (_, first, _) in enumerate(told)]
        whole = whole[torch.cat(where).to(whole.device)]
        return dict(zip(names, whole.unbind(1), strict=True)), every, sum(first for _, first, _ in told)

    def _column(self, name: str, device: torch.device, *, nothing: float = 0.0) -> Float32[Tensor, " n"]:
        """What is told of every row under a name, `nothing` where it is not."""
        if not self._rows:
            return torch.zeros(0, device=device)
        like = [rows["loss"] for rows in self._rows]
        parts = [
            rows[name] if name in rows else torch.full_like(one, nothing)
            for rows, one in zip(self._rows, like, strict=True)
        ]
        return torch.cat([part.float() for part in parts])

    def _by_step(self, rows: dict[str, Tensor], deviation: Tensor) -> Float32[Tensor, "4 t"]:
        """Sums over the rows of each denoising step: 1, |ratio - 1|, clipped, norm of the output gradient."""
        steps = torch.arange(self.num_steps, device=deviation.device)
        where = (rows["step"].unsqueeze(1) == steps).float()  # sums in a fixed order, unlike atomic additions
        values = [torch.ones_like(deviation), deviation, rows["clipfrac"], rows["output_gradient"]]
        return torch.stack(values).nan_to_num(0.0, 0.0, 0.0) @ where


def _told_by_step(parts: Tensor) -> dict[str, list[float | None]]:
    """See `UpdateStatistics.by_step`."""
    pairs, deviation, clipped, gradient = parts
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
