"""The command line as a process: started, signalled, waited for, and what it printed.

A process is either fresh, an interpreter of its own, or warm: forked from one that has imported everything, which saves
ten seconds of imports. Both run `adascope_fast.cli.main` on their arguments and die of a signal alike.
"""

import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CHECKOUT)}
_main: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Outcome:
    """Exit code (negative: died of that signal, None: had to be killed), streams, seconds."""

    code: int | None
    out: str
    err: str
    seconds: float


class _Forked:
    """A forked process with the methods of `subprocess.Popen` that are needed."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class Running:
    """A started command."""

    def __init__(self, process: Any, folder: Path, longest_s: float) -> None:
        self._process, self._folder, self._longest_s = process, folder, longest_s
        self.start = time.perf_counter()
        self.pid: int = process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal, if the process is still there."""
        if self.alive():
            os.kill(self.pid, number)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for `condition`, looking as often as the machine can; False if the process ended before."""
        while not condition():
            if not self.alive() or time.perf_counter() - self.start > self._longest_s:
                return condition()
        return True

    def after(self, seconds: float) -> bool:
        """Wait until `seconds` after the start; False if the process ended before."""
        while (left := self.start + seconds - time.perf_counter()) > 0 and self.alive():
            time.sleep(min(left, 0.002))
        return self.alive()

    def after_cpu(self, seconds: float) -> bool:
        """Wait until the process has computed for `seconds`, however busy the machine; False if it ended before."""
        while self.alive() and self._cpu_seconds() < seconds:
            time.sleep(0.002)
        return self.alive()

    def _cpu_seconds(self) -> float:
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # no such file system: by the clock
            return time.perf_counter() - self.start
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait(self, longest_s: float | None = None) -> Outcome:
        """Wait for the end; a process that outlives `longest_s` is killed and has no exit code."""
        longest_s = longest_s or self._longest_s
        hung = False
        try:
            while self.alive():
                if not hung and time.perf_counter() - self.start > longest_s:
                    hung = True
                    os.kill(self.pid, signal.SIGKILL)
                time.sleep(0.002)
        except BaseException:  # interrupted: nothing is left running
            self.signal(signal.SIGKILL)
            raise
        seconds = time.perf_counter() - self.start
        texts = [(self._folder / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr")]
        return Outcome(None if hung else self._process.returncode, texts[0], texts[1], seconds)


@dataclass(frozen=True)
class Program:
    """What is tried: `python -m adascope_fast.cli`, or the command line in its place."""

    command: tuple[str, ...] = ()
    longest_s: float = 240.0
    """After that a process hangs."""

    def warm(self, folder: Path, *commands: Sequence[str]) -> None:
        """Import what the commands need, by running some here in `folder`; processes are forked from here afterwards.

        They train nothing: a process that has run a backward pass has threads, and cannot be forked.
        """
        global _main
        if self.command:
            return
        os.environ.update(ENVIRONMENT)
        import adascope_fast.training.trainer  # noqa: F401
        from adascope_fast import cli
        from adascope_fast.planning import measured  # noqa: F401

        before = os.getcwd(), list(sys.path), {name: signal.getsignal(name) for name in signal.valid_signals()}
        for arguments in commands:
            _call_here(cli.main, arguments, folder)
        os.chdir(before[0])
        sys.path[:] = before[1]
        for number, handler in before[2].items():
            if handler is not None and number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, handler)
        _main = cli.main

    def start(
        self, arguments: Sequence[str], folder: Path, *, fresh: bool = False, largest_file: int | None = None
    ) -> Running:
        """Start the command in `folder`; its streams go to a folder in it.

        Args:
            largest_file: bytes that a file may grow to; more is an OSError, as on a full disk.
        """
        streams = folder / ".streams" / str(time.monotonic_ns())
        streams.mkdir(parents=True)
        for name in ("stdout", "stderr"):
            (streams / name).touch()
        if _main is not None and not fresh and not self.command:
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                _child(_main, arguments, folder, streams, largest_file)
            return Running(_Forked(pid), streams, self.longest_s)
        command = [*(self.command or (sys.executable, "-m", "adascope_fast.cli")), *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "ADASCOPE_FAST_DEBUG"}
        with (streams / "stdout").open("wb") as out, (streams / "stderr").open("wb") as err:
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment | ENVIRONMENT,
                preexec_fn=None if largest_file is None else lambda: _limit(largest_file),
            )  # fmt: skip
        return Running(process, streams, self.longest_s)

    def run(self, arguments: Sequence[str], folder: Path, **options: Any) -> Outcome:
        """Start a command and wait for its end."""
        return self.start(arguments, folder, **options).wait()


def _limit(largest_file: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _call_here(main: Callable[[], Any], arguments: Sequence[str], folder: Path) -> None:
    argv, sys.argv = sys.argv, ["adascope-fast", *arguments]
    os.chdir(folder)
    streams = sys.stdout, sys.stderr
    with (folder / "warm").open("w") as sink:
        sys.stdout = sys.stderr = sink
        try:
            main()
        except SystemExit as stopped:
            if stopped.code:
                raise ValueError(f"{' '.join(arguments)} must work before faults are injected, got exit code "
                                 f"{stopped.code}: {(folder / 'warm').read_text()}") from None  # fmt: skip
        finally:
            sys.argv = argv
            sys.stdout, sys.stderr = streams


def _child(
    main: Callable[[], Any], arguments: Sequence[str], folder: Path, streams: Path, largest_file: int | None
) -> None:
    """What the forked process does; it never returns."""
    code = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(streams / name, os.O_WRONLY | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if largest_file is not None:
            _limit(largest_file)
        os.chdir(folder)
        sys.argv = ["adascope-fast", *arguments]
        main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
