"""`adascope-fast push`: a finished run as a repository of the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import typer

from adascope_fast.commands.configuration import RunFolder
from adascope_fast.training.lock import refuse_existing
from adascope_fast.training.monitoring.progress import Progress, import_libraries


def push(
    run: RunFolder,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Only you, or your organisation, see it.")] = False,
    base: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="The base model, where the run has it from a local folder or file."),
    ] = None,
    dry_run: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write what would be uploaded there; upload nothing.")
    ] = None,
) -> None:
    """Publish a finished run on the Hugging Face Hub, with a model card."""
    from adascope_fast.training.hub import refusals

    refusals.refuse_name(repository)
    refusals.refuse_base(base)
    refusals.refuse_unfinished(run)
    if dry_run is None:
        refusals.token_of_login()
    else:
        refuse_existing(dry_run, "--dry-run")
    import_libraries()
    from adascope_fast.training import hub

    progress = Progress()
    if dry_run is None:
        print(hub.push(run, repository, base=base, private=private, progress=progress))
        return
    hub.write(run, dry_run, repository, base=base, progress=progress)
    print(dry_run)
