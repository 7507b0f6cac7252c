"""`adascope-fast train`: a training from its configuration, or the rest of one that was stopped."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adascope_fast.commands.configuration import configured
from adascope_fast.config import Config, ConfigError

if TYPE_CHECKING:
    from adascope_fast.training.trainer import Result

MAY_CHANGE_ON_RESUME = {"train.iterations", "train.device", "train.keep_checkpoints", "log.trackers", "run.folder"}


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.toml] [section.field=value]...", help="A configuration, then what to change."),
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue the run in this folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run folder.")] = False,
) -> None:
    """Train a model and write a report."""
    config = resumed(resume, arguments or []) if resume else configured(arguments, command="train")
    from adascope_fast.training.trainer import Trainer  # torch takes a second; a mistake in the config should not

    trainer = Trainer(config)
    try:
        result = trainer.resume() if resume else trainer.train(overwrite=overwrite)
    except KeyboardInterrupt:
        if not (Path(config.run.folder) / "config.toml").is_file():
            raise  # stopped before the run began: there is nothing to continue
        print(
            f"interrupted; the run continues from its newest checkpoint with: "
            f"adascope-fast train --resume {config.run.folder}",
            file=sys.stderr,
        )
        sys.exit(130)
    print(outcome(result, config))


def resumed(folder: Path, overrides: list[str]) -> Config:
    """The configuration of a started run, with what may change in its middle changed; written back if it did."""
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"--resume names the folder of a run (with config.toml), got {str(folder)!r}; check the path")
    from adascope_fast.training.run_folder import load_config

    before = load_config(folder)
    after = Config.load(folder / "config.toml", [*overrides, f"run.folder={folder}"])
    changed = differences(before.model_dump(), after.model_dump())
    if changed - MAY_CHANGE_ON_RESUME:
        raise ConfigError(
            f"a resumed run repeats the one left alone, so {', '.join(sorted(changed - MAY_CHANGE_ON_RESUME))} cannot "
            f"change; only {', '.join(sorted(MAY_CHANGE_ON_RESUME - {'run.folder'}))} can, or start a new run"
        )
    if changed:
        (folder / "config.toml").write_text(after.to_toml(), encoding="utf-8")
    return after


def differences(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    """`section.key` of what differs between two configurations; of a section with another choice, the choice alone."""
    found: set[str] = set()
    for section in new:
        one, other = old[section] or {}, new[section] or {}  # None where the selector senses nothing
        keys = {key for key in one | other if one.get(key) != other.get(key)}
        found |= {f"{section}.{key}" for key in keys & {"name", "kind"} or keys}
    return found


def outcome(result: "Result", config: Config) -> str:
    """What was gained, trained and spent, and where to read it."""
    before, after, gain = result.before, result.after, result.difference
    seconds = {name: round(value, 1) for name, value in result.seconds.items()}
    reach = f"95 % interval {gain['low']:+.3f} to {gain['high']:+.3f}"
    if math.isnan(gain["low"]):
        reach = "no interval from one prompt"
    parts = ", ".join(f"{name} {value:g}" for name, value in seconds.items() if name != "run")
    lines = [
        f"held-out {config.reward.name}: {before['mean']:.3f} -> {after['mean']:.3f} "
        f"({gain['mean']:+.3f}, {reach}, {after['num_images']} pictures)",
        f"steps trained: {result.fraction_trained:.0%} of the (picture, step) pairs",
        f"seconds: {parts}; with evaluation {seconds['run']:g} in all",
        f"report: {result.report}",
    ]
    return "\n".join(lines)
