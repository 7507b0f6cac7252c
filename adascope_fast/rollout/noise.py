"""The noise of a rollout: each sample's is drawn from a seed of its own, made of its number.

So a sample has the same noise however many are drawn with it, at once, or on other ranks. The noise of a batch drawn
in one piece would depend on how many samples that batch has.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of successive numbers; odd, so that they differ in the 32 bits that a CPU's generator reads."""


@dataclass(frozen=True)
class OwnNoise:
    """Standard normal numbers by the number of a sample."""

    base: int
    """Of the seeds."""

    def of_use(self, number: int) -> "OwnNoise":
        """Other noise of the same samples: a use of it has a number of its own, such as a step."""
        return OwnNoise(random.Random(f"{self.base}/{number}").getrandbits(62))

    def seed(self, number: int) -> int:
        """Of a sample's noise."""
        return (self.base + number * STRIDE) % 2**63

    def fill(self, tables: Sequence[Tensor], numbers: Sequence[int]) -> None:
        """Draw into row i of each table, one table after another, what belongs to sample `numbers[i]`."""
        generator = torch.Generator(tables[0].device)
        for row, number in enumerate(numbers):
            generator.manual_seed(self.seed(number))
            for table in tables:
                torch.randn(table.shape[1:], generator=generator, out=table[row])

    def of(self, numbers: Sequence[int], shape: Sequence[int], device: torch.device) -> Float[Tensor, "m ..."]:
        """A new table with a row of this shape for each number."""
        table = torch.empty(len(numbers), *shape, device=device)
        self.fill([table], numbers)
        return table
