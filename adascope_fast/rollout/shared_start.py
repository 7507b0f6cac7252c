"""Samples that start alike: what they have in common is computed once.

The images of a group that start from one latent are the same until the sampler first adds noise. With a window that
begins late, those steps are most of a rollout (the branching of Flow-GRPO-Fast).

Axes: `b` samples, `t` steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from adascope_fast.rollout.trajectory import Tables
from adascope_fast.schedules import Schedule
from adascope_fast.schedules.tail import Tails


@dataclass(frozen=True)
class SharedStart:
    """Which of an iteration's samples each of `b` samples starts like, and for how many steps it stays so."""

    first: list[int]
    """The number of the first sample of the same prompt, whose initial noise they have."""
    num_shared: int
    """Steps that the first of them here alone takes, as the sampler has no noise there."""

    @classmethod
    def of(
        cls, prompts: Sequence[str], schedule: Schedule, tails: Tails | None = None, own: slice = slice(None)
    ) -> "SharedStart":
        """The samples of a prompt start alike, and part at the sampler's first step with noise.

        Where a sample leaves the sampler before that step, each walks alone.

        Args:
            prompts: of all samples of the iteration.
            own: those that are sampled here.
        """
        number: dict[str, int] = {}
        first = [number.setdefault(prompt, row) for row, prompt in enumerate(prompts)]
        noisy = (schedule.coef[:, 2] > 0).cpu().nonzero()
        num_shared = int(noisy[0]) if len(noisy) else 0
        if tails is not None and int(tails.start.min()) < num_shared:
            num_shared = 0
        return cls(first[own], num_shared)

    @cached_property
    def leader(self) -> Int64[Tensor, " b"]:
        """The first sample here that starts like each; on the CPU."""
        row: dict[int, int] = {}
        return torch.tensor([row.setdefault(number, place) for place, number in enumerate(self.first)])

    @cached_property
    def is_leader(self) -> Bool[Tensor, " b"]:
        """On the CPU."""
        return self.leader == torch.arange(len(self.leader))

    @property
    def num_saved(self) -> int:
        """Steps of single samples that are copied instead."""
        return self.num_shared * int((~self.is_leader).sum())

    def part(self, rows: slice, tables: Tables) -> None:
        """Give the samples of a batch what their leaders have found on the shared steps, and let them go on alone."""
        members = torch.arange(rows.start, rows.stop)
        members = members[~self.is_leader[rows]]
        if not len(members) or not self.num_shared:
            return
        device, count = tables.latents.device, self.num_shared
        to, of = (x.to(device, non_blocking=True) for x in (members, self.leader[members]))
        tables.latents[to, 1 : count + 1] = tables.latents[of, 1 : count + 1]
        for table in (tables.x0, tables.log_prob, tables.sample_correlation):
            table[to, :count] = table[of, :count]
        tables.x0_correlation[to, : count - 1] = tables.x0_correlation[of, : count - 1]
