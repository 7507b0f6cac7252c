"""`adascope-fast config`: every section of the configuration, its keys, their defaults and meanings."""

from typing import Annotated

import typer


def config(
    name: Annotated[
        str | None, typer.Argument(help="A section (sampler) or a choice of one (grpo, window); all if absent.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a page for documentation.")] = False,
) -> None:
    """Show what can be configured, with defaults and meanings."""
    from adascope_fast.config import reference

    shown = reference.entries() if name is None else reference.find(name)
    print(reference.markdown(shown) if markdown else reference.text(shown))
