"""Images from a trained run next to the base model's: deterministic, and the same as plain diffusers draws."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from adascope_fast import backbones
from adascope_fast.backbone import Backbone, Ema
from adascope_fast.config import Config, ConfigError
from adascope_fast.engine.scoring import decoded_whole
from adascope_fast.rollout import EncodedPrompts, OwnNoise, rollout
from adascope_fast.training import checkpoint, origin
from adascope_fast.training.monitoring.best import best_weights
from adascope_fast.training.run_folder import load_run_files


def initial_latents(backbone: Backbone, seeds: Sequence[int]) -> Float[Tensor, "n *latent"]:
    """Standard normal latents on the CPU, one seed an image: `torch.Generator().manual_seed(seed)` in diffusers."""
    drawn = [torch.randn(backbone.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn)


def draw(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int,
    guidance_scale: float,
    shift: float | None = None,
    batch: int = 16,
    on_step: Callable[[int], None] | None = None,
) -> Float[Tensor, "n 3 h w"]:
    """One image of every (prompt, seed), prompt by prompt, as `draw_each` has them; `on_step` as in `rollout`."""
    return draw_each(
        backbone,
        [prompt for prompt in prompts for _ in seeds],
        [seed for _ in prompts for seed in seeds],
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        shift=shift,
        batch=batch,
        on_step=on_step,
    )


def draw_each(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int,
    guidance_scale: float,
    shift: float | None = None,
    batch: int = 16,
    on_step: Callable[[int], None] | None = None,
) -> Float[Tensor, "n 3 h w"]:
    """An image of each prompt on its seed, with the model's own deterministic sampler, on the CPU.

    `shift` replaces a flow's noise levels as `sampler.shift` does.

    FloatingPointError where one is not finite.
    """
    schedule = backbone.deterministic_schedule(num_steps, shift=shift)
    device = schedule.coef.device
    trajectory = rollout(
        backbone,
        schedule,
        EncodedPrompts.of(backbone, list(dict.fromkeys(prompts))),
        prompts,
        guidance_scale=guidance_scale,
        noise=OwnNoise(0),
        batch=batch,
        on_step=on_step,
        initial=initial_latents(backbone, seeds).to(device),
    )
    images = decoded_whole(backbone, trajectory.latents[:, -1]).cpu()
    count = int((~images.flatten(1).isfinite().all(1)).sum())
    if count:
        raise FloatingPointError(
            f"images must be finite, and {count} of {len(images)} are not: the weights or the type that they are "
            f'stored in fail; try model.dtype = "float32"'
        )
    return images


def load_run(
    folder: Path, *, pipeline: DiffusionPipeline | None = None, **changes: Any
) -> tuple[Config, backbones.PipelineBackbone]:
    """The configuration of a run and its model with the newest weights; an unfinished run will do.

    Args:
        pipeline: the one that the run was made with, where that was passed in Python.
        changes: arguments of `backbones.load` in place of the configuration's, or besides.

    Raises:
        ConfigError: there is no whole checkpoint, or the pipeline is not the one that was trained.
    """
    started = load_run_files(folder)
    config, found = started.config, started.checkpoint
    if found is None:
        raise ConfigError(f"{str(folder)!r} has no checkpoint yet; let the run finish an iteration first")
    if pipeline is None:
        instead = "adascope_fast.training.draw.load_run({folder}, {arguments})"
        origin.refuse_given(folder, ["pipeline"], instead=instead)
    options = config.model.options()
    backbone = backbones.load(config.model.name if pipeline is None else pipeline, **options | changes)
    if options["quantize"] == "none":  # else the weights are other ones, if they are read without it
        before, _, _ = origin.read(folder)
        dtype, is_given = getattr(torch, options["dtype"]), pipeline is not None
        now = origin.of_pipeline(backbone.pipeline.components, backbone.name, dtype, is_given=is_given)
        if changed := origin.differences(before, {"pipeline": now}):
            raise ConfigError(
                f"trained weights belong to the model that they were trained on, and {'; '.join(changed)}; "
                f"restore that model, or set model.name in config.toml to where it is now"
            )
    best = best_weights(folder, config)
    backbone.load_adapter_tensors(checkpoint.select(found.tensors, "adapter") if best is None else best)
    if config.model.average_decay and best is None:
        ema = Ema(backbone.trainable_parameters(), config.model.average_decay)
        ema.load(checkpoint.select(found.tensors, "ema"))
        ema.swap()
    if torch.cuda.is_available() and config.train.device != "cpu":
        backbone.to(torch.device("cuda"))
    return config, backbone
