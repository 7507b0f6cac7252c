"""Whatever is in a configuration, the answer is a `Config` or one line that names a key or the file."""

import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from adascope_fast.config import Config, ConfigError

BENCH = Path(__file__).parents[2] / "bench"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")


@pytest.fixture(scope="module")
def made() -> Iterator[Any]:
    """`bench/faults/configurations.py`, as a command beside it imports it."""
    sys.path.insert(0, str(BENCH / "faults"))
    yield import_module("configurations")
    sys.path.remove(str(BENCH / "faults"))


def test_300_of_them_are_a_configuration_or_one_line(made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.ERROR)
    sections = "|".join(Config.model_fields)
    outcomes: Counter[str] = Counter()
    for files, overrides in made.configurations(0, 300):
        for name, text in files.items():
            (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        path = tmp_path / "config.toml"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                config = Config.load(path, overrides)
            except ConfigError as error:
                line = str(error)
                outcomes["refused"] += 1
                assert not CONTROL.search(line), (files, overrides)
                assert len(line) < 1000, (files, overrides)
                assert line.isprintable() or not line.isascii()
                names = re.search(rf"\b({sections})\b|unknown key|an override is|{re.escape(str(path))}", line)
                assert names, (line, files, overrides)
            else:
                outcomes["accepted"] += 1
                again = tmp_path / "again.toml"
                again.write_text(config.to_toml(), encoding="utf-8")
                assert Config.load(again) == config
    assert outcomes["refused"] > 100, outcomes
    assert outcomes["accepted"] > 15, outcomes


def test_they_are_the_same_for_the_same_seed(made: Any):
    assert list(made.configurations(3, 5)) == list(made.configurations(3, 5)) != list(made.configurations(4, 5))
    assert list(made.configurations(3, 2)) == list(made.configurations(3, 5))[:2]
