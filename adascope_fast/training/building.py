"""What a configuration names, built: device and optimiser, the algorithm, the sensor and the selector."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import nn

from adascope_fast import rewards
from adascope_fast.adascope.decoders import LinearDecoder, TinyDecoder
from adascope_fast.adascope.selector import AdaScope
from adascope_fast.adascope.sensing import DecodedSensor, LatentSensor, Sensor
from adascope_fast.algorithms.attribution import Attribution
from adascope_fast.algorithms.policy_gradient import Algorithm, ddpo, grpo
from adascope_fast.backbone import Backbone
from adascope_fast.backbones import EMBEDDED
from adascope_fast.config import Config, ConfigError
from adascope_fast.engine.acceleration import Acceleration, is_fused
from adascope_fast.rewards import Reward
from adascope_fast.rewards.clip import ClipSimilarity
from adascope_fast.selectors.protocol import TimestepSelector
from adascope_fast.selectors.simple import Complement, EveryStep, RandomFraction, StaticRange, Threshold
from adascope_fast.selectors.windows import FastWindow, Window


def accelerator_of(config: Config) -> Accelerator:
    """The device, its precision and the trackers that a configuration names; ConfigError if one is not there."""
    train = config.train
    if train.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('train.device = "cuda" needs a CUDA GPU, and torch sees none; use "auto" or "cpu"')
    installed = {str(tracker) for tracker in get_available_trackers()}
    for tracker in config.log.trackers:  # accelerate leaves out silently what is not installed
        if tracker not in installed:
            raise ConfigError(
                f"log.trackers are installed ones ({', '.join(sorted(installed)) or 'none'}), got {tracker!r}; "
                f"pip install it, or set log.trackers = []"
            )
    accelerator = Accelerator(
        cpu=train.device == "cpu",
        mixed_precision=train.mixed_precision,
        log_with=config.log.trackers or None,  # type: ignore[arg-type]
        project_dir=config.run.folder,
    )
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"a run uses one process, and accelerate started {accelerator.num_processes}; "
            f"launch it with one, on one GPU"
        )
    return accelerator


def optimizer_of(config: Config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with a configuration's settings."""
    train = config.train
    return torch.optim.AdamW(
        parameters,
        fused=is_fused(Acceleration(**config.acceleration.model_dump())),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.weight_decay,
        eps=train.adam_epsilon,
    )


def algorithm_of(config: Config) -> Algorithm:
    """The algorithm that a configuration names."""
    settings = config.algorithm
    shared: dict[str, Any] = {
        "clip_range": settings.clip_range,
        "clip_range_high": settings.clip_range_high,
        "advantage_clip": settings.advantage_clip,
        "step_weight": settings.step_weight,
        "kl_weight": settings.kl_weight,
    }
    if settings.name == "grpo":
        algorithm = grpo(**shared, scale=settings.advantage_scale)
    else:
        algorithm = ddpo(**shared, buffer_size=settings.per_prompt_buffer, min_count=settings.per_prompt_min_count)
    return replace(algorithm, attribution=Attribution(settings.backfill, settings.attribution, settings.gamma))


def sensor_of(config: Config, backbone: Backbone, reward: Reward, folder: Path | None = None) -> Sensor:
    """The sensor that a configuration names.

    Args:
        reward: the one in training.
        folder: of the run, which keeps the linear decoder; None: it is fitted again in every process.
    """
    sensing = config.sensing
    if sensing.kind == "latent":
        return LatentSensor()
    decode, prepare = backbone.decode, None
    if sensing.decoder == "tiny":
        decode = TinyDecoder(sensing.tiny or "")
    elif sensing.decoder == "linear":
        decode = LinearDecoder(backbone.decode, None if folder is None else folder / "decoder.safetensors")
        prepare = decode.prepare
    return DecodedSensor(
        decode,
        lambda images, texts: rewards.score_guesses(reward, images, texts),
        ClipSimilarity.load(clip_of(config, backbone.name)) if sensing.kind == "semantic" else None,
        stride=sensing.stride,
        num_samples=sensing.num_samples or None,
        prepare=prepare,
    )


def clip_of(config: Config, model: str) -> str:
    """The CLIP of semantic sensing; ConfigError if none is named and none is shipped for `model`."""
    if config.sensing.clip is not None:
        return config.sensing.clip
    if model not in EMBEDDED:
        raise ConfigError(
            f"sensing.kind = semantic needs a CLIP that knows the pictures of {model!r}, got none; set sensing.clip to "
            'a folder or repository, for example "openai/clip-vit-large-patch14"'
        )
    return "scenes-clip"


def selector_of(config: Config, sensor: Sensor | None = None) -> TimestepSelector:
    """The selector that a configuration names; `sensor` None is the latent mode."""
    settings = config.selector
    low, high = settings.range_of(config.sampler.num_steps)

    def adascope() -> AdaScope:
        return AdaScope(
            pooling=settings.pooling,
            kappa_s=settings.kappa,
            phi_e=settings.phi_end,
            persist=settings.persistence,
            rule=settings.rule,
            min_frac=settings.min_fraction,
            max_frac=settings.max_fraction,
            formed=settings.formed,
            literal_eps=settings.literal_epsilon,
            fallback=None if settings.fallback is None else (settings.fallback[0], settings.fallback[1]),
            memory_decay=settings.memory_decay,
            sensor=sensor or LatentSensor(),
            sense_every=config.sensing.sense_every,
            mask_source=settings.mask_source,
        )

    makers: dict[str, Callable[[], TimestepSelector]] = {
        "adascope": adascope,
        "complement": lambda: Complement(adascope()),
        "every_step": EveryStep,
        "random_fraction": lambda: RandomFraction(settings.fraction or 1.0, seed=config.run.seed),
        "static_range": lambda: StaticRange(low, high),
        "late_start": lambda: StaticRange(low, high),
        "threshold": lambda: Threshold(settings.uncertainty_low or 0.0, settings.uncertainty_high or math.inf),
        "window": lambda: Window(
            size=settings.window_size,
            period=settings.shift_every,
            shift=settings.window_shift,
            start=low,
            limit=high,
            order=settings.window_order,
            at_limit=settings.at_limit,
            seed=config.run.seed,
            decay=settings.shift_decay,
            min_period=settings.shift_every_min,
            decay_rate=settings.decay_rate,
            decay_from=settings.decay_from,
            ode_outside=settings.ode_outside,
        ),
        "fast_window": lambda: FastWindow(
            settings.window_size, low, high, seed=config.run.seed, ode_outside=settings.ode_outside
        ),
    }
    return makers[settings.name]()
