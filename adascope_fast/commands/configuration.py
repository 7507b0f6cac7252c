"""The first arguments of the commands: a configuration and what to change in it, or the folder of a run."""

from pathlib import Path
from typing import Annotated

import typer

from adascope_fast.config import Config, ConfigError

ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="CONFIG.toml [section.field=value]...", help="A configuration, then what to change."),
]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.")]


def configured(arguments: list[str] | None, *, command: str) -> Config:
    """The configuration that a command's arguments name, changed as they say."""
    if not arguments or "=" in arguments[0]:
        raise ConfigError(
            f"{command} needs a configuration file first, got "
            + (repr(arguments[0]) if arguments else "nothing")
            + f"; for example: adascope-fast {command} configs/quickstart.toml train.iterations=5"
        )
    return Config.load(Path(arguments[0]), arguments[1:])
