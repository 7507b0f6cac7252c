"""One process writes a run at a time, and no process leaves its lock behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adascope_fast.config import ConfigError
from adascope_fast.training.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from adascope_fast.training.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_another_process_is_refused_by_name_until_the_first_is_gone(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(ConfigError, match=rf"one process writes a run at a time, and process {process.pid} on \S+ has"),
        locked(tmp_path),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_it_goes_with_its_block_and_not_before(tmp_path: Path):
    with locked(tmp_path), pytest.raises(ConfigError, match=rf"process {os.getpid()} on"), locked(tmp_path):
        pass
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        pass
