"""SIGKILL at any moment, several in one run; resumed to the end, the run equals the one left alone, bit for bit.

Moments: anywhere in the life of the process, anywhere once it trains, inside a reward, and while a checkpoint's partial
folder is there.
"""

import contextlib
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from bench.faults.program import Running
from bench.faults.runs import ITERATIONS, RESUME, Row, Setting, checkpoints, go_on, newest_whole, read, reset, train


@dataclass(frozen=True)
class Kill:
    """When: a share `at` of the time left, `anywhere` or in `training`; in a `reward`; seconds into a `checkpoint`."""

    moment: str
    at: float
    iteration: int
    """The first in whose reward or checkpoint."""


@dataclass(frozen=True)
class Case:
    """The kills of one run, in their order; `fresh`: in interpreters of their own."""

    name: str
    kills: tuple[Kill, ...]
    fresh: bool


def cases(count: int, seed: int) -> list[Case]:
    """Runs with `count` kills altogether, up to three in each."""
    rng, found, left = random.Random(f"{seed}/kills"), [], count
    while left > 0:
        number = min(left, rng.choice((1, 2, 3)))
        fresh = len(found) % 4 == 3
        kinds = ["anywhere"] if fresh else ["anywhere", "training", "training", "reward", "checkpoint", "checkpoint"]
        kills = tuple(_drawn(rng, rng.choice(kinds)) for _ in range(number))
        found.append(Case(f"{len(found):03d}", kills, fresh))
        left -= number
    return found


def _drawn(rng: random.Random, moment: str) -> Kill:
    iteration, share = rng.randrange(ITERATIONS), rng.random()
    return Kill(moment, rng.choice((0.0, share * 0.003)) if moment == "checkpoint" else share, iteration)


def run_case(setting: Setting, case: Case) -> list[Row]:
    """A row for each kill, by the part of the run in which it fell."""
    folder = setting.folder("kills", case.name)
    run, parts, worst = folder / "run", [], 0
    for kill in case.kills:
        part = _kill(setting, folder, kill, case.fresh)
        parts.append(part)
        whole = newest_whole(run)
        if whole < worst:
            detail = f"checkpoint {worst} was whole before the kill in {part}, the newest whole one is {whole}"
            return [Row("SIGKILL", part, "lost", f"{case}: {detail}") for part in parts]
        worst = whole
    outcome, detail = go_on(setting, folder)
    if outcome == "recovered":
        reset(folder)
    return [Row("SIGKILL", part, outcome, detail and f"{case}: {detail}") for part in parts]


def _kill(setting: Setting, folder: Path, kill: Kill, fresh: bool) -> str:
    """Start or resume the run and kill it; where it was."""
    run = folder / "run"
    (folder / "probe").unlink(missing_ok=True)
    hold = folder / "hold"
    if kill.moment == "reward":
        hold.write_text(str(kill.iteration))
    resumes = (run / "config.toml").is_file() and bool(checkpoints(run))
    begun, older = time.time(), _partials(run)
    before = len(read(run / "stats.jsonl").splitlines())
    arguments = RESUME if resumes else train() + (["--overwrite"] if (run / "config.toml").is_file() else [])
    running = setting.program.start(arguments, folder, fresh=fresh)
    alive = _wait_for(setting, running, folder, kill, fresh, before, older)
    running.signal(signal.SIGKILL)
    outcome = running.wait()
    hold.unlink(missing_ok=True)
    if not alive or outcome.code != -signal.SIGKILL:
        return "after the end"
    return part_of(folder, begun, older)


def _wait_for(
    setting: Setting,
    running: Running,
    folder: Path,
    kill: Kill,
    fresh: bool,
    done: int,
    older: dict[Path, tuple[int, int]],
) -> bool:
    if kill.moment == "reward":
        return running.until(lambda: read(folder / "probe").startswith("held"))
    if kill.moment == "checkpoint":
        found = running.until(lambda: any(_number(path) > kill.iteration for path in _new(folder / "run", older)))
        end = time.perf_counter() + kill.at
        while time.perf_counter() < end:
            pass
        return found and running.alive()
    if kill.moment == "training":  # from the first reward on, which ends the loading
        running.until((folder / "probe").is_file)
        return running.after(time.perf_counter() - running.start + kill.at * setting.seconds / 2)
    life = setting.fresh_seconds if fresh else setting.seconds
    loading = life - setting.seconds
    return running.after(kill.at * (loading + setting.seconds * (1 - 0.6 * done / ITERATIONS)))


def _partials(run: Path) -> dict[Path, tuple[int, int]]:
    """Checkpoints that are being written, or were when a process died, each with what tells it from another's."""
    folder = run / "checkpoints"
    found = {}
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name.startswith(".") and "partial" in path.name:
                about = path.stat()
                found[path] = about.st_ino, about.st_mtime_ns
    return found


def _new(run: Path, older: dict[Path, tuple[int, int]]) -> list[Path]:
    return [path for path, about in _partials(run).items() if older.get(path) != about]


def _number(partial: Path) -> int:
    return int("".join(letter for letter in partial.name if letter.isdigit()) or 0)


def part_of(folder: Path, begun: float, older: dict[Path, tuple[int, int]]) -> str:
    """The part of the run in which a process died that began at `begun`, beside partial checkpoints `older` than it."""
    run = folder / "run"
    if _new(run, older):
        return "checkpoint"
    probe, status = folder / "probe", run / "run.json"
    if not status.is_file() or status.stat().st_mtime < begun:
        return "loading"
    state, _, lines = read(probe).partition(" ")
    if state in ("in", "held"):
        return "reward"
    evaluated = run / "evaluation.json"
    if not evaluated.is_file():
        return "evaluation"
    logged = read(run / "stats.jsonl").count("\n")
    if logged >= ITERATIONS:
        return "evaluation"
    if not probe.is_file() or evaluated.stat().st_mtime_ns > probe.stat().st_mtime_ns or logged > int(lines or 0):
        return "rollout"
    return "update"
