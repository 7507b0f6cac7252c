"""An algorithm of your own, whole: which rows of the samples are trained, and their loss.

    python examples/own_algorithm.py [CONFIG.toml] [section.key=value ...]

This one imitates the best image of each prompt (RAFT, 2304.06767): the kept steps of the image with the highest reward
become rows, and the loss of a row is minus its log-probability. In a configuration it would be
`algorithm.name = "own_algorithm:Imitation"`, and `algorithm.best = 2` would be its argument.
"""

import sys
from pathlib import Path

import torch

from adascope_fast import Config, Trainer, ops
from adascope_fast.algorithms import Algorithm, Context, Loss, Policy, Samples
from adascope_fast.algorithms.policy_gradient import Pairs
from adascope_fast.rollout import StepBatch

CONFIG = str(Path(__file__).parents[1] / "configs" / "quickstart.toml")


class Imitation(Algorithm):
    """Imitate the `best` images of each prompt; all their kept steps count alike."""

    def __init__(self, best: int = 1) -> None:
        super().__init__(name="imitation")
        self.best = best

    def batch(self, samples: Samples, context: Context) -> Pairs:
        """The kept (image, step) pairs of the best images; the engine draws minibatches of them."""
        chosen = torch.zeros(len(samples.prompts), dtype=torch.bool)
        for prompt in set(samples.prompts):
            rows = [row for row, other in enumerate(samples.prompts) if other == prompt]
            chosen[sorted(rows, key=lambda row: -samples.rewards[row].item())[: self.best]] = True
        keep = context.keep & chosen.to(context.keep.device)[:, None]
        pairs = samples.trajectory.pairs(keep)
        return Pairs(samples.trajectory, pairs, torch.ones(len(pairs), device=pairs.device), is_live=None)

    def loss(self, policy: Policy, rows: tuple[StepBatch, torch.Tensor], *, is_on_policy: bool, scale: float) -> Loss:
        """Minus the log-probability of each pair, unreduced; the engine divides by the number of rows."""
        pairs, _ = rows
        output, without = policy.outputs(pairs.sample, pairs.timestep, pairs.prompt_index)
        log_prob = ops.guided_transition_log_prob(
            pairs.sample, output, without, policy.guidance_scale, pairs.prev_sample, pairs.coef
        )
        return Loss(-log_prob, {"step": pairs.step_index})


def main() -> None:
    """Train with `Imitation`."""
    path, *changes = sys.argv[1:] or [CONFIG]
    config = Config.load(path, ["run.folder=runs/own_algorithm", *changes])
    result = Trainer(config, algorithm=Imitation()).train()
    print(f"{result.fraction_trained:.0%} of the steps trained; {result.report}")


if __name__ == "__main__":
    main()
