"""SIGINT, SIGTERM and SIGHUP: a command is left at once, with a line and exit code 130; a run is interrupted.

Libraries swallow what is raised while they are imported (torch, where it looks for numpy, a KeyboardInterrupt too), so
until there is something to save nothing is raised. Imported before anything else: it needs next to nothing itself.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def leave(*_: int | FrameType | None) -> None:
    """Say so and end the process."""
    os.write(2, b"interrupted\n")
    os._exit(130)


class Interrupted(KeyboardInterrupt):
    """A signal that ends a command; `code` is what it ends with: of SIGTERM 143, as schedulers know it, else 130."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number if number == signal.SIGTERM else 130


def interrupt(number: int, _: FrameType | None = None) -> None:
    """`Interrupted`, which is a KeyboardInterrupt."""
    raise Interrupted(number)


@contextmanager
def answered_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Within it signals go to `handler`, but for those that are ignored (nohup's SIGHUP); in the main thread alone."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    is_main = threading.current_thread() is threading.main_thread()
    changed = [number for number in STOPPING if is_main and before[number] not in (signal.SIG_IGN, None)]
    for number in changed:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number])
