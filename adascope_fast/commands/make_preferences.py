"""`adascope-fast make-preferences`: a set of preferences from a model and a reward, to be learned from."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adascope_fast.commands.configuration import ConfigArguments, configured
from adascope_fast.config import Config, ConfigError
from adascope_fast.preferences.folders import refuse_filled
from adascope_fast.settings import LARGEST_SEED, MOST_IMAGES
from adascope_fast.training.monitoring.progress import Progress, bar, import_libraries

if TYPE_CHECKING:
    from adascope_fast.preferences.making import Made


def make_preferences(
    arguments: ConfigArguments = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    pairs: Annotated[
        int, typer.Option(min=1, max=MOST_IMAGES, help="Pairs; or twice as many labelled pictures.")
    ] = 400,
    labelled: Annotated[
        bool, typer.Option("--labelled", help="Label each picture, above or below the mean of its prompt's.")
    ] = False,
    images_per_prompt: Annotated[int, typer.Option(min=2, max=1024, help="Pictures of a prompt to choose among.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the prompts' order and the noise.")] = 0,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Run whose trained weights draw the pictures; the model's own if absent."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a set that was made before.")] = False,
) -> None:
    """Draw pictures, judge them by the reward, and write them as preferences to train on."""
    config = configured(arguments, command="make-preferences")
    if out is None:
        raise ConfigError("make-preferences needs --out, a folder to write, got none; for example --out sets/first")
    refuse_filled(out, overwrite=overwrite)
    import_libraries()
    made = _made(config, out, pairs, images_per_prompt, seed, adapter, is_labelled=labelled, overwrite=overwrite)
    what = f"{made.num_images} labelled pictures" if labelled else f"{made.num_pairs} pairs"
    print(
        f"{what} of {made.num_drawn} pictures, {config.reward.name} {made.score:.3f} on average; "
        f"{'liked above disliked' if labelled else 'chosen above rejected'} by {made.margin:.3f}; "
        f"{made.num_ties} prompts left out, whose pictures were all alike to the reward"
    )
    print(
        f'train on it with algorithm.name = "{"diffusion_kto" if labelled else "diffusion_dpo"}" and '
        f'algorithm.preferences = "{out}"'
    )
    print(out)


def _made(
    config: Config,
    out: Path,
    pairs: int,
    images_per_prompt: int,
    seed: int,
    adapter: Path | None,
    *,
    is_labelled: bool,
    overwrite: bool,
) -> "Made":
    from adascope_fast import backbones, prompts, rewards
    from adascope_fast.engine.acceleration import autocast_of
    from adascope_fast.preferences import making
    from adascope_fast.training.building import accelerator_of
    from adascope_fast.training.draw import load_run

    reward, sampler = rewards.load(config.reward), config.sampler
    names, _ = prompts.chosen(config.prompts)
    if rewards.takes_metadata(reward):
        rewards.hand_metadata(reward, prompts.metadata(config.prompts))
    rewards.check_prompts(reward, names, "prompts.train")
    accelerator = accelerator_of(config)
    if adapter is None:
        with Progress().loading(config.model.name) as told:
            backbone = backbones.load(config.model.name, **config.model.options(), told=told)
    else:
        with Progress().loading(str(adapter)) as told:
            run, backbone = load_run(adapter, told=told)
        if run.model.name != config.model.name:
            raise ConfigError(
                f"--adapter is a run of the configuration's model, got one of {run.model.name!r} for "
                f"{config.model.name!r}; set model.name to that"
            )
    backbone.to(accelerator.device)
    autocast = autocast_of(config.train.mixed_precision, accelerator.device.type)
    schedule = backbone.schedule(sampler.num_steps, **sampler.table)
    about = {
        "model": config.model.name,
        "adapter": None if adapter is None else str(adapter),
        "reward": config.reward.model_dump(exclude_none=True),
        "prompts": config.prompts.train,
        "sampler": sampler.model_dump(exclude_none=True),
        "images_per_prompt": images_per_prompt,
        "seed": seed,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("adascope-fast", "torch", "diffusers")},
    }
    with bar("preferences", pairs, unit="pair", stays=True) as shown, autocast():

        def on_pairs(count: int) -> None:
            shown.update(count - shown.n)

        return making.make(
            backbone,
            schedule,
            lambda images, texts: rewards.score(reward, images, texts),
            names,
            out,
            num_pairs=pairs,
            images_per_prompt=images_per_prompt,
            is_labelled=is_labelled,
            guidance_scale=sampler.guidance_scale,
            seed=seed,
            batch=config.train.rollout_batch,
            overwrite=overwrite,
            about=about,
            on_pairs=on_pairs,
        )
