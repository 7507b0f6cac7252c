"""A small run of `scenes` that changes its images, made once."""

from pathlib import Path

import pytest
from small_runs import SMALLEST, TINY

from adascope_fast.config import Config
from adascope_fast.training.trainer import Trainer


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    changes = [
        "train.iterations=2",
        "evaluation.every=1",
        "evaluation.samples_per_prompt=2",
        "evaluation.num_prompts=2",
    ]
    config = Config.load(TINY, [*SMALLEST, f"run.folder={folder}", *changes, "train.learning_rate=0.05"])
    Trainer(config, quiet=True).train()
    return folder
