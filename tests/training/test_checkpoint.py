"""Checkpoints: whole or absent, damage found and named, the one before used; never a number that is not finite."""

import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError

from adascope_fast.config import ConfigError
from adascope_fast.training import checkpoint

FILES = (checkpoint.TENSORS, checkpoint.STATE, checkpoint.SUMS)


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


def _save(folder: Path, number: int, log: checkpoint.LogCopy | None = None) -> Path:
    path = folder / f"{number:06d}"
    tensors = {"adapter.weight": torch.full((3, 5), float(number)), "optimizer.0.step": torch.tensor(number)}
    checkpoint.save(path, tensors, {"next_iteration": number}, log)
    return path


def test_what_was_written_is_read(tmp_path: Path):
    found = checkpoint.load(_save(tmp_path, 7))
    assert torch.equal(found.tensors["adapter.weight"], torch.full((3, 5), 7.0))
    assert (found.next_iteration, found.log) == (7, "")
    assert not list(tmp_path.glob(".*")), "nothing half written is left"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_one_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
):
    _save(tmp_path, 1)
    newest = _save(tmp_path, 2)
    DAMAGES[damage](newest / name)
    with pytest.raises(ValueError, match=rf"^({name}|state\.\w+) (cannot be read|is not what was written)"):
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


LINES = ['{"iteration": 0}\n', '{"iteration": 1, "of": "höchstens"}\n', '{"iteration": 2}\n']


@pytest.fixture
def logged(tmp_path: Path) -> Path:
    """A folder of checkpoints after the first and the second line of a log, which goes on."""
    folder, log = tmp_path / "checkpoints", tmp_path / "stats.jsonl"
    copy = checkpoint.LogCopy(log)
    for number, line in enumerate(LINES):
        with log.open("a", encoding="utf-8") as file:
            file.write(line)
        if number < 2:
            _save(folder, number + 1, copy)
    return folder


def _logs(folder: Path) -> list[str]:
    return [checkpoint.load(path).log for path in checkpoint.numbered(folder)]


WANTED = ["".join(LINES[:1]), "".join(LINES[:2])]


def test_each_checkpoint_knows_what_had_been_logged(logged: Path):
    assert _logs(logged) == WANTED
    assert {path.name for path in (logged / "000002").iterdir()} == set(FILES)
    assert (logged / checkpoint.LOG).read_text() == WANTED[1]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_log_is_there_twice(logged: Path, damage: str):
    for path in (logged / checkpoint.LOG, logged.parent / checkpoint.LOG):
        before = path.read_bytes()
        DAMAGES[damage](path)
        assert _logs(logged) == WANTED
        if path.is_dir():
            path.rmdir()
        path.write_bytes(before)


def test_a_log_that_is_damaged_twice_is_told(logged: Path):
    for path in (logged / checkpoint.LOG, logged.parent / checkpoint.LOG):
        path.write_text(LINES[0] + LINES[1].replace("1", "7"))
    with pytest.raises(ValueError, match=r"neither .*checkpoints/stats\.jsonl nor .* has what was logged until then"):
        checkpoint.load(logged / "000002")
    found = checkpoint.newest(logged)
    assert found is not None
    assert (found.next_iteration, found.log) == (1, WANTED[0])


@pytest.mark.parametrize("left", ["", "half", "more", "nothing"])
def test_a_copy_goes_on_whatever_an_earlier_process_left_of_it(logged: Path, left: str):
    """As after a kill, or a disk that was full."""
    copy = logged / checkpoint.LOG
    contents = {
        "": b"",
        "half": copy.read_bytes()[:20],
        "more": copy.read_bytes() + b'{"iteration": 5',
        "nothing": None,
    }
    copy.unlink()
    if contents[left] is not None:
        copy.write_bytes(contents[left])
    _save(logged, 3, checkpoint.LogCopy(logged.parent / checkpoint.LOG))
    (logged.parent / checkpoint.LOG).unlink()
    assert _logs(logged) == [*WANTED, "".join(LINES)]


@pytest.mark.parametrize("name", ["checkpoints/stats.jsonl", "stats.jsonl"])
def test_a_copy_or_a_log_that_is_lost_in_between_is_begun_again(tmp_path: Path, name: str):
    folder, log = tmp_path / "checkpoints", tmp_path / "stats.jsonl"
    copy = checkpoint.LogCopy(log)
    log.write_text(LINES[0])
    _save(folder, 1, copy)
    (tmp_path / name).unlink()
    with log.open("a") as file:
        file.write("{}\n")
    _save(folder, 2, copy)
    assert checkpoint.load(folder / "000002").log == log.read_text() == (folder / checkpoint.LOG).read_text()


def test_a_checkpoint_costs_what_is_new_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, log = tmp_path / "checkpoints", tmp_path / "stats.jsonl"
    copy, hashed = checkpoint.LogCopy(log), []
    log.write_text("x" * 100_000)
    _save(folder, 1, copy)
    inner = copy._sum
    monkeypatch.setattr(copy, "_sum", mock.Mock(update=lambda new: hashed.append(len(new)) or inner.update(new)))
    copy._sum.hexdigest = inner.hexdigest
    with log.open("a") as file:
        file.write("y" * 50)
    path = _save(folder, 2, copy)
    assert hashed == [50]
    assert sum(file.stat().st_size for file in path.iterdir()) < 2000
    assert checkpoint.load(path).log == log.read_text()


def test_the_checkpoint_of_an_earlier_version_has_the_log_in_it(tmp_path: Path):
    path = _save(tmp_path, 1)
    (path / checkpoint.LOG).write_text(LINES[1], encoding="utf-8")
    with (path / checkpoint.SUMS).open("a") as file:
        file.write(f"{checkpoint.digest(path / checkpoint.LOG)}  {checkpoint.LOG}\n")
    assert checkpoint.load(path).log == LINES[1]
    (path / checkpoint.LOG).write_text(LINES[0], encoding="utf-8")
    with pytest.raises(ValueError, match=r"stats\.jsonl is not what was written, its SHA-256 differs"):
        checkpoint.load(path)
