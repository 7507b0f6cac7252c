"""The small run that faults are put into: its command line, its reward that can be held, its results as digests."""

import contextlib
import hashlib
import json
import shutil
import signal
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.faults.program import CHECKOUT, Outcome, Program

TINY = str(CHECKOUT / "configs" / "tiny.toml")
ITERATIONS = 4
OF_TIME = ("seconds", "sensing_share")  # differ between two runs of the same thing
PROMPT = "a small red circle on a grey background"

PROBE = '''"""A reward that says when it is called, and waits from the iteration on that a file `hold` names."""

import os
import time


def _say(state):
    partial = f".probe{os.getpid()}"  # two writers may be at work
    with open(partial, "w") as file:
        file.write(state)
    os.replace(partial, "probe")


def _lines():
    try:
        with open("run/stats.jsonl", "rb") as file:
            return file.read().count(b"\\n")
    except OSError:
        return 0


def _held():
    try:
        with open("hold") as file:
            return os.path.exists("run/evaluation.json") and _lines() >= int(file.read() or 0)
    except OSError:
        return False


def score(images, prompts):
    _say(f"in {_lines()}")
    while _held():
        _say(f"held {_lines()}")
        time.sleep(0.005)
    scores = images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
    _say(f"out {_lines()}")
    return scores
'''


@dataclass(frozen=True)
class Setting:
    """What every case needs: the program, where to work, the seed, and the run left alone."""

    program: Program
    work: Path
    seed: int
    digest: dict[str, str]
    """Of the run left alone."""
    seconds: float
    """Of that run, warm."""
    fresh_seconds: float
    """Of that run in an interpreter of its own."""

    def folder(self, *names: Any) -> Path:
        """A new folder for a case, with the reward's module."""
        path = self.work.joinpath(*map(str, names))
        path.mkdir(parents=True)
        (path / "probe.py").write_text(PROBE)
        return path


@dataclass(frozen=True)
class Row:
    """A fault and its outcome; `detail` says more where the outcome is a failure."""

    area: str
    fault: str
    outcome: str
    detail: str = ""

    @property
    def failed(self) -> bool:
        return is_bad(self.outcome)


GOOD = {
    "recovered": "exit code 0, and the result is that of the command without the fault",
    "harmless": "the same, and nothing was said: the command does not need what was damaged",
    "told": "exit code 0, another result, and a line that names the file",
    "edited": "exit code 0, another result: the damage left a text file as somebody may have written it",
    "refused": "exit code 1 or 2 and one line that names the file, key or cause",
    "dropped": "exit code 0, all weights finite, and the statistics count the samples or updates left out",
    "hinted": "exit code 0 and a hint",
    "interrupted": "exit code 130, a line, status interrupted, and resumed to the same result",
    "accepted": "a configuration that is valid",
    "after the end": "the command had finished before",
}
BAD = {
    "traceback": "a Python traceback on a stream",
    "silent": "exit code 0 but another result, with no word",
    "lost": "an undamaged file or the newest whole checkpoint was destroyed",
    "wordless": "an exit code without one line that begins with error:",
    "unnamed": "a line that names neither file nor cause",
    "died": "another exit code, or death by a signal",
    "hung": "no end within four minutes",
    "stuck": "a stopped run that can be neither resumed nor started again",
    "disturbed": "the first of two writers did not end as it would have alone",
    "not run": "the harness could not do this",
}


def is_bad(outcome: str) -> bool:
    """Whether an outcome is a failure."""
    return outcome not in GOOD


def train(*overrides: str) -> list[str]:
    """Arguments of the small run."""
    usual = ["run.folder=run", "reward.name=probe:score", f"train.iterations={ITERATIONS}"]
    return ["train", TINY, *usual, *overrides]


RESUME = ["train", "--resume", "run"]


def clean(value: Any) -> Any:
    """Statistics without what depends on the clock."""
    if isinstance(value, dict):
        return {key: clean(part) for key, part in value.items() if not any(name in key for name in OF_TIME)}
    return [clean(part) for part in value] if isinstance(value, list) else value


def tensors_of(path: Path) -> dict[str, bytes]:
    """The tensors of a safetensors file, each with type, shape and bytes; ValueError where it is none."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + length])
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                if len(raw) < 8 + length + end:
                    raise ValueError("cut short")
                found[name] = f"{entry['dtype']}{entry['shape']}".encode() + raw[8 + length + start : 8 + length + end]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    return found


def hash_of(path: Path) -> str:
    """A digest of what a file says: tensors without metadata, statistics without times, other files as they are."""
    try:
        if path.suffix == ".safetensors":
            parts = [name.encode() + value for name, value in sorted(tensors_of(path).items())]
        elif path.suffix == ".jsonl":
            parts = [json.dumps(clean(json.loads(line))).encode() for line in path.read_text().splitlines()]
        elif path.name == "evaluation.json":
            parts = [json.dumps(clean(json.loads(path.read_text()))).encode()]
        else:
            parts = [path.read_bytes()]
    except OSError as error:
        return f"unreadable: {error.strerror}"
    except ValueError:
        parts = [b"malformed", path.read_bytes()]
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:16]


def digest(run: Path) -> dict[str, str]:
    """What a finished run has to show, by file: weights, statistics, evaluation, images, the newest state."""
    files = sorted([*run.glob("adapter/*.safetensors"), *run.glob("samples/*"), *run.glob("*.safetensors")])
    files += [run / "stats.jsonl", run / "evaluation.json"]
    found = {path.relative_to(run).as_posix(): hash_of(path) for path in files}
    newest = checkpoints(run)[-1:]
    return (
        found | {f"{newest[0].name}/state.safetensors": hash_of(newest[0] / "state.safetensors")} if newest else found
    )


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The files in which two results differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def checkpoints(run: Path) -> list[Path]:
    """Folders of checkpoints, oldest first, whole or not."""
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint's files can be read, and are those of its SHA256SUMS where it has them."""
    try:
        tensors_of(checkpoint / "state.safetensors")
        json.loads((checkpoint / "state.json").read_text())
        sums = checkpoint / "SHA256SUMS"
        for line in sums.read_text().splitlines() if sums.exists() else []:
            wanted, name = line.split(maxsplit=1)
            if hashlib.sha256((checkpoint / name.lstrip("*")).read_bytes()).hexdigest() != wanted:
                return False
    except (OSError, ValueError):
        return False
    return True


def newest_whole(run: Path) -> int:
    """The iteration of the newest whole checkpoint, 0 where there is none."""
    return max((int(path.name) for path in checkpoints(run) if is_whole(path)), default=0)


def lines_of(err: str) -> list[str]:
    """What was said on standard error, without progress bars."""
    lines = [line.strip() for line in err.replace("\r", "\n").splitlines()]
    return [line for line in lines if line and "it/s" not in line and "s/it" not in line and "?it" not in line]


def has_traceback(outcome: Outcome) -> bool:
    return "Traceback (most recent call last)" in outcome.out + outcome.err


def short(outcome: Outcome) -> str:
    """The exit code and the last words, for a list of failures."""
    last = (lines_of(outcome.err) or lines_of(outcome.out) or [""])[-1]
    return f"exit code {outcome.code}: {last[:300]}"


def refusal(outcome: Outcome, *names: str) -> str:
    """`refused`, or what is wrong with a failed command; one of `names` must be in its line."""
    if has_traceback(outcome):
        return "traceback"
    if outcome.code is None:
        return "hung"
    if outcome.code not in (1, 2):
        return "died"
    lines = lines_of(outcome.err)
    errors = [line for line in lines if line.startswith("error: ")]
    if len(errors) != 1 or lines[-1] != errors[0]:
        return "wordless"
    return "refused" if not names or any(name in errors[0] for name in names) else "unnamed"


def go_on(setting: Setting, folder: Path, run: str = "run", *overrides: str) -> tuple[str, str]:
    """Resume a stopped run to its end, or start it again where there is nothing to resume; (outcome, detail).

    `recovered` if the result is that of the run left alone.
    """
    begin = train(*overrides)
    if status_of(folder / run) == "finished":
        outcome = Outcome(0, "", "", 0.0)
    elif (folder / run / "config.toml").is_file():
        outcome = setting.program.run(["train", "--resume", run], folder)
        if outcome.code == 2 and not checkpoints(folder / run):
            outcome = setting.program.run([*begin, "--overwrite"], folder)
    else:
        outcome = setting.program.run(begin, folder)
        if outcome.code == 2:
            outcome = setting.program.run([*begin, "--overwrite"], folder)
    if outcome.code != 0:
        bad = refusal(outcome)
        return "stuck" if bad == "refused" else bad, f"going on: {short(outcome)}"
    if has_traceback(outcome):
        return "traceback", short(outcome)
    changed = differences(digest(folder / run), setting.digest)
    return ("silent", f"after resuming differ: {', '.join(changed)}") if changed else ("recovered", "")


def status_of(run: Path) -> str:
    """The status in run.json, empty where there is none."""
    try:
        return json.loads((run / "run.json").read_text())["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextlib.contextmanager
def held(setting: Setting, folder: Path, iteration: int) -> Iterator[Any]:
    """The small run, waiting in the reward of `iteration`; whatever happens it is gone in the end."""
    (folder / "hold").write_text(str(iteration))
    running = setting.program.start(train(), folder)
    try:
        running.until(lambda: read(folder / "probe").startswith("held"))
        yield running
    finally:
        (folder / "hold").unlink(missing_ok=True)
        running.signal(signal.SIGKILL)
        running.wait()


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def toml(text: str) -> dict[str, Any]:
    return tomllib.loads(text)


def reset(folder: Path) -> None:
    """Remove what a case left, but for what failed: thousands of runs would fill the disk."""
    shutil.rmtree(folder, ignore_errors=True)
