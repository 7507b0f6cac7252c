"""`adascope-fast launch`: what is started, with which configuration, and what is refused."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from adascope_fast.commands import launch as module
from adascope_fast.commands.launch import configuration, launch
from adascope_fast.config import ConfigError


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that a process was replaced by."""
    found: list[list[str]] = []
    monkeypatch.setattr(module.os, "execv", lambda program, command: found.append(command))
    monkeypatch.setattr(module.os, "environ", dict(os.environ))
    return found


def _launch(name: str, *arguments: str) -> None:
    context: Any = SimpleNamespace(args=list(arguments))
    launch(context, name)


def test_accelerate_starts_the_training_with_the_shipped_configuration(started: list) -> None:
    _launch("fsdp2", "--num_processes", "4", "train", "quickstart", "train.iterations=2")
    (command,) = started
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert command[3:5] == ["--config_file", str(configuration("fsdp2"))]
    assert command[5:] == [
        *("--num_processes", "4"),
        *("--module", "adascope_fast.cli", "train", "quickstart", "train.iterations=2"),
    ]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("multi_gpu", {}),
        ("fsdp2", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}),
        ("zero2", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}),
        ("zero3", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}),
    ],
)
def test_on_cpus_torchrun_starts_as_many_processes_as_asked_for(started: list, name: str, wanted: dict) -> None:
    _launch(name, "--cpu", "--num_processes", "2", "train", "quickstart")
    (command,) = started
    assert command[1:5] == ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    assert module.os.environ["ACCELERATE_USE_CPU"] == "true"
    assert {key: module.os.environ.get(key) for key in wanted} == wanted
    assert ("ACCELERATE_USE_FSDP" in module.os.environ) is bool(wanted)


@pytest.mark.parametrize("path", sorted(configuration("single").parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_shipped_configuration(path: Path) -> None:
    found: Any = load_config_from_file(str(path))
    assert found.num_processes == {"single": 1, "multi_node": 16}.get(path.stem, 8)
    assert path.read_text().startswith("# "), "says what it is for"


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("fsdp3", ["train"], r"takes fsdp2, multi_gpu, multi_node, single, zero2, zero3 or a file .* got 'fsdp3'"),
        ("no.yaml", ["train"], r"got 'no\.yaml'"),
        ("fsdp2", [], r"starts a training, got 'nothing' after fsdp2"),
        ("fsdp2", ["sample", "RUN"], r"starts a training, got 'sample RUN'"),
        (
            "fsdp2",
            ["--cpu", "--num_machines", "2", "train", "quickstart"],
            r"takes --num_processes and a number, got .--num_machines 2",
        ),
        ("fsdp2", ["--cpu", "--num_processes", "two", "train", "quickstart"], r"got 'two'"),
        ("fsdp2", ["train", "none.toml", "--overwrite"], r"a configuration file must exist, got none\.toml"),
        ("fsdp2", ["--cpu", "train", "quickstart", "train.iteratons=2"], r"did you mean train\.iterations"),
        ("fsdp2", ["train", "--resume", "none"], r"holds a config\.toml, 'none' does not"),
        ("fsdp2", ["train"], r"train needs a configuration file first, got nothing"),
    ],
)
def test_what_cannot_be_meant_is_refused(started: list, name: str, arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _launch(name, *arguments)
    assert not started
