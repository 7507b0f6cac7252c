"""One resumable loop for every pretraining stage: AdamW, cosine rate, moving average of the weights, progress bar.

A step's data depend on the step number alone, so a stage that was stopped continues exactly where it was.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from adascope_fast.training import checkpoint
from adascope_fast.training.monitoring.progress import bar


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one stage trains. `ema` is the decay of the averaged weights."""

    num_steps: int
    learning_rate: float
    warmup: int = 50
    ema: float = 0.995
    weight_decay: float = 1e-4
    save_every: int = 100

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then half a cosine down to 2 % of the peak."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.num_steps - self.warmup)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    recipe: Recipe,
    folder: Path,
    title: str,
    *,
    matrices: Sequence[Tensor] = (),
    muon: float = 1.0,
) -> None:
    """Leave the moving average of the trained weights in `model`; state is kept in `folder` and resumed from it.

    Args:
        matrices: weights that Muon trains in place of AdamW, at `muon` times the learning rate.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = _optimizers(parameters, matrices, recipe, muon)
    average = [parameter.detach().clone() for parameter in parameters]
    start = 0
    if (folder / "state.json").is_file():
        found = checkpoint.load(folder)
        start = found.state["step"]
        for index, parameter in enumerate(parameters):
            parameter.data.copy_(found.tensors[f"parameter.{index}"])
            average[index].copy_(found.tensors[f"average.{index}"])
        for name, (optimizer, _) in optimizers.items():
            checkpoint.load_optimizer_tensors(optimizer, checkpoint.select(found.tensors, name))
    model.train()
    shown = bar(title, recipe.num_steps, unit="it", first=start, stays=True)
    recent = None
    for step in range(start, recipe.num_steps):
        for optimizer, factor in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = factor * recipe.rate(step)
        loss = loss_at(step)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, _ in optimizers.values():
            optimizer.step()
        decay = min(recipe.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
        recent = loss.item() if recent is None else 0.98 * recent + 0.02 * loss.item()
        shown.set_postfix(loss=f"{recent:.4f}", refresh=False)
        shown.update()
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.num_steps:
            tensors = {f"parameter.{index}": parameter for index, parameter in enumerate(parameters)}
            tensors |= {f"average.{index}": value for index, value in enumerate(average)}
            for name, (optimizer, _) in optimizers.items():
                tensors |= checkpoint.prefixed(checkpoint.optimizer_tensors(optimizer), name)
            checkpoint.save(folder, tensors, {"step": step + 1, "loss": recent})
    shown.close()
    for parameter, value in zip(parameters, average, strict=True):
        parameter.data.copy_(value)
    model.eval()


def _optimizers(
    parameters: list[nn.Parameter], matrices: Sequence[Tensor], recipe: Recipe, muon: float
) -> dict[str, tuple[torch.optim.Optimizer, float]]:
    """The optimisers by the names of their state, each with its factor of the learning rate."""
    apart = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in apart]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    adamw = torch.optim.AdamW(others, lr=rate, weight_decay=decay)
    found: dict[str, tuple[torch.optim.Optimizer, float]] = {"optimizer": (adamw, 1.0)}
    if matrices:
        second = torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        found["muon"] = (second, muon)
    return found
