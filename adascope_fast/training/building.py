"""What a configuration names, built: device and optimiser, the sensor and the selector."""

from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn

from adascope_fast import backbones, rewards
from adascope_fast.adascope.decoders import LinearDecoder, TinyDecoder
from adascope_fast.adascope.sensing import DecodedSensor, LatentSensor, Sensor
from adascope_fast.adascope.settings import Semantic
from adascope_fast.algorithms.algorithm import Algorithm
from adascope_fast.backbone import Backbone
from adascope_fast.backbones.settings import EMBEDDED_NAMES
from adascope_fast.config import Config, ConfigError
from adascope_fast.distributed import rendezvous
from adascope_fast.engine.acceleration import accelerate, autocast_of
from adascope_fast.engine.optimizer import Rate, adamw_8bit, rate_of
from adascope_fast.remote_rollout.drawing import Drawing
from adascope_fast.rewards import ClipSimilarity, Reward
from adascope_fast.selectors.protocol import TimestepSelector
from adascope_fast.training import origin
from adascope_fast.training.sharing import refuse_other_engines


def accelerator_of(config: Config) -> Accelerator:
    """The device and precision that a configuration names; ValueError if it, or a tracker, is not there."""
    refuse_other_engines()
    train = config.train
    if train.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('train.device = "cuda" needs a CUDA GPU, and torch sees none; use "auto" or "cpu"')
    if train.device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError('train.device = "mps" needs an Apple GPU, and torch sees none; use "auto" or "cpu"')
    config.log.examine()
    train.examine()
    return Accelerator(
        cpu=train.device == "cpu",
        # Of fp16 the autocast alone is wanted, and accelerate's wants a GPU and to scale gradients its own way.
        mixed_precision="no" if train.mixed_precision == "fp16" else train.mixed_precision,
        kwargs_handlers=[InitProcessGroupKwargs(init_method=rendezvous.METHOD)],
    )


def optimizer_of(config: Config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with a configuration's settings; ValueError where bitsandbytes' cannot be had on their device."""
    train = config.train
    settings: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "weight_decay": train.weight_decay,
        "eps": train.adam_epsilon,
    }
    if train.optimizer == "adamw_8bit":
        return adamw_8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=config.acceleration.is_fused, **settings)


def suited(config: Config, device: torch.device) -> Config:
    """The configuration without a fused optimiser where there is none, and that was left to choose.

    Raises:
        ConfigError: it was asked for by name.
    """
    why = ""
    if config.train.optimizer == "adamw_8bit":
        why = 'train.optimizer = "adamw_8bit" has kernels of its own'
    elif device.type == "mps":
        why = "on mps it has not been seen to skip an update that is not finite"
    if not why:
        return config
    if config.acceleration.fused_optimizer == "on":
        raise ConfigError(
            f'acceleration.fused_optimizer is for AdamW of torch on CPUs and CUDA GPUs, got "on", and {why}; set it to '
            f'"auto"'
        )
    return config.model_copy(update={"acceleration": config.acceleration.model_copy(update={"fused_optimizer": "off"})})


def rates_of(config: Config) -> Rate:
    """The learning rate of each update of a configuration's run."""
    train = config.train
    return rate_of(
        train.learning_rate,
        train.lr_schedule,
        warmup_updates=train.warmup_updates,
        num_updates=train.total_updates,
        num_cycles=train.lr_cycles,
    )


def drawing_of(config: Config) -> tuple[Drawing, str]:
    """What draws rollouts of a configuration's model elsewhere, as its training would, and the digest of that model."""
    accelerator = accelerator_of(config)
    backbone = backbones.load(config.model.name, **config.model.options())
    dtype = getattr(torch, config.model.dtype)
    pipeline = origin.of_pipeline(backbone.pipeline.components, backbone.name, dtype, is_given=False)
    digest = origin.of_model(backbone, pipeline)
    backbone.to(accelerator.device)
    accelerate(backbone.denoiser, config.acceleration, accelerator.device, decoder=backbone.vae)
    drawing = Drawing(
        backbone,
        folds_adapter=config.acceleration.folds,
        autocast=autocast_of(config.train.mixed_precision, accelerator.device.type),
    )
    return drawing, digest


def sensor_of(config: Config, backbone: Backbone, reward: Reward) -> LatentSensor | DecodedSensor:
    """The sensor that a configuration names, for the reward in training."""
    sensing = config.sensing
    if sensing is None or sensing.kind == "latent":
        return LatentSensor() if sensing is None else LatentSensor(sensing.every)
    decode = backbone.decode
    if sensing.decoder == "tiny":
        decode = TinyDecoder(sensing.tiny or "")
    elif sensing.decoder == "linear":
        decode = LinearDecoder(backbone.decode)
    return DecodedSensor(
        decode,
        lambda images, texts: rewards.score_guesses(reward, images, texts),
        ClipSimilarity.load(clip_of(sensing, backbone.name)) if isinstance(sensing, Semantic) else None,
        stride=sensing.stride,
        num_samples=sensing.num_samples,
        every=sensing.every,
    )


def clip_of(sensing: Semantic, model: str) -> str:
    """The CLIP of semantic sensing; ConfigError if none is named and none is shipped for `model`."""
    if sensing.clip is not None:
        return sensing.clip
    if model not in EMBEDDED_NAMES:
        raise ConfigError(
            f"sensing.kind = semantic needs a CLIP that knows the images of {model!r}, got none; set sensing.clip to "
            'a folder or repository, for example "openai/clip-vit-large-patch14"'
        )
    return "scenes-clip"


def algorithm_of(config: Config) -> Algorithm:
    """The algorithm that a configuration names; ValueError where one of your own is none."""
    section: Any = config.algorithm
    algorithm = section.build()
    if getattr(section, "critic_features", None) == "images":
        algorithm.encode = ClipSimilarity.load(section.critic_clip).embed_images
    refuse_other(algorithm, repr(config.algorithm.name))
    return algorithm


def refuse_other(algorithm: Any, name: str) -> None:
    """ValueError unless `algorithm` is one."""
    if not isinstance(algorithm, Algorithm):
        raise ValueError(
            f"algorithm {name} must be an instance of adascope_fast.Algorithm, got {type(algorithm).__name__}; "
            f"docs/extend has a complete one to start from"
        )


def selector_of(config: Config, sensor: Sensor) -> TimestepSelector:
    """The selector that a configuration names; ValueError where one of your own lacks what a selector has."""
    selector: Any = config.selector.build(seed=config.run.seed, sensor=sensor)
    return complete(selector, TimestepSelector, "selector", repr(config.selector.name))


def complete(made: Any, protocol: type, what: str, name: str) -> Any:
    """`made` as it is; ValueError where it lacks a method of the protocol."""
    wanted = [method for method in vars(protocol) if not method.startswith("_") or method == "__call__"]
    missing = [method for method in wanted if not hasattr(made, method)]
    if isinstance(made, type) or missing:
        lacks = "an instance, not a class" if isinstance(made, type) else f"the methods {', '.join(missing)}"
        raise ValueError(f"{what} {name} lacks {lacks}; docs/extend has a complete one to start from")
    return made
