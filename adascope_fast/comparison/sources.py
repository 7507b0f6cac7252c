"""What a source of an evaluation is called and where it lies: `[NAME=]SOURCE`. Nothing here imports torch."""

import re
from pathlib import Path

from adascope_fast.backbones.settings import refuse_misnamed

NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}")
"""What an arm may be called: it becomes a folder, and stands in tables."""
RULE = "a source is a run, a model, a LoRA or a folder of images"


def split(source: str) -> tuple[str, str]:
    """The name that a source is given, empty where it is given none, and its place."""
    name, separator, place = source.partition("=")
    return (name, place) if separator and NAME.fullmatch(name) else ("", source)


def refuse_nothing(source: str) -> None:
    """ValueError where a source is not there and cannot be a repository; the hub is not asked."""
    place = split(source)[1]
    path = Path(place)
    if path.exists():
        return
    if place.startswith((".", "/", "~", "runs/")) or (path.parent != Path() and path.parent.is_dir()):
        raise ValueError(f"{RULE}, got {place!r}, where there is nothing; check the path")
    try:
        refuse_misnamed(place)
    except ValueError as error:
        raise ValueError(f"{RULE}, got {place!r}: {' '.join(str(error).split())}") from None
