"""`adascope-fast import-weights`: published weights, into a folder that rewards and metrics read."""

from pathlib import Path
from typing import Annotated

import typer

from adascope_fast.config import ConfigError
from adascope_fast.weights import KINDS, convert


def import_weights(
    kind: Annotated[str, typer.Argument(help=f"What they are: {', '.join(KINDS)}.", metavar="KIND")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="The published file of weights, and the tokenizer's where one is needed.", metavar="FILE..."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; weights/KIND if absent.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that was written before.")] = False,
) -> None:
    """Convert published weights to safetensors, without running any code that is in them."""
    if kind in KINDS and not files:
        _, what, published = KINDS[kind]
        raise ConfigError(f"import-weights {kind} takes {what}, got none; download it from {published}")
    print(convert(kind, files or [], out or Path("weights") / kind, overwrite=overwrite))
