"""`adascope-fast launch`: a training in several processes, by accelerate, with a configuration that is shipped here."""

import os
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import typer

from adascope_fast.commands.configuration import configured, refuse_no_run
from adascope_fast.config import ConfigError

PROGRAM = f"{__name__.partition('.')[0]}.cli"


def launch(
    context: typer.Context,
    name: str = typer.Argument(help="single, multi_gpu, multi_node, fsdp2, zero2, zero3, or a file of accelerate's."),
) -> None:
    """Start a training in several processes, such as: launch fsdp2 --num_processes 4 train CONFIG.toml ."""
    at = next((place for place, word in enumerate(context.args) if word == "train"), None)
    if at is None:
        raise ConfigError(
            f"launch starts a training, got {' '.join(context.args) or 'nothing'!r} after {name}; for example: "
            f"adascope-fast launch {name} --num_processes 2 train CONFIG.toml"
        )
    options, command, path = context.args[:at], context.args[at:], configuration(name)
    _refuse_configuration(command[1:])  # once, and not by each process among torchrun's lines
    program = ["accelerate.commands.launch", "--config_file", str(path), *options]
    if "--cpu" in options:  # accelerate starts one process there, whatever number is asked for
        program = ["torch.distributed.run", *_on_cpus(path, options)]
    os.execv(sys.executable, [sys.executable, "-m", *program, "--module", PROGRAM, *command])


def _refuse_configuration(arguments: list[str]) -> None:
    """What `train` refuses of its arguments before it imports torch."""
    if "--resume" in arguments:
        folder = "".join(arguments[arguments.index("--resume") + 1 :][:1])
        refuse_no_run(Path(folder))
    else:
        configured([word for word in arguments if not word.startswith("--")], command="train")


def _on_cpus(path: Path, options: list[str]) -> list[str]:
    """torchrun's options for processes on the CPUs of this machine; accelerate's variables are set in the environment.

    ConfigError for an option that has no meaning there.
    """
    from accelerate.commands.config.config_args import load_config_from_file

    given: Any = load_config_from_file(str(path))
    number, rest = str(given.num_processes), [option for option in options if option != "--cpu"]
    if rest[:1] == ["--num_processes"] and len(rest) > 1:
        number, rest = rest[1], rest[2:]
    if rest or not number.isdigit():
        raise ConfigError(
            f"launch with --cpu takes --num_processes and a number, got {' '.join(rest) or number!r}; remove it, or "
            f"use torchrun itself"
        )
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if sharing := getattr(given, "fsdp_config", None):
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ |= {name.upper(): str(value).lower() for name, value in sharing.items()}
    return ["--nproc-per-node", number]


def configuration(name: str) -> Path:
    """The file of accelerate's configuration; ConfigError where there is none of that name."""
    folder = Path(str(files("adascope_fast") / "assets" / "accelerate"))
    found = folder / f"{name}.yaml" if not name.endswith((".yaml", ".yml", ".json")) else Path(name)
    if not found.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(f"launch takes {known} or a file that `accelerate config` wrote, got {name!r}; name one")
    return found
