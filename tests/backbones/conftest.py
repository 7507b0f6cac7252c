"""Tiny random pipelines of every family, saved to folders."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_pipelines import made


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline by the name of its family, built once."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            made(name).save_pretrained(root / name, safe_serialization=True)
        return root / name

    return folder
