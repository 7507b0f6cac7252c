"""`adascope-fast calibrate`: where AdaScope would train another model or reward, and which thresholds suit it."""

from pathlib import Path
from typing import Annotated

import typer

from adascope_fast.adascope.settings import PAPER, SATURATION
from adascope_fast.commands.configuration import ConfigArguments, configured
from adascope_fast.config import ConfigError
from adascope_fast.rewards.settings import asks_people
from adascope_fast.settings import MOST_IMAGES, MOST_STEPS
from adascope_fast.training.monitoring.progress import Progress, import_libraries


def calibrate(
    arguments: ConfigArguments = None,
    prompts: Annotated[int, typer.Option(min=1, max=MOST_IMAGES, help="Training prompts to look at.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/calibration"),
    start: Annotated[float, typer.Option(min=0.0, max=1.0, help="Aim of the mean start, as a share of T.")] = PAPER[0],
    end: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help=f"Aim of the mean end, as a share of T (the paper: {PAPER[1]}); else --saturation."
        ),
    ] = None,
    saturation: Annotated[
        float | None,
        typer.Option(help=f"The mean end: this share of the reward's gain is still to come; default: {SATURATION}."),
    ] = None,
    stride: Annotated[
        int, typer.Option(min=1, max=MOST_STEPS, help="States between two that are decoded for the reward.")
    ] = 1,
) -> None:
    """Sample without training, show where AdaScope would train, and propose thresholds."""
    config = configured(arguments, command="calibrate")
    if saturation is not None and (end is not None or not 0 < saturation < 1):
        raise ConfigError(
            f"--saturation is a share between 0 and 1 in place of --end, got {saturation:g} and --end "
            f"{'unset' if end is None else f'{end:g}'}; {SATURATION} is a start"
        )
    if start >= (1 if end is None else end):
        raise ConfigError(
            f"--start must be below --end, got {start:g} and {1 if end is None else end:g}; "
            f"the paper has {PAPER[0]} and {PAPER[1]}"
        )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out names a folder, and {str(out)!r} is a file; choose another place")
    if stride > config.sampler.num_steps:
        raise ConfigError(
            f"--stride must be at most the {config.sampler.num_steps} steps of a rollout, got {stride}; lower it"
        )
    if asks_people(config.reward):
        raise ConfigError(
            f'calibrate shows the reward unfinished images, got reward.name = "{config.reward.name}", which asks '
            f'people; name another that is like it, such as reward.name = "clip_similarity"'
        )
    import_libraries()
    from adascope_fast.planning.calibration import calibrate as calibration_of
    from adascope_fast.reporting import write_calibration

    calibration = calibration_of(
        config, num_prompts=prompts, start=start, end=end, saturation=saturation, stride=stride, progress=Progress()
    )
    page = write_calibration(calibration.values(), out)
    print(calibration.text())
    print(page)
