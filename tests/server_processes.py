"""Servers of the command line as processes of their own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def server_process(
    *arguments: str | Path, variable: str, token: str = "", cwd: Path | None = None
) -> Iterator[tuple[subprocess.Popen, str]]:
    """`adascope-fast ARGUMENTS` once it serves, and all that it printed; killed at the end.

    Args:
        variable: the environment variable that has the token, if there is one.
    """
    command = [sys.executable, "-m", "adascope_fast.cli", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != variable}
    environment |= {variable: token} if token else {}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    printed = ""
    try:
        while not printed.endswith("ends it\n"):
            line = process.stdout.readline()
            assert line, process.stderr.read()
            printed += line
        yield process, printed
    finally:
        process.kill()
        process.communicate()
