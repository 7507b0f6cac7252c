"""`adascope-fast init`: a preset as a file of one's own, to be changed."""

from typing import Annotated

import typer


def init(
    name: Annotated[
        str | None, typer.Argument(metavar="[PRESET]", help="Such as sd15 or sd15-40gb; all are listed if absent.")
    ] = None,
) -> None:
    """Print a preset with its comments: adascope-fast init sd15 > mine.toml."""
    from adascope_fast.config import presets

    if name is not None:
        print(presets.text(name), end="")
        return
    for base in presets.bases():
        print(f"{base:16} {presets.title(base)}")
        if larger := [other for other in presets.names() if other.startswith(f"{base}-")]:
            print(f"{'':16} {', '.join(larger)}")
