"""`adascope-fast train-preference-model`: what scores SPO's candidates without a forward of the denoiser."""

from pathlib import Path
from typing import Annotated

import typer

from adascope_fast.commands.configuration import ConfigArguments, configured
from adascope_fast.config import ConfigError
from adascope_fast.settings import MOST_IMAGES
from adascope_fast.training.monitoring.progress import Progress, import_libraries


def train_preference_model(
    arguments: ConfigArguments = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/preference_model"),
    prompts: Annotated[int, typer.Option(min=1, max=MOST_IMAGES, help="Training prompts to draw images of.")] = 128,
    samples: Annotated[int, typer.Option(min=2, max=1024, help="Images of each prompt.")] = 8,
    steps: Annotated[int, typer.Option(min=1, max=MOST_IMAGES, help="Batches of 64 pairs.")] = 500,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Train a step-aware preference model on images of the model that the reward ranks, and tell how well it ranks."""
    config = configured(arguments, command="train-preference-model")
    if out.exists() and not (overwrite and out.is_dir()):
        raise ConfigError(f"{str(out)!r} exists and is not replaced; give --overwrite, or another --out")
    import_libraries()
    from adascope_fast.preferences.model import is_made_here
    from adascope_fast.pretraining.preference_model import make

    if out.exists() and any(out.iterdir()) and not is_made_here(out):
        raise ConfigError(f"--overwrite replaces a preference model, and {str(out)!r} is none; choose another --out")
    made = make(config, num_prompts=prompts, num_samples=samples, num_steps=steps, progress=Progress())
    made.model.save(out)
    print(made.text())
    print(out)
