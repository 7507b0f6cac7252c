"""Parquet files and data sets: the column, the metadata and the splits of tables that were written here."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from adascope_fast import prompts
from adascope_fast.prompts import arrow
from adascope_fast.prompts.settings import Prompts

ROWS: dict[str, list[Any]] = {
    "caption": ["a cat", " a dog ", None, "", "a bee"],
    "tag": ["x", None, "z", "z", "y"],
    "include": [[{"class": "cat", "count": 1}], [], [], [], [{"class": "bee", "count": 2}]],
    "image": [b"\x89PNG"] * 5,
}
METADATA = {
    "a cat": {"tag": "x", "include": [{"class": "cat", "count": 1}]},
    "a dog": {"tag": None, "include": []},
    "a bee": {"tag": "y", "include": [{"class": "bee", "count": 2}]},
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra data")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def _parquet(path: Path, rows: dict[str, list[Any]]) -> str:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(rows), path)
    return str(path)


def _saved(folder: Path, **splits: list[str]) -> str:
    from datasets import Dataset, DatasetDict

    whole = DatasetDict({name: Dataset.from_dict({"prompt": texts}) for name, texts in splits.items()})
    whole.save_to_disk(folder)
    return f"datasets:{folder}"


def test_a_parquet_file_has_a_column_of_prompts_and_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = _parquet(tmp_path / "p.parquet", ROWS)
    with caplog.at_level(logging.WARNING):
        assert prompts.load(source, "caption") == ["a cat", "a dog", "a bee"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{source} has no prompt in 2 rows, first row 3; they are left out"
    ]
    settings = Prompts(train=source, held_out="animals:held_out", column="caption")
    assert prompts.metadata(settings) == METADATA
    assert json.dumps(METADATA), "what JSON cannot say is left out"


def test_the_columns_that_there_are_are_named(tmp_path: Path):
    source = _parquet(tmp_path / "p.parquet", ROWS)
    wanted = r"must have one column prompt, it has caption, tag, include, image; set prompts.column to that"
    with pytest.raises(ValueError, match=wanted):
        prompts.load(source)
    with pytest.raises(ValueError, match=r"a prompt is text, row 1 of .*p.parquet is \["):
        prompts.load(source, "include")


def test_a_row_that_is_no_prompt_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"row 2 of .*p.parquet has the control character U\+000A"):
        prompts.load(_parquet(tmp_path / "p.parquet", {"prompt": ["a", "b\nc"]}))
    (tmp_path / "no.parquet").write_bytes(b"a cat\n")
    with pytest.raises(ValueError, match=r"no.parquet must be a Parquet file, got .*; write it again"):
        prompts.load(str(tmp_path / "no.parquet"))
    with pytest.raises(ValueError, match=r"got 'none\.parquet', which is no file"):
        prompts.load("none.parquet")


def test_a_saved_data_set_has_splits(tmp_path: Path):
    source = _saved(tmp_path / "set", train=["a", "b"], test=["c"])
    assert prompts.load(source) == ["a", "b"]
    assert prompts.load(f"{source}:test") == ["c"]
    assert prompts.chosen(Prompts(train=source, held_out=f"{source}:test")) == (["a", "b"], ["c"])
    with pytest.raises(ValueError, match="has the splits train, test, got 'dev'; name one of them"):
        prompts.load(f"{source}:dev")
    assert prompts.load(_saved(tmp_path / "other", only=["d"])) == ["d"]


def test_one_saved_split_and_rows_chosen_of_it_are_read_as_they_are(tmp_path: Path):
    from datasets import Dataset

    Dataset.from_dict({"prompt": ["a", "b", "c"]}).select([2, 0]).save_to_disk(tmp_path / "one")
    assert prompts.load(f"datasets:{tmp_path / 'one'}") == ["c", "a"]
    with pytest.raises(ValueError, match=r"is one saved split, got .*; leave out :train"):
        prompts.load(f"datasets:{tmp_path / 'one'}:train")


def test_a_folder_of_tables_is_a_data_set(tmp_path: Path):
    (tmp_path / "tables").mkdir()
    _parquet(tmp_path / "tables" / "train.parquet", {"prompt": ["a", "b"]})
    _parquet(tmp_path / "tables" / "test.parquet", {"prompt": ["c"]})
    assert prompts.load(f"datasets:{tmp_path / 'tables'}") == ["a", "b"]
    assert prompts.load(f"datasets:{tmp_path / 'tables'}:test") == ["c"]


def test_a_name_of_the_hub_is_taken_apart(monkeypatch: pytest.MonkeyPatch):
    import datasets

    asked = []

    def load_dataset(*names: str, split: str) -> Any:
        asked.append((*names, split))
        return datasets.Dataset.from_dict({"prompt": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("owner/name", "owner/name:test", "owner/name/small:train[:10]"):
        assert prompts.load(f"datasets:{source}") == ["a"]
    assert asked == [("owner/name", "train"), ("owner/name", "test"), ("owner/name", "small", "train[:10]")]


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("datasets:no", "a data set is datasets:owner/name, datasets:owner/name/configuration or datasets:folder"),
        ("datasets:a/b/c/d", "check the name"),
        ("datasets:somebody/nothing", "the data set 'datasets:somebody/nothing' could not be read: .*; check its name"),
    ],
)
def test_what_is_no_data_set_is_one_line(monkeypatch: pytest.MonkeyPatch, source: str, line: str):
    from datasets import config

    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=line) as caught:
        prompts.load(source)
    assert "\n" not in str(caught.value)


def test_where_the_packages_are_not_installed_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(arrow, "find_spec", lambda _: None)
    (tmp_path / "p.parquet").touch()
    for source, package in ((str(tmp_path / "p.parquet"), "pyarrow"), ("datasets:a/b", "datasets")):
        wanted = rf"need {package}, which is not installed; pip install 'adascope-fast\[data\]'"
        with pytest.raises(ValueError, match=wanted):
            prompts.load(source)
