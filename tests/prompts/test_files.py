"""Prompt files as people have them: what was written as lines comes back, and what is no list of prompts is told."""

import codecs
import csv
import io
import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adascope_fast import prompts
from adascope_fast.prompts import files

ENDS = ["\n", "\r\n", "\r"]
ENCODINGS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
# U+2028 and U+2029 are the two of splitlines' other ends that a prompt may have; the rest are control characters.
TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40).map(str.strip).filter(bool)


def _saved(folder: Path, content: bytes, name: str = "prompts.txt") -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


@given(
    st.lists(TEXTS, min_size=1, max_size=6),
    st.sampled_from(ENDS),
    st.sampled_from(sorted(ENCODINGS)),
    st.sampled_from(["", " ", "\t "]),
    st.booleans(),
)
def test_what_any_platform_writes_as_lines_comes_back(
    folder: Path, texts: list[str], end: str, encoding: str, space: str, has_blanks: bool
):
    texts = [text.lstrip("\ufeff") for text in texts if text.lstrip("\ufeff").strip()] or ["a"]
    lines = [text + space for text in texts] + [""]
    content = (end * (1 + has_blanks)).join(lines)
    source = _saved(folder, ENCODINGS[encoding] + content.encode(encoding))
    assert prompts.load(source) == [text.strip() for text in texts]
    step = 1 + has_blanks
    assert [number for number, *_ in files.records_of(Path(source))] == list(range(1, 1 + step * len(texts), step))


@given(st.lists(TEXTS, min_size=1, max_size=6), st.sampled_from([".jsonl", ".ndjson", ".csv", ".tsv", ".CSV"]))
def test_json_lines_and_tables_come_back(folder: Path, texts: list[str], kind: str):
    if kind in (".jsonl", ".ndjson"):
        rows = [json.dumps({"id": 3, "prompt": text} if row % 2 else text) for row, text in enumerate(texts)]
        content = "\n".join(rows) + "\n\n"
    else:
        table = io.StringIO(newline="")
        writer = csv.writer(table, delimiter=files.TABLES[kind.lower()])
        writer.writerows([["id", " Prompt "], *([row, text] for row, text in enumerate(texts)), []])
        content = table.getvalue()
    assert prompts.load(_saved(folder, content.encode(), f"prompts{kind}")) == texts


@pytest.mark.parametrize("code", [*range(0x00, 0x20), *range(0x7F, 0xA0)])
def test_control_characters_are_refused_with_their_line(tmp_path: Path, code: int):
    if chr(code) in "\t\n\r":
        return
    source = _saved(tmp_path, f"a cat\na d{chr(code)}g\n".encode())
    with pytest.raises(ValueError, match=rf"line 2 of .* has the control character U\+{code:04X}; remove it"):
        prompts.load(source)
    with pytest.raises(ValueError, match=rf"U\+{code:04X}"):
        prompts.checked(f"a{chr(code)}b", "--prompt")


def test_what_was_not_utf_8_on_the_command_line_is_refused():
    with pytest.raises(ValueError, match="--prompt has a byte that is not UTF-8; remove it"):
        prompts.checked(b"caf\xe9".decode("utf-8", "surrogateescape"), "--prompt")
    with pytest.raises(ValueError, match=r"a prompt is text, it is 3 \(int\)"):
        prompts.checked(3, "it")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"a\r\nb\rc\n\xff\n", "line 4 of .*p.txt has the byte 0xff, which is none; save it as UTF-8"),
        ("p.txt", b"a\r\n\xc3", "line 2 of .*p.txt has the byte 0xc3"),
        ("p.txt", codecs.BOM_UTF16_LE + b"a\x00\x00", "p.txt begins as utf-16 and has a byte at 4 that is none"),
        ("p.txt", "a cat".encode("utf-16-le"), r"line 1 of .* has the control character U\+0000"),
        ("p.txt", b"PK\x03\x04", "line 1 of .* has the control character"),
        (
            "p.jsonl",
            b'"a"\n{"text": "b"}\n',
            "line 2 of .* must hold a prompt, got .*; set prompts.column to that of the prompts: text",
        ),
        ("p.jsonl", b'"a"\n{}\n', "line 2 of .* must hold a prompt, got .*; write a text or an object with"),
        ("p.jsonl", b'"a"\n\n["b"]\n', "line 3 of .* must hold a prompt, got"),
        ("p.jsonl", b"a cat\n", r"line 1 of .* must be JSON, got 'a cat' \(Expecting value\); write"),
        ("p.jsonl", b"[" * 100_000, "line 1 of .* must be JSON, got .*nested too deep"),
        ("p.jsonl", b'"a\\ud800b"\n', "line 1 of .* has a byte that is not UTF-8"),
        ("p.jsonl", b'"a\\u0000b"\n', r"line 1 of .* has the control character U\+0000"),
        ("p.jsonl", b'{"prompt": " "}\n', "line 1 of .* is empty"),
        (
            "p.csv",
            b"caption\na cat\n",
            "must have one column prompt, it has caption; set prompts.column to that of the prompts$",
        ),
        ("p.csv", b"prompt,prompt\na,b\n", "must have one column prompt, it has prompt, prompt; rename all but one"),
        ("p.csv", b"id,prompt\n1,a\n2\n", "line 3 of .* must have a prompt, got '2'; add it"),
        ("p.csv", b"id,prompt\n1,a\n2,\n", "line 3 of .* is empty"),
        ("p.csv", b'prompt\n"a\nb"\n', r"line 3 of .* has the control character U\+000A"),
        ("p.csv", b'prompt\n"a"b\n', "line 2 of .* must be a table's row, got"),
        ("p.csv", b"prompt\n" + b"x" * 200_000, "line 2 of .* must be a table's row, got field larger"),
        ("p.csv", b"prompt\n", "is empty; add at least one"),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_told_by_line(tmp_path: Path, name: str, content: bytes, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        prompts.load(_saved(tmp_path, content, name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [*files.NO_TEXT, ".JSON"])
def test_files_of_other_kinds_are_refused_with_what_to_do(tmp_path: Path, kind: str):
    step = files.NO_TEXT[kind.lower()]
    with pytest.raises(ValueError, match=rf"got '.*prompts{kind}', a {kind.lower()} file; {step}$"):
        prompts.load(_saved(tmp_path, b"a cat\n", f"prompts{kind}"))


def test_what_is_no_regular_file_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for source, what in ((tmp_path, "which is a folder"), (tmp_path / "pipe", "which is no regular file"),
                         ("/dev/null", "which is no regular file"), ("a\0b", "which is no file")):  # fmt: skip
        with pytest.raises(ValueError, match=f"or a text file, got .*, {what}; check the path"):
            prompts.load(str(source))


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "MOST_BYTES", 3)
    with pytest.raises(ValueError, match=r"a prompt file has at most 3 bytes, got .* with 4; split it"):
        prompts.load(_saved(tmp_path, b"abcd"))


def test_duplicates_are_kept_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = _saved(tmp_path, b"a\nb\n\na \nb\n")
    with caplog.at_level(logging.WARNING):
        assert prompts.load(source) == ["a", "b", "a", "b"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{source} repeats prompts of earlier lines in 2 lines, first line 4 ('a'); they are kept, and drawn more often"
    ]
