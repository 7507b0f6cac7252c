"""What a prompt's line has besides the prompt: read from files and lists, the same wherever the prompt stands."""

import json
from pathlib import Path
from typing import Any

import pytest

from adascope_fast import prompts
from adascope_fast.prompts.settings import Prompts


def _files(folder: Path, train: str, held_out: str, kind: str = ".jsonl") -> Prompts:
    for name, text in (("train", train), ("held_out", held_out)):
        (folder / f"{name}{kind}").write_text(text)
    return Prompts(train=str(folder / f"train{kind}"), held_out=str(folder / f"held_out{kind}"))


def test_the_other_fields_of_a_json_line_are_its_metadata(tmp_path: Path):
    lines = [{"prompt": " a cat ", "tag": "x", "include": [{"class": "cat", "count": 1}]}, "a dog", {"prompt": "b"}]
    text = "".join(json.dumps(line) + "\n\n" for line in lines)
    named = _files(tmp_path, text, json.dumps({"prompt": "c", "n": None}))
    want = {"a cat": {"tag": "x", "include": [{"class": "cat", "count": 1}]}, "c": {"n": None}}
    assert prompts.metadata(named) == want
    assert prompts.chosen(named) == (["a cat", "a dog", "b"], ["c"])


@pytest.mark.parametrize("kind", [".csv", ".tsv"])
def test_the_other_columns_of_a_table_are_too(tmp_path: Path, kind: str):
    rows = ["Class,Prompt,note,", "cat,a cat,,x", 'dog,a dog,"one, two",', ",b,,"]
    text = "\n".join(rows)
    if kind == ".tsv":
        text = text.replace('"one, two"', "one; two").replace(",", "\t").replace("one; two", "one, two")
    want = {"a cat": {"Class": "cat"}, "a dog": {"Class": "dog", "note": "one, two"}}
    assert prompts.metadata(_files(tmp_path, text, "prompt\nc", kind)) == want


def test_lists_may_hold_dicts_and_texts():
    given: Any = {"train": ["a", {"prompt": "b ", "k": 1}], "held_out": [{"prompt": "c", "k": 2}, {"prompt": "d"}]}
    assert prompts.chosen(Prompts(), **given) == (["a", "b"], ["c", "d"])
    assert prompts.metadata(Prompts(), **given) == {"b": {"k": 1}, "c": {"k": 2}}
    wrong: Any = [{"text": "a"}]
    with pytest.raises(ValueError, match=r"a prompt is text, train_prompts\[0\] is None"):
        prompts.chosen(Prompts(), train=wrong, held_out=["b"])


def test_a_prompt_may_stand_twice_with_the_same_and_not_with_another(tmp_path: Path):
    line, other = '{"prompt": "a", "k": 1}\n', '{"prompt": "a", "k": 2}\n'
    assert prompts.metadata(_files(tmp_path, line * 2, '"b"')) == {"a": {"k": 1}}
    for train, held_out, second in ((line + other, '"b"', "line 2 of .*train"), (line, other, "line 1 of .*held_out"),
                                    (line, '"a"\n', "line 1 of .*held_out")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"got two that differ for 'a', line 1 of .*train\.jsonl and {second}"):
            prompts.metadata(_files(tmp_path, train, held_out))


def test_text_files_and_built_in_sets_have_none(tmp_path: Path):
    assert prompts.metadata(_files(tmp_path, "a\nb\n", "c\n", ".txt")) == {}
    assert prompts.metadata(Prompts(train="animals:train", held_out="animals:held_out")) == {}
