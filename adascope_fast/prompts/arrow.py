"""Prompts of Arrow tables: a .parquet file, or a data set that Hugging Face's `datasets` knows by a name or a folder.

A data set is `datasets:owner/name`, `datasets:owner/name/configuration` or `datasets:folder`, then `:split` (`train`
where it is left out; for one of the Hub also `train[:1000]`). It is downloaded once into Hugging Face's cache. Neither
package is imported before it is asked for; both are in the extra `data`. No code of a data set runs.

Metadata is what JSON can say: columns of images, bytes and times are left out.
"""

import logging
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adascope_fast.prompts.files import Record, column_among

PREFIX = "datasets:"
HUB = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")

logger = logging.getLogger(__name__)


def records_of_parquet(path: Path, column: str, *, with_metadata: bool) -> Iterator[Record]:
    """Row number, prompt and metadata of each row; rows without a prompt are left out, which a warning says.

    ValueError where it is no such table, or has not that column.
    """
    _refuse_absent("pyarrow", f"the prompts of {path}")
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        wanted = _wanted(file.schema_arrow, column_among(names, column, str(path)), with_metadata)
        table = file.read(columns=wanted)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} must be a Parquet file, got {_reason(error)}; write it again") from None
    return _rows(table, wanted[0], str(path))


def records_of_dataset(source: str, column: str, *, with_metadata: bool) -> Iterator[Record]:
    """The same of a data set, `source` with its prefix."""
    _refuse_absent("datasets", f"the prompts of {source}")
    data: Any = _opened(source)
    wanted = _wanted(data.features.arrow_schema, column_among(data.column_names, column, source), with_metadata)
    return _rows(data.select_columns(wanted).with_format("arrow")[:], wanted[0], source)


def _opened(source: str) -> Any:
    import datasets

    found: Any
    place, _, split = source.removeprefix(PREFIX).partition(":")
    folder = Path(place)
    is_saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    if not folder.is_dir() and not HUB.fullmatch(place):
        raise ValueError(
            f"a data set is datasets:owner/name, datasets:owner/name/configuration or datasets:folder, then :split, "
            f"got {source!r}; check the name"
        )
    try:
        if is_saved:
            found = datasets.load_from_disk(place)
        elif folder.is_dir():
            found = datasets.load_dataset(place, split=split or "train")
        else:
            owner, name, *configuration = place.split("/")
            found = datasets.load_dataset(f"{owner}/{name}", *configuration, split=split or "train")
    except Exception as error:  # of datasets, the Hub and what reads their files
        raise ValueError(
            f"the data set {source!r} could not be read: {_reason(error)}; check its name and split, and that there is "
            f"a network or a copy in Hugging Face's cache"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        names = [str(name) for name in found]
        chosen = split or ("train" if "train" in names or len(names) != 1 else names[0])
        if chosen not in names:
            raise ValueError(f"{source!r} has the splits {', '.join(names)}, got {chosen!r}; name one of them")
        return found[chosen]
    if is_saved and split:
        raise ValueError(f"{place} is one saved split, got {source!r}; leave out :{split}")
    return found


def _rows(table: Any, column: str, source: str) -> Iterator[Record]:
    empty = []
    for number, row in enumerate(table.to_pylist(), 1):
        text = row.pop(column)
        if text is None or (isinstance(text, str) and not text.strip()):
            empty.append(number)
        else:
            yield number, text, row
    if empty:
        logger.warning("%s has no prompt in %d rows, first row %d; they are left out", source, len(empty), empty[0])


def _wanted(schema: Any, column: str, with_metadata: bool) -> list[str]:
    """The columns to read, that of the prompts first."""
    if not with_metadata:
        return [column]
    return [column, *(field.name for field in schema if field.name != column and _is_plain(field.type))]


def _is_plain(kind: Any) -> bool:
    """Whether JSON can say every value of an Arrow type."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return types.is_null(kind) or any(test(kind) for test in tests)


def _refuse_absent(package: str, what: str) -> None:
    if find_spec(package) is None:
        raise ValueError(f"{what} need {package}, which is not installed; pip install 'adascope-fast[data]'")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
