"""Prompt files as people have them: text with a prompt a line, JSON lines, and tables with a column `prompt`.

What a line of JSON or of a table has besides is the prompt's metadata.

A line ends at CR LF, LF or CR and nowhere else: Python's `splitlines` would also cut a prompt at U+2028, U+0085 and six
more characters. Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_BYTES = 2**28
TABLES = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
NO_TEXT = {
    ending: step
    for endings, step in {
        ".json .yaml .yml .toml .xml .html": "write a prompt a line, or a .jsonl",
        ".parquet .arrow .feather .xlsx .xls .ods": "export it as .csv with a column prompt",
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


def records_of(path: Path) -> Iterator[Record]:
    """Each prompt in a file, as it stands there; blank lines are left out.

    ValueError where the file is no list of prompts, or a line has none.
    """
    kind = path.suffix.lower()
    if kind in NO_TEXT:
        raise ValueError(
            f"a prompt file is text with a prompt a line, .jsonl, .csv or .tsv, got {str(path)!r}, a {kind} file; "
            f"{NO_TEXT[kind]}"
        )
    text = _text(path)
    if kind in TABLES:
        return _of_table(text, path, TABLES[kind])
    lines = ((number, line) for number, line in enumerate(_LINE_END.split(text), 1) if line.strip(" \t"))
    return _of_json(lines, path) if kind in JSON_LINES else ((number, line, {}) for number, line in lines)


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


def _of_json(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[Record]:
    for number, line in lines:
        step = 'write a text or an object with "prompt" a line'
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = "nested too deep" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
            raise ValueError(f"line {number} of {path} must be JSON, got {line[:60]!r} ({why}); {step}") from None
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise ValueError(f"line {number} of {path} must hold a prompt, got {line[:60]!r}; {step}")
        yield number, prompt, _besides(value) if isinstance(value, dict) else {}


def _besides(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "prompt"}


def _of_table(text: str, path: Path, delimiter: str) -> Iterator[Record]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    column: int | None = None
    header: list[str] = []
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if column is None:
                names = [cell.strip().lower() for cell in row]
                if names.count("prompt") != 1:
                    raise ValueError(
                        f"{path} must have one column prompt, its first line has {', '.join(names)[:80]!r}; name the "
                        f"column of the prompts so"
                    )
                column, header = names.index("prompt"), [cell.strip() for cell in row]
            elif column >= len(row):
                raise ValueError(
                    f"line {rows.line_num} of {path} must have a prompt, got {delimiter.join(row)[:60]!r}; add it, or "
                    f"remove the line"
                )
            else:
                other = {name: cell for name, cell in zip(header, row, strict=False) if name and cell}
                yield (
                    rows.line_num,
                    row[column],
                    {name: cell for name, cell in other.items() if name.lower() != "prompt"},
                )
    except csv.Error as error:
        raise ValueError(
            f"line {rows.line_num} of {path} must be a table's row, got {error}; quote texts with a comma, a quote or "
            f"a line's end"
        ) from None
