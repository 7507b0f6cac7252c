"""Prompt files as people have them: text with a prompt a line, JSON lines, and tables with a column of prompts.

What a line of JSON or of a table has besides is the prompt's metadata. Arrow's tables are `arrow`'s.

A line ends at CR LF, LF or CR and nowhere else: Python's `splitlines` would also cut a prompt at U+2028, U+0085 and six
more characters. Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MOST_BYTES = 2**28
COLUMN = "prompt"
"""What the column of the prompts is called where nothing else is said."""
TABLES = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
NO_TEXT = {
    ending: step
    for endings, step in {
        ".json .yaml .yml .toml .xml .html": "write a prompt a line, or a .jsonl",
        ".arrow .feather .xlsx .xls .ods": "export it as .csv or .parquet with a column prompt",
        ".pt .pth .ckpt .pkl .pickle .npy .npz .safetensors": "write a prompt a line",
        ".doc .docx .odt .rtf .pdf": "save it as plain text",
        ".zip .gz .bz2 .xz .zst .tar .tgz .7z": "unpack it",
        ".png .jpg .jpeg .webp .gif .bmp .tif .tiff": "name the file of its captions",
    }.items()
    for ending in endings.split()
}
"""Endings of files that are no list of prompts, with what to do about it."""
_MARKS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LINE_END = re.compile("\r\n|\n|\r")


Record = tuple[int, str, dict[str, Any]]
"""Line number, text and metadata of a prompt."""


def records_of(path: Path, column: str = COLUMN) -> Iterator[Record]:
    """Each prompt in a file, as it stands there; blank lines are left out.

    ValueError where the file is no list of prompts, or a line has none.
    """
    kind = path.suffix.lower()
    if kind in NO_TEXT:
        raise ValueError(
            f"a prompt file is text with a prompt a line, .jsonl, .csv, .tsv or .parquet, got {str(path)!r}, a {kind} "
            f"file; {NO_TEXT[kind]}"
        )
    text = _text(path)
    if kind in TABLES:
        return _of_table(text, path, TABLES[kind], column)
    lines = ((number, line) for number, line in enumerate(_LINE_END.split(text), 1) if line.strip(" \t"))
    return _of_json(lines, path, column) if kind in JSON_LINES else ((number, line, {}) for number, line in lines)


def column_among(names: Sequence[str], column: str, where: str) -> str:
    """The one of `names` that is meant by `column`, whatever its case where no other is; ValueError if it is none."""
    alike = [name for name in names if name == column] or [name for name in names if name.lower() == column.lower()]
    if len(alike) != 1:
        step = "rename all but one" if alike else "set prompts.column to that of the prompts"
        shown = ", ".join(names) if len(names) <= 20 else ", ".join(names[:20]) + ", ..."
        raise ValueError(f"{where} must have one column {column}, it has {shown[:300]}; {step}")
    return alike[0]


def _text(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"a prompt file has at most {MOST_BYTES} bytes, got {path} with {size}; split it")
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} must be readable, got {error.strerror}; check its permissions") from None
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding.startswith("utf-8"):
            line = len(_LINE_END.split(content[: error.start].decode("utf-8", "replace")))
            place = f"line {line} of {path} has the byte 0x{content[error.start]:02x}, which is none"
        else:
            place = f"{path} begins as {encoding} and has a byte at {error.start} that is none ({error.reason})"
        raise ValueError(f"prompt files are UTF-8 text, {place}; save it as UTF-8") from None


def _of_json(lines: Iterator[tuple[int, str]], path: Path, column: str) -> Iterator[Record]:
    for number, line in lines:
        step = f'write a text or an object with "{column}" a line'
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = "nested too deep" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
            raise ValueError(f"line {number} of {path} must be JSON, got {line[:60]!r} ({why}); {step}") from None
        prompt = value.get(column) if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            if isinstance(value, dict) and column not in value and value:
                step = f"set prompts.column to that of the prompts: {', '.join(value)[:200]}"
            raise ValueError(f"line {number} of {path} must hold a prompt, got {line[:60]!r}; {step}")
        yield number, prompt, _besides(value, column) if isinstance(value, dict) else {}


def _besides(record: dict[str, Any], column: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != column}


def _of_table(text: str, path: Path, delimiter: str, column: str) -> Iterator[Record]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    place: int | None = None
    header: list[str] = []
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if place is None:
                header = [cell.strip() for cell in row]
                place = header.index(column_among(header, column, str(path)))
            elif place >= len(row):
                raise ValueError(
                    f"line {rows.line_num} of {path} must have a prompt, got {delimiter.join(row)[:60]!r}; add it, or "
                    f"remove the line"
                )
            else:
                other = {name: cell for name, cell in zip(header, row, strict=False) if name and cell}
                yield rows.line_num, row[place], _besides(other, header[place])
    except csv.Error as error:
        raise ValueError(
            f"line {rows.line_num} of {path} must be a table's row, got {error}; quote texts with a comma, a quote or "
            f"a line's end"
        ) from None
