"""`adascope-fast pretrain`: how the models in `assets` were made, and can be made again."""

from pathlib import Path
from typing import Annotated

import typer

from adascope_fast.config import ConfigError
from adascope_fast.training.monitoring.progress import import_libraries


def pretrain(
    name: Annotated[str, typer.Argument(help="scenes, scenes-flow or scenes-clip")],
    out: Annotated[Path | None, typer.Option(help="Folder of the model; pretrain/NAME if absent.")] = None,
    work: Annotated[Path, typer.Option(help="Folder of the intermediate state; a stopped run resumes from it.")] = Path(
        "pretrain/work"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Make an embedded model from nothing: about an hour on one core; the CLIP takes a minute or two."""
    target = out or Path("pretrain") / name
    if name not in ("scenes", "scenes-flow", "scenes-clip"):
        raise ConfigError(f"pretrain makes 'scenes', 'scenes-flow' or 'scenes-clip', got {name!r}; choose one of them")
    if target.exists() and not overwrite:
        raise ConfigError(f"{str(target)!r} exists and is not replaced; give --overwrite, or another --out")
    import_libraries()
    from adascope_fast.pretraining import clip, denoisers

    if name == "scenes-clip":
        clip.pretrain(target, work)
    else:
        denoisers.pretrain(name, target, work)
    print(target)
