"""One process writes a run at a time; the lock goes with the process that holds it, however that ends."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adascope_fast.config import ConfigError

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
