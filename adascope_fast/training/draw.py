"""Pictures from a trained run next to the base model's: deterministic, and the same as plain diffusers draws."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from adascope_fast import backbones
from adascope_fast.backbone import Backbone, Ema
from adascope_fast.config import Config, ConfigError
from adascope_fast.rollout import EncodedPrompts, rollout
from adascope_fast.training import checkpoint
from adascope_fast.training.run_folder import load_config


def initial_latents(backbone: Backbone, seeds: Sequence[int]) -> Float[Tensor, "n *latent"]:
    """Standard normal latents on the CPU, one seed a picture: `torch.Generator().manual_seed(seed)` in diffusers."""
    drawn = [torch.randn(backbone.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn)


def draw(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int,
    guidance_scale: float,
    batch: int = 16,
) -> Float[Tensor, "n 3 h w"]:
    """One picture of every (prompt, seed), prompt by prompt, with the model's own deterministic sampler."""
    schedule = backbone.deterministic_schedule(num_steps)
    device = schedule.coef.device
    trajectory = rollout(
        backbone,
        schedule,
        EncodedPrompts.of(backbone, prompts),
        [prompt for prompt in prompts for _ in seeds],
        guidance_scale=guidance_scale,
        generator=torch.Generator(device).manual_seed(0),
        batch=batch,
        initial=initial_latents(backbone, seeds).repeat(len(prompts), 1, 1, 1).to(device),
    )
    return backbone.decode(trajectory.latents[:, -1]).cpu()


def load_run(folder: Path, **changes: Any) -> tuple[Config, backbones.PipelineBackbone]:
    """The configuration of a run and its model with the newest weights; an unfinished run will do.

    Args:
        changes: arguments of `backbones.load` in place of the configuration's.
    """
    config = load_config(folder)
    found = checkpoint.numbered(folder / "checkpoints")
    if not found:
        raise ConfigError(f"{str(folder)!r} has no checkpoint yet; let the run finish an iteration first")
    backbone = backbones.load(config.model.name, **config.model.options() | changes)
    tensors, _ = checkpoint.load(found[-1])
    backbone.load_adapter_tensors(checkpoint.select(tensors, "adapter"))
    if config.model.average_decay:
        ema = Ema(backbone.trainable_parameters(), config.model.average_decay)
        ema.load(checkpoint.select(tensors, "ema"))
        ema.swap()
    if torch.cuda.is_available() and config.train.device != "cpu":
        backbone.to(torch.device("cuda"))
    return config, backbone
