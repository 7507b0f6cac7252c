"""SIGINT, SIGTERM and SIGHUP at any moment, and two writers on one run folder."""

import signal
import socket
import time

from bench.faults.program import Outcome
from bench.faults.runs import (
    RESUME,
    Row,
    Setting,
    differences,
    digest,
    go_on,
    has_traceback,
    held,
    is_bad,
    lines_of,
    refusal,
    reset,
    short,
    status_of,
    train,
)

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
EARLIEST_S = 0.3  # before that Python itself is starting and can say nothing
WRITERS = {"resume": RESUME, "overwrite": train("--overwrite"), "plain": train()}


def loading_cases(setting: Setting, count: int) -> list[tuple[signal.Signals, float]]:
    """(signal, seconds of computing after the start) from the earliest moment to the end of loading."""
    last = max(EARLIEST_S, setting.fresh_seconds - setting.seconds)
    return [
        (SIGNALS[index % len(SIGNALS)], EARLIEST_S + (last - EARLIEST_S) * (index / max(1, count - 1)) ** 2)
        for index in range(count)
    ]


def while_loading(setting: Setting, number: signal.Signals, moment: float) -> list[Row]:
    """A signal to an interpreter of its own, before there is a run: exit code 130 and a line."""
    folder = setting.folder("signals", f"loading_{number.name}_{moment:.3f}")
    running = setting.program.start(train(), folder, fresh=True)
    running.after_cpu(moment)
    running.signal(number)
    outcome = running.wait()
    fault = f"{number.name} while loading"
    label = _interrupted(outcome)
    if outcome.code in (0, -number) and status_of(folder / "run") == "finished":
        label = "after the end"  # Python itself no longer answers while it shuts down
    if label == "interrupted" and (folder / "run" / "config.toml").is_file():
        label = "interrupted" if status_of(folder / "run") == "interrupted" else "silent"
    if not is_bad(label):
        reset(folder)
        return [Row("signal", fault, label)]
    return [Row("signal", fault, label, f"after {moment:.2f} s: {short(outcome)}")]


def while_training(setting: Setting, number: signal.Signals, iteration: int, twice: bool) -> list[Row]:
    """A signal (or two) to a run that is in a reward: exit code 130, a line, status interrupted, and resumable."""
    folder = setting.folder("signals", f"training_{number.name}_{iteration}_{twice}")
    fault = f"{number.name}{' twice' if twice else ''} while training"
    with held(setting, folder, iteration) as running:
        running.signal(number)
        if twice:
            time.sleep(0.02)
            running.signal(number)
        outcome = running.wait()
    label = _interrupted(outcome)
    if label == "interrupted" and status_of(folder / "run") != "interrupted":
        return [Row("signal", fault, "silent", f"status is {status_of(folder / 'run')!r} in run.json")]
    if label != "interrupted":
        return [Row("signal", fault, label, short(outcome))]
    label, detail = go_on(setting, folder)
    if label == "recovered":
        reset(folder)
        label = "interrupted"
    return [Row("signal", fault, label, detail)]


def two_writers(setting: Setting, second: str, iteration: int) -> list[Row]:
    """A second process on the folder of a living run is refused, naming the first, which is not disturbed."""
    folder = setting.folder("writers", f"{second}{iteration}")
    fault = f"a second writer ({second})"
    with held(setting, folder, iteration) as running:
        other = setting.program.start(WRITERS[second], folder)
        # One that is let in waits in the reward as well.
        outcome = other.wait(min(30.0, setting.program.longest_s))
        (folder / "hold").unlink(missing_ok=True)
        first = running.wait()
    if outcome.code is None:
        return [Row("two writers", fault, "silent", "the second process went on beside the first")]
    label = refusal(outcome, *([str(running.pid)] if second != "plain" else ["run"]))
    if label == "refused" and second != "plain" and socket.gethostname() not in lines_of(outcome.err)[-1]:
        label = "unnamed"
    if label == "died" and outcome.code == 0:
        label = "silent"
    if label != "refused":
        return [Row("two writers", fault, label, short(outcome))]
    changed = differences(digest(folder / "run"), setting.digest)
    if first.code != 0 or has_traceback(first) or changed:
        return [Row("two writers", fault, "disturbed", f"the first: {short(first)}; differ: {', '.join(changed)}")]
    reset(folder)
    return [Row("two writers", fault, "refused")]


def _interrupted(outcome: Outcome) -> str:
    if has_traceback(outcome):
        return "traceback"
    if outcome.code is None:
        return "hung"
    if outcome.code != 130:
        return "died"
    return "interrupted" if lines_of(outcome.err) else "wordless"
