"""`adascope-fast merge`: out of this project, into plain diffusers."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from adascope_fast.commands.configuration import RunFolder, refuse_no_run
from adascope_fast.training.lock import refuse_existing
from adascope_fast.training.monitoring.progress import Progress, import_libraries


class DType(StrEnum):
    """Types that weights are stored in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def merge(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    dtype: Annotated[DType | None, typer.Option(help="Type of the weights; the run's model.dtype if absent.")] = None,
) -> None:
    """Write the trained model as a whole pipeline for plain diffusers."""
    refuse_no_run(run)
    refuse_existing(out, "merge")
    import_libraries()
    from adascope_fast.training.export import merge as write_merged

    write_merged(run, out, dtype=dtype.value if dtype else None, progress=Progress())
    print(out)
