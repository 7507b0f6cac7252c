"""A finished run, made once by the command."""

from pathlib import Path

import pytest
from command_line import SMALLEST, TINY, call


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run, made by the command."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    outcome = call("train", TINY, *SMALLEST, f"run.folder={folder}")
    assert outcome.code == 0, outcome
    (folder / "printed.txt").write_text(outcome.out)
    return folder
