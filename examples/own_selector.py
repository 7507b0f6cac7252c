"""Train steps of your own choice: a selector is a rule for which (sample, step) pairs are trained.

    python examples/own_selector.py [CONFIG.toml] [section.key=value ...]

This one depends on the iteration alone, so `Stateless` supplies the rest of the protocol.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from adascope_fast import Config, Schedule, Trainer
from adascope_fast.selectors.protocol import Stateless

CONFIG = str(Path(__file__).parents[1] / "configs" / "quickstart.toml")


@dataclass
class EveryOther(Stateless):
    """Even steps in even iterations, odd steps in odd ones."""

    def ahead(self, prompts: list[str], schedule: Schedule, iteration: int) -> torch.Tensor:
        """Keep [b, t], True where a step is trained, on the CPU; a step without noise has no log_prob to train."""
        keep = torch.arange(schedule.num_steps) % 2 == iteration % 2
        return (keep & schedule.trainable.cpu()).expand(len(prompts), -1)


def main() -> None:
    """Train with `EveryOther`; the share of the steps that was trained."""
    path, *changes = sys.argv[1:] or [CONFIG]
    config = Config.load(path, ["run.folder=runs/own_selector", *changes])
    result = Trainer(config, selector=EveryOther()).train()
    print(f"{result.fraction_trained:.0%} of the steps trained; {result.report}")


if __name__ == "__main__":
    main()
