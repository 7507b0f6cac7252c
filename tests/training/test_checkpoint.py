"""Checkpoints: whole or absent, damage found and named, the one before used; never a number that is not finite."""

import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from adascope_fast.config import ConfigError
from adascope_fast.training import checkpoint

FILES = (checkpoint.TENSORS, checkpoint.STATE, checkpoint.LOG, checkpoint.SUMS)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = random.Random(3).randrange(len(data))
    data[place] ^= 1 << 3
    path.write_bytes(bytes(data))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: -max(1, path.stat().st_size // 3)]),
    "a bit": _flip,
    "garbage": lambda path: path.write_bytes(b"\xff\x00" * 40),
    "a folder": _folder,
}


def _save(folder: Path, number: int) -> Path:
    path = folder / f"{number:06d}"
    tensors = {"adapter.weight": torch.full((3, 5), float(number)), "optimizer.0.step": torch.tensor(number)}
    checkpoint.save(path, tensors, {"next_iteration": number}, f'{{"iteration": {number}}}\n')
    return path


def test_what_was_written_is_read(tmp_path: Path):
    found = checkpoint.load(_save(tmp_path, 7))
    assert torch.equal(found.tensors["adapter.weight"], torch.full((3, 5), 7.0))
    assert (found.next_iteration, found.log) == (7, '{"iteration": 7}\n')
    assert not list(tmp_path.glob(".*")), "nothing half written is left"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_one_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
):
    _save(tmp_path, 1)
    newest = _save(tmp_path, 2)
    DAMAGES[damage](newest / name)
    with pytest.raises(
        ValueError, match=rf"^({name}|state\.\w+|stats\.jsonl) (cannot be read|is not what was written)"
    ):
        checkpoint.load(newest)
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.next_iteration == 1
    (line,) = caplog.messages
    assert line.startswith(f"damaged checkpoint left out, {newest}: ")
    assert line.endswith(f"{tmp_path / '000001'} is used")
    DAMAGES[damage](tmp_path / "000001" / name)
    with pytest.raises(
        ConfigError, match=r"a run continues from a whole checkpoint, and .*000002.*000001.*--overwrite"
    ):
        checkpoint.newest(tmp_path)


def test_without_any_there_is_none_and_other_folders_are_none(tmp_path: Path):
    assert checkpoint.newest(tmp_path / "no such folder") is None
    (tmp_path / ".000003.partial").mkdir()
    (tmp_path / "\u0663").mkdir()  # a digit, but no number of ours
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_not_finite_is_neither_written_nor_read(tmp_path: Path, value: float, dtype: torch.dtype):
    tensors = {"fine": torch.ones(3), "bad": torch.tensor([1.0, value], dtype=dtype), "count": torch.tensor(3)}
    assert checkpoint.not_finite(tensors) == "bad"
    with pytest.raises(FloatingPointError, match="a checkpoint must be finite, and bad is not"):
        checkpoint.save(tmp_path / "000001", tensors, {"next_iteration": 1})
    assert not list(tmp_path.iterdir())
    path = _save(tmp_path, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "not_finite", lambda tensors: "")
        checkpoint.save(path, tensors, {"next_iteration": 2})
    with pytest.raises(ValueError, match=r"state\.safetensors has numbers that are not finite, in bad"):
        checkpoint.load(path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
@pytest.mark.parametrize("call", ["save_file", "os.fsync"])
def test_a_full_disk_leaves_the_one_before_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, call: str
):
    before = _save(tmp_path, 1)

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail) if call == "os.fsync" else patch.setattr(checkpoint, "save_file", fail)
        with pytest.raises(OSError, match=r"the checkpoint .*000002 could not be written \((No|I/O error: no) space"):
            _save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["000001"], "what was begun takes no room"
    assert checkpoint.load(before).next_iteration == 1


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_asks_for(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        path = _save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~umask}


def test_an_equal_number_is_replaced(tmp_path: Path):
    _save(tmp_path, 1)
    shutil.copytree(tmp_path / "000001", tmp_path / "copy")
    (tmp_path / "000001" / "state.json").write_text("{}")
    _save(tmp_path, 1)
    assert checkpoint.load(tmp_path / "000001").next_iteration == 1
