"""Who may write where: nothing is replaced unasked, and one process writes a run at a time.

The lock goes with the process that holds it, however that ends. Nothing here imports torch, so what may not be written
is told at once.
"""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adascope_fast.config import ConfigError
from adascope_fast.reporting.files import is_run

NAME = ".lock"

logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it no other process has the run in `folder`, which exists; ConfigError if one has it now.

    An advisory lock of the system (flock) on a file of the folder, which says whose it is. Where the file system knows
    no locks, a warning says so.
    """
    with (folder / NAME).open("a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = " ".join(file.read(200).split()) or "another process"
            raise ConfigError(
                f"one process writes a run at a time, and {owner} has {str(folder)!r}; wait for it, stop it, or set "
                f"run.folder"
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s); see to it that one process writes it", folder, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def contents(folder: Path) -> list[Path]:
    """What is in a folder besides the lock."""
    return [path for path in folder.iterdir() if path.name != NAME]


def refuse_taken(path: Path, *, overwrite: bool) -> None:
    """ConfigError where a new run may not be written to `path`: something is there, or nothing can be."""
    if path.is_dir() and not contents(path):
        return
    if path.exists() or path.is_symlink():
        if not overwrite:
            raise ConfigError(
                f"a run never replaces what is there, and run.folder = {str(path)!r} exists; "
                f"continue it with --resume {path}, replace it with --overwrite, or set run.folder"
            )
        if not is_run(path):
            raise ConfigError(
                f"--overwrite replaces runs only, and {str(path)!r} holds no config.toml; choose another run.folder"
            )
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise not_writable(path, os.strerror(errno.ENOTDIR))
    if not path.exists() and not os.access(above, os.W_OK | os.X_OK):
        raise not_writable(path, os.strerror(errno.EACCES))


def not_writable(path: Path, why: str | None) -> ConfigError:
    """What to say of a run's folder that cannot be made."""
    return ConfigError(f"run.folder must be writable, {str(path)!r} is not ({why}); set run.folder to another place")


def refuse_existing(folder: Path, what: str) -> None:
    """ConfigError unless a folder is new or empty.

    Args:
        what: what would write there.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{what} never replaces what is there, and {str(folder)!r} exists; name another folder")
