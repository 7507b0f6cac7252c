"""The tables of a rollout as rows that numbers on the device pick from, so that all its steps are one operation.

Axes: `b` samples, `t` steps, `m` states.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from adascope_fast import ops
from adascope_fast.reference.rows import picked
from adascope_fast.rollout.trajectory import Tables


@dataclass(frozen=True)
class FlatTables:
    """The tables of a rollout of `b` samples, a column a state, one row after another.

    So a state's number finds its row in each: row i enters a step, and i + 1 is where it leads. All but the latents
    have a row of nobody's before the first, to be the guess before it. Of tables with `t` columns, the last of a
    sample's `t + 1` rows is nobody's either.
    """

    latents: Float[Tensor, "b*(t+1) *latent"]
    x0: Float[Tensor, "b*(t+1)+1 *latent"]
    log_prob: Float32[Tensor, " b*(t+1)+1"]
    x0_correlation: Float32[Tensor, " b*(t+1)+1"]
    sample_correlation: Float32[Tensor, " b*(t+1)+1"]
    numbers: Int64[Tensor, " b*(t+1)"]
    """0, 1, ...: of samples and steps."""
    num_steps: int

    @classmethod
    def like(cls, tables: Tables) -> "FlatTables":
        """Of a rollout of the same size, with latents in the same layout."""
        latents = torch.empty_like(tables.latents).flatten(0, 1)
        x0 = latents.new_empty_strided((len(latents) + 1, *latents.shape[1:]), latents.stride()).fill_(torch.nan)
        log_prob, of_x0, of_sample = tables.log_prob.new_full((3, len(x0)), torch.nan)
        counted = torch.arange(len(latents), device=latents.device)
        return cls(latents, x0, log_prob, of_x0, of_sample, counted, tables.log_prob.shape[1])

    def tables(self) -> Tables:
        """The same as others see it."""
        columns = self.num_steps + 1
        values = (self.x0, self.log_prob, self.x0_correlation, self.sample_correlation)
        parts = [value[1:].unflatten(0, (-1, columns))[:, : self.num_steps] for value in values]
        return Tables(self.latents.unflatten(0, (-1, columns)), *parts)

    def sample(self, rows: Int64[Tensor, " m"]) -> Float[Tensor, "m *latent"]:
        """The latents of some states. A copy."""
        return picked(self.latents, rows)

    @property
    def step(self) -> dict[str, Any]:
        """What `ops.transition_step_with_x0` reads and writes; its `rows` are the states that enter a step."""
        after = {name: getattr(self, name)[1:-1] for name in ("x0", "log_prob", "sample_correlation")}
        out = ops.Step(prev_sample=self.latents[1:], x0_correlation=self.x0_correlation[:-2], **after)
        return {"sample": self.latents[:-1], "noise": self.latents[1:], "prev_x0": self.x0[:-2], "out": out}
