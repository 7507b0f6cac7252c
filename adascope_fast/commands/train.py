"""`adascope-fast train`: a training from its configuration, or the rest of one that was stopped."""

import math
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from adascope_fast.commands.configuration import configured
from adascope_fast.commands.signals import answered_by, interrupt
from adascope_fast.config import Config, ConfigError
from adascope_fast.reporting.files import is_run
from adascope_fast.training.lock import refuse_taken
from adascope_fast.training.monitoring.progress import import_libraries

if TYPE_CHECKING:
    from adascope_fast.training.trainer import Result


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [section.field=value]...",
            help="A .toml file, a preset or a model here, then what to change.",
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue the run in this folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run folder.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Resume with a reward, prompts or model that have changed.")
    ] = False,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Go on with the run if its folder holds one, else start it.")
    ] = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Resume a run of someone else's that imports code or sends a token.")
    ] = False,
) -> None:
    """Train a model and write a report."""
    arguments = arguments or []
    refuse_without_resume(resume, arguments, overwrite=overwrite, accept_changes=accept_changes, trust_code=trust_code)
    go_on = _goes_on(go_on, resume, overwrite=overwrite)
    config = resumed(resume, arguments, trust_code=trust_code) if resume else configured(arguments, command="train")
    if not resume and not go_on and "WORLD_SIZE" not in os.environ:  # of several processes the first one alone has it
        refuse_taken(Path(config.run.folder), overwrite=overwrite)
    import_libraries()  # they take seconds; a mistake in the configuration should not
    from adascope_fast.training.trainer import Stopped, Trainer

    begun: list[Trainer] = []

    def answer(number: int, frame: FrameType | None) -> None:
        """SIGTERM lets an iteration end whose beginning is in no checkpoint, the first time."""
        if number == signal.SIGTERM and begun and begun[0].stops_later():
            os.write(2, b"told to stop: the run ends after this iteration, with a checkpoint; again: at once\n")
            return
        interrupt(number, frame)

    try:
        with answered_by(answer):
            begun.append(trainer := Trainer(config))
            if trainer.is_asked(go_on):
                result = trainer.train_or_resume()
            else:
                result = trainer.resume(accept_changes=accept_changes) if resume else trainer.train(overwrite=overwrite)
    except KeyboardInterrupt as stopped:
        line = "interrupted"
        if (Path(config.run.folder) / "config.toml").is_file():  # else there is nothing to continue
            line += (
                f"; the run continues from its newest checkpoint with: adascope-fast train --resume {config.run.folder}"
            )
        if is_first_process():
            print(line, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM if isinstance(stopped, Stopped) else getattr(stopped, "code", 130))
    if is_first_process():
        print(outcome(result))


def _goes_on(is_asked: bool, resume: Path | None, *, overwrite: bool) -> bool:
    """Whether a run that is there is gone on with: where that is asked for, or torchrun starts its processes again."""
    if is_asked and (resume or overwrite):
        raise ConfigError(
            "--continue goes on with a run or starts it, got --resume or --overwrite besides; give one of them"
        )
    return is_asked or (int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and resume is None)


def is_first_process() -> bool:
    """Whether this process of a run tells what is to be told: rank 0, as torchrun and accelerate name it."""
    return os.environ.get("RANK", "0") == "0"


def refuse_without_resume(resume: Path | None, arguments: list[str], *, overwrite: bool, **flags: bool) -> None:
    """ConfigError for options that contradict each other."""
    if resume is None:
        for name, is_on in flags.items():
            if is_on:
                raise ConfigError(f"--{name.replace('_', '-')} is for --resume RUN, got it without; remove it")
        return
    if overwrite:
        raise ConfigError("--resume continues a run and --overwrite replaces it, got both; give one of them")
    if arguments and "=" not in arguments[0]:
        raise ConfigError(
            f"--resume takes the configuration from the run's folder, got {arguments[0]!r} besides; remove it, or "
            f"name what to change as section.field=value"
        )


def resumed(folder: Path, overrides: list[str], *, trust_code: bool) -> Config:
    """The configuration of a started run, with what may change in its middle changed."""
    if not is_run(folder):
        raise ConfigError(f"--resume names the folder of a run (with config.toml), got {str(folder)!r}; check the path")
    from adascope_fast.training import origin, trust
    from adascope_fast.training.run_folder import load_config, refuse_another

    before = load_config(folder)
    after = before.changed([*overrides, f"run.folder={folder}"])
    refuse_another(before, after)
    _, _, signature = origin.read(folder)
    python = "Trainer({config}, {arguments}).resume()"
    origin.refuse_given(folder, origin.ARGUMENTS, instead=python)
    named = {override.partition("=")[0].strip() for override in overrides}
    for line in trust.refuse_foreign(folder, before, signature, is_trusted=trust_code, named=named):
        print(f"importing {line}, as the run's configuration says", file=sys.stderr)
    return after


def outcome(result: "Result") -> str:
    """What was gained, trained and spent, and where to read it."""
    before, after, gain = result.before, result.after, result.difference
    seconds = {name: round(value, 1) for name, value in result.seconds.items()}
    reach = f"95 % interval {gain['low']:+.3f} to {gain['high']:+.3f}"
    if math.isnan(gain["low"]):
        reach = "no interval from one prompt"
    parts = ", ".join(f"{name} {value:g}" for name, value in seconds.items() if name != "run")
    lines = [
        f"held-out {result.reward}: {before['mean']:.3f} -> {after['mean']:.3f} "
        f"({gain['mean']:+.3f}, {reach}, {after['num_images']} images)",
        f"steps trained: {result.fraction_trained:.0%} of the (image, step) pairs",
        f"seconds: {parts}; with evaluation {seconds['run']:g} in all",
        f"report: {result.report}",
    ]
    held_out = before.get("num_not_finite", 0) + after.get("num_not_finite", 0)
    if held_out or result.samples_dropped or result.updates_skipped:
        lines.insert(
            2,
            f"not finite, and left out: {result.samples_dropped} images of the training, {held_out} of the "
            f"evaluations, {result.updates_skipped} updates",
        )
    return "\n".join(lines)
