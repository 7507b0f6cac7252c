"""What a configuration names, built: the algorithm and the selector."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from adascope_fast.adascope import AdaScope
from adascope_fast.algorithms import Algorithm, ddpo, grpo
from adascope_fast.attribution import Attribution
from adascope_fast.config import Config
from adascope_fast.timesteps import (
    Complement,
    EveryStep,
    FastWindow,
    RandomFraction,
    StaticRange,
    TimestepSelector,
    Window,
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


def selector_of(config: Config) -> TimestepSelector:
    """The selector that a configuration names."""
    settings, num_steps = config.selector, config.sampler.num_steps
    low, high = settings.start or 0, settings.end or num_steps

    def adascope() -> AdaScope:
        return AdaScope(
            pooling=settings.pooling,
            kappa_s=settings.kappa,
            phi_e=settings.phi_end,
            persist=settings.persistence,
            mask_source=settings.mask_source,
        )

    makers: dict[str, Callable[[], TimestepSelector]] = {
        "adascope": adascope,
        "complement": lambda: Complement(adascope()),
        "every_step": EveryStep,
        "random_fraction": lambda: RandomFraction(settings.fraction or 1.0, seed=config.run.seed),
        "static_range": lambda: StaticRange(low, high),
        "window": lambda: Window(size=settings.window_size, period=settings.shift_every, start=low, limit=high),
        "fast_window": lambda: FastWindow(settings.window_size, low, high, seed=config.run.seed),
    }
    return makers[settings.name]()
