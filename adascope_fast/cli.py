"""The command line: `adascope-fast train | sample | merge | plan | calibrate | pretrain | report | explain`.

A user's mistake is one line on standard error and exit code 2; ADASCOPE_FAST_DEBUG=1 shows where it was raised.
"""

import math
import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adascope_fast.config import Config, ConfigError
from adascope_fast.installation import refuse_broken_torchvision

if TYPE_CHECKING:
    from adascope_fast.train import Result

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="RL fine-tuning of diffusion and flow image models that trains only the denoising steps where it pays.",
)


class DType(StrEnum):
    """Types that weights are stored in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


MAY_CHANGE_ON_RESUME = {"train.iterations", "train.device", "train.keep_checkpoints", "log.trackers", "run.folder"}


def main() -> None:
    """Entry point of the `adascope-fast` command."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        try:
            app()
        except (ImportError, RuntimeError):
            refuse_broken_torchvision()
            raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("ADASCOPE_FAST_DEBUG") == "1":
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


@app.command()
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.toml] [section.field=value]...", help="A configuration, then what to change."),
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue the run in this folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run folder.")] = False,
) -> None:
    """Train a model and write a report."""
    config = _resumed(resume, arguments or []) if resume else _configured(arguments or [])
    from adascope_fast.train import Trainer  # torch takes a second; a mistake in the config should not

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
    _print(result, config)


def _configured(arguments: list[str], command: str = "train") -> Config:
    is_file = bool(arguments) and "=" not in arguments[0]
    if not is_file:
        raise ConfigError(
            f"{command} needs a configuration file first, got "
            + (repr(arguments[0]) if arguments else "nothing")
            + f"; for example: adascope-fast {command} configs/quickstart.toml train.iterations=5"
        )
    return Config.load(Path(arguments[0]), arguments[1:])


def _resumed(folder: Path, overrides: list[str]) -> Config:
    """The configuration of a started run, with what may change in its middle changed; written back if it did."""
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"--resume names the folder of a run (with config.toml), got {str(folder)!r}; check the path")
    before = Config.load(folder / "config.toml")
    after = Config.load(folder / "config.toml", [*overrides, f"run.folder={folder}"])
    old, new = before.model_dump(), after.model_dump()
    changed = {f"{part}.{key}" for part, values in new.items() for key in values if values[key] != old[part][key]}
    if changed - MAY_CHANGE_ON_RESUME:
        raise ConfigError(
            f"a resumed run repeats the one left alone, so {', '.join(sorted(changed - MAY_CHANGE_ON_RESUME))} cannot "
            f"change; only {', '.join(sorted(MAY_CHANGE_ON_RESUME - {'run.folder'}))} can, or start a new run"
        )
    if changed:
        (folder / "config.toml").write_text(after.to_toml(), encoding="utf-8")
    return after


def _print(result: "Result", config: Config) -> None:
    before, after, gain = result.before, result.after, result.difference
    seconds = {name: round(value, 1) for name, value in result.seconds.items()}
    reach = f"95 % interval {gain['low']:+.3f} to {gain['high']:+.3f}"
    if math.isnan(gain["low"]):
        reach = "no interval from one prompt"
    shown = ", ".join(f"{name} {value:g}" for name, value in seconds.items() if name != "run")
    print(
        f"held-out {config.reward.name}: {before['mean']:.3f} -> {after['mean']:.3f} "
        f"({gain['mean']:+.3f}, {reach}, {after['num_images']} pictures)"
    )
    print(f"steps trained: {result.fraction_trained:.0%} of the (picture, step) pairs")
    print(f"seconds: {shown}; with evaluation {seconds['run']:g} in all")
    print(f"report: {result.report}")


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; may be repeated.")] = None,
    num: Annotated[int, typer.Option(min=1, max=64, help="Pictures for each prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture; the next ones count up.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; those of the run if absent.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, help="Guidance scale; that of the run if absent.")] = None,
    out: Annotated[Path | None, typer.Option(help="PNG to write; RUN/samples/sample.png if absent.")] = None,
) -> None:
    """Draw pictures with the trained weights next to the base model's, on the same seeds."""
    if not prompt:
        raise ConfigError("sample needs at least one --prompt, got none; for example --prompt 'a small red circle'")
    from adascope_fast import prompts as prompt_rules

    texts = [prompt_rules.checked(text, "--prompt") for text in prompt]
    import torch

    from adascope_fast.reporting.images import contact_sheet
    from adascope_fast.sampling import draw, load_run

    config, backbone = load_run(run, keep_reference=True)
    seeds = range(seed, seed + num)
    num_steps = steps or config.sampler.num_steps
    scale = config.sampler.guidance_scale if guidance is None else guidance
    trained = draw(backbone, texts, seeds, num_steps=num_steps, guidance_scale=scale)
    with backbone.reference_policy():
        base = draw(backbone, texts, seeds, num_steps=num_steps, guidance_scale=scale)
    rows, captions = [], []
    for number, text in enumerate(texts):
        chosen = slice(number * num, (number + 1) * num)
        rows += [base[chosen], trained[chosen]]
        captions += [f"base, seed {one}: {text}" for one in seeds] + [f"trained, seed {one}: {text}" for one in seeds]
    path = out or run / "samples" / "sample.png"
    contact_sheet(torch.cat(rows), captions, num, path)
    print(path)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    dtype: Annotated[DType | None, typer.Option(help="Type of the weights; the run's model.dtype if absent.")] = None,
) -> None:
    """Write the trained model as a whole pipeline for plain diffusers."""
    from adascope_fast.export import merge as write_merged

    write_merged(run, out, dtype=dtype.value if dtype else None)
    print(out)


@app.command()
def pretrain(
    name: Annotated[str, typer.Argument(help="scenes, scenes-flow or scenes-clip")],
    out: Annotated[Path | None, typer.Option(help="Folder of the model; pretrain/NAME if absent.")] = None,
    work: Annotated[Path, typer.Option(help="Folder of the intermediate state; a stopped run resumes from it.")] = Path(
        "pretrain/work"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Make an embedded model from nothing: about an hour on two cores; the CLIP takes a minute or two."""
    target = out or Path("pretrain") / name
    if name not in ("scenes", "scenes-flow", "scenes-clip"):
        raise ConfigError(f"pretrain makes 'scenes', 'scenes-flow' or 'scenes-clip', got {name!r}; choose one of them")
    if target.exists() and not overwrite:
        raise ConfigError(f"{str(target)!r} exists and is not replaced; give --overwrite, or another --out")
    from adascope_fast.pretraining import clip, denoisers

    if name == "scenes-clip":
        clip.pretrain(target, work)
    else:
        denoisers.pretrain(name, target, work)
    print(target)


@app.command()
def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG.toml [section.field=value]...", help="A configuration, then what to change."),
    ] = None,
    tflops: Annotated[float | None, typer.Option(min=0.001, help="TFLOP/s your GPU sustains, for seconds.")] = None,
    measure: Annotated[bool, typer.Option(help="With a GPU: a step of random weights beside the plan.")] = True,
) -> None:
    """Say what a training would cost: parameters, operations, memory. No weights are read."""
    config = _configured(arguments or [], "plan")
    from adascope_fast.plan import plan as plan_of
    from adascope_fast.plan_check import checked

    result = plan_of(config)
    print(result.table(tflops))
    if measure:
        print(checked(config, result))


@app.command()
def calibrate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG.toml [section.field=value]...", help="A configuration, then what to change."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Training prompts to look at.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/calibration"),
    start: Annotated[float, typer.Option(min=0.0, max=1.0, help="Aim of the mean start, as a share of T.")] = 0.106,
    end: Annotated[float, typer.Option(min=0.0, max=1.0, help="Aim of the mean end, as a share of T.")] = 0.636,
    stride: Annotated[int, typer.Option(min=1, help="States between two that are decoded for the reward.")] = 1,
) -> None:
    """Sample without training, show where AdaScope would train, and propose thresholds."""
    config = _configured(arguments or [], "calibrate")
    if start >= end:
        raise ConfigError(f"--start must be below --end, got {start:g} and {end:g}; the paper has 0.106 and 0.636")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out names a folder, and {str(out)!r} is a file; choose another place")
    from adascope_fast.calibration import calibrate as look
    from adascope_fast.reporting import write_calibration

    found = look(config, num_prompts=prompts, target=(start, end), stride=stride)
    page = write_calibration(found.values(), out)
    print(found.text())
    print(page)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Write a run's report.html again."""
    if not (run / "config.toml").is_file():
        raise ConfigError(f"a run's folder holds a config.toml, {str(run)!r} does not; check the path")
    from adascope_fast.reporting import write_report

    print(write_report(run))


@app.command()
def explain() -> None:
    """Say which implementation serves each operation here, and why."""
    from adascope_fast import ops

    for name, reason in ops.explain().items():
        print(f"{name:30} {reason}")


if __name__ == "__main__":
    main()
