"""How a run is started from Python: what `Trainer` was given, as a configuration and what replaces parts of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adascope_fast.config import Config, ConfigError
from adascope_fast.config.named import named
from adascope_fast.config.sources import Override
from adascope_fast.prompts import Given


@dataclass(frozen=True)
class Start:
    """A configuration, and what is in place of what it names; None where nothing is."""

    config: Config
    reward: Any
    pipeline: Any
    train_prompts: Given | None
    held_out_prompts: Given | None


def start_of(
    first: Any,
    settings: Mapping[str, Any],
    *,
    reward: Any = None,
    pipeline: Any = None,
    prompts: Given | None = None,
    train_prompts: Given | None = None,
    held_out_prompts: Given | None = None,
) -> Start:
    """What `Trainer` starts from.

    Args:
        first: a `Config`, what `config.named` takes, or a loaded pipeline.
        settings: values by `section__key`.
        reward: a function, or what `reward.name` takes.
        prompts: to train on; without `held_out_prompts`, `prompts.held_out_share` of them is held out.

    Raises:
        ValueError: an argument is none of these, or two contradict each other.
    """
    overrides: list[Override] = [(_key(name), _plain(value)) for name, value in settings.items()]
    if isinstance(reward, str):
        overrides.insert(0, ("reward.name", reward))
        reward = None
    if isinstance(first, Config):
        config = first.changed(overrides) if overrides else first
    elif isinstance(first, str | Path):
        config = named(first, overrides)
    elif isinstance(getattr(first, "components", None), Mapping):
        if pipeline is not None:
            raise ValueError("a pipeline is given once, got a second one as pipeline=; leave one out")
        config, pipeline = Config.load(None, overrides), first
    else:
        raise ValueError(
            f"Trainer takes a Config, the name or path of a configuration or model, or a loaded diffusers pipeline, "
            f'got {type(first).__name__}; for example Trainer("scenes", reward="jpeg_compressibility")'
        )
    if prompts is not None:
        if train_prompts is not None:
            raise ValueError("prompts= and train_prompts= are both to train on, got both; leave one out")
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise ValueError(
                f"prompts is a list of texts, got {prompts!r:.60}; put it into a list, or name a file or set with "
                f"prompts__train= and prompts__held_out="
            )
        train_prompts = prompts
    return Start(config, reward, pipeline, train_prompts, held_out_prompts)


def _key(name: str) -> str:
    section, dunder, key = name.partition("__")
    if not dunder:
        raise ConfigError(
            f"Trainer takes a setting as section__key, such as train__iterations=5 for train.iterations, got {name}=; "
            f"name its section, or correct the argument"
        )
    return f"{section}.{key.replace('__', '.')}"


def _plain(value: Any) -> Any:
    """As TOML has it: paths are texts, tuples are lists."""
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
