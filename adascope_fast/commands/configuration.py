"""The first arguments of the commands: a configuration and what to change in it, or the folder of a run.

What can be refused of them without torch is refused before it is imported.
"""

from pathlib import Path
from typing import Annotated

import typer

from adascope_fast import prompts
from adascope_fast.algorithms.settings import DiffusionDpo, DiffusionKto, Spo
from adascope_fast.backbones.settings import EMBEDDED_NAMES
from adascope_fast.config import Config, ConfigError
from adascope_fast.config.named import named
from adascope_fast.preferences.folders import folder_of, refuse_no_model
from adascope_fast.prompts import scenes
from adascope_fast.reporting.files import is_run, no_run
from adascope_fast.rewards.settings import SceneAttributes

SAMPLES = ("train", "calibrate", "make-preferences", "train-preference-model")
"""The commands that read the prompts."""

ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG [section.field=value]...", help="A .toml file, a preset or a model here, then what to change."
    ),
]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.")]


def configured(arguments: list[str] | None, *, command: str) -> Config:
    """The configuration that a command's arguments name, changed as they say."""
    if not arguments or "=" in arguments[0]:
        raise ConfigError(
            f"{command} needs a configuration file first, got "
            + (repr(arguments[0]) if arguments else "nothing")
            + f"; for example: adascope-fast {command} quickstart train.iterations=5"
        )
    config = _named(arguments[0], arguments[1:])
    if command in SAMPLES:
        _refuse_prompts(config)
        if command == "train":  # the others may make what it names
            _refuse_judged(config)
        config.examine()
    else:
        config.model.examine()
    return config


def _named(name: str, overrides: list[str]) -> Config:
    """As `Trainer` takes a name, but that what is no model of this machine is taken for a configuration's."""
    path = Path(name)
    is_model = name in EMBEDDED_NAMES or (path / "model_index.json").is_file() or path.suffix == ".safetensors"
    return named(name, overrides) if is_model else Config.load(name, overrides)


def refuse_no_run(folder: Path) -> None:
    """ConfigError unless a folder holds a run."""
    if not is_run(folder):
        raise ConfigError(no_run(folder))


def _refuse_prompts(config: Config) -> None:
    """ValueError where a training's prompts are not to be had or cannot be meant; torch is not imported for it."""
    if config.prompts.train is None:
        raise ConfigError(
            f"prompts.train must be named where model.name is none of {', '.join(EMBEDDED_NAMES)}, got model.name = "
            f'"{config.model.name}" without prompts; set it to a file with a prompt a line, or prompts.train = '
            f'"animals:train"'
        )
    found = dict(zip(("prompts.train", "prompts.held_out"), prompts.named(config.prompts), strict=True))
    if isinstance(config.reward, SceneAttributes):
        for key, texts in found.items():
            scenes.refuse_others(texts, key)


def _refuse_judged(config: Config) -> None:
    """ValueError where what an algorithm learns preferences from is not there."""
    algorithm = config.algorithm
    if isinstance(algorithm, DiffusionDpo | DiffusionKto):
        folder_of(algorithm.preferences)
    if isinstance(algorithm, Spo) and algorithm.preference_model != "reward":
        refuse_no_model(Path(algorithm.preference_model))
