"""Each file of a finished run, damaged in each way, followed by each command that may read it.

A command either gives the result that it gives without the damage, or refuses in one line that names the file.
"""

import io
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from bench.faults.program import Outcome
from bench.faults.runs import (
    ITERATIONS,
    PROMPT,
    RESUME,
    Row,
    Setting,
    checkpoints,
    differences,
    digest,
    has_traceback,
    hash_of,
    is_whole,
    lines_of,
    newest_whole,
    read,
    refusal,
    reset,
    short,
    toml,
    train,
)

COMMANDS = {
    "resume": [*RESUME, f"train.iterations={ITERATIONS + 1}"],
    "sample": ["sample", "run", "--prompt", PROMPT, "--num", "1"],
    "merge": ["merge", "run", "merged"],
    "report": ["report", "run"],
}
REWRITTEN = {"run.json", "report.html", "config.toml", "samples/sample.png"}  # by a command that then refuses


def deleted(path: Path, rng: random.Random) -> None:
    path.unlink()


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def truncated(path: Path, rng: random.Random) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: rng.randrange(len(raw))])


def one_bit(path: Path, rng: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def garbage(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(path.stat().st_size))


def folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def other_content(path: Path, rng: random.Random) -> None:
    """A file that can be read, of the wrong shape."""
    if path.suffix == ".safetensors":
        save_file({"other": np.zeros((2, 3), np.float32)}, path)
    elif path.suffix == ".png":
        whole = io.BytesIO()
        Image.new("RGB", (1, 1)).save(whole, "PNG")
        path.write_bytes(whole.getvalue())
    elif path.suffix == ".toml":
        path.write_text(rng.choice(("", "run = 3\n", "[other]\nkey = 1\n")))
    else:
        path.write_text(rng.choice(("[]", "{}", "null", '"text"', "3", '{"other": [1]}')) + "\n")


def not_finite(path: Path, rng: random.Random) -> None:
    """NaN in every tensor, or in the first number."""
    if path.suffix == ".safetensors":
        filled = {
            name: np.full_like(value, np.nan) if value.dtype.kind == "f" else value
            for name, value in load_file(path).items()
        }
        save_file(filled, path)
    else:
        text = path.read_text()
        place = next(index for index, letter in enumerate(text) if letter.isdigit())
        end = next(index for index in range(place, len(text)) if text[index] not in "0123456789.e-")
        path.write_text(text[:place] + "NaN" + text[end:])


def unreadable(path: Path, rng: random.Random) -> None:
    path.chmod(0)


Damage = Callable[[Path, random.Random], None]
DAMAGES: dict[str, Damage] = {
    "deleted": deleted,
    "empty": empty,
    "truncated": truncated,
    "one bit flipped": one_bit,
    "garbage": garbage,
    "replaced by a folder": folder,
    "wrong shape": other_content,
    "NaN": not_finite,
    "unreadable": unreadable,
}


def fits(name: str, file: str) -> bool:
    """Whether a damage can be done to a file."""
    if name == "NaN":
        return file.endswith((".safetensors", ".json", ".jsonl"))
    return name != "unreadable" or os.geteuid() != 0


@dataclass(frozen=True)
class Case:
    """A damage of a file, or of every checkpoint's file of that name (`checkpoints/*/...`), and a command."""

    number: int
    file: str
    damage: str
    command: str


@dataclass(frozen=True)
class Base:
    """The finished run, and what each command gives without damage."""

    folder: Path
    results: dict[str, dict[str, str]]
    finished: dict[str, bytes]


def base(setting: Setting, attempts: int = 2) -> Base:
    """Make the run and the results; ValueError where a command does not give the same each time."""
    origin = setting.folder("damage", "base")
    _must(setting.program.run(train(), origin))
    results: dict[str, dict[str, str]] = {}
    for command, arguments in COMMANDS.items():
        for attempt in range(attempts):
            copy = origin.with_name(f"{command}.{attempt}")
            shutil.copytree(origin, copy)
            _must(setting.program.run(arguments, copy))
            found = result(copy, command)
            changed = differences(results.setdefault(command, found), found)
            if changed:
                raise ValueError(f"{command} must give the same twice, got a difference in {', '.join(changed)}")
            reset(copy)
    run = origin / "run"
    return Base(
        origin,
        results,
        {
            _name(run, path): path.read_bytes()
            for path in sorted(run.rglob("*"))
            if path.is_file() and not _is_lock(path)
        },
    )


def cases(found: Base, count: int, seed: int) -> list[Case]:
    """`count` cases: each damage of each file once with a command, then others, in an order that the seed decides."""
    rng = random.Random(f"{seed}/damage")
    files = list(found.finished)
    in_each = {name.split("/")[-1] for name in files if name.startswith("checkpoints/") and name.count("/") == 2}
    files += [f"checkpoints/*/{name}" for name in sorted(in_each)]
    pairs = [(file, damage) for file in files for damage in DAMAGES if fits(damage, file)]
    rng.shuffle(pairs)
    rounds, commands = [], list(COMMANDS)
    for turn in range(len(commands)):
        rounds += [
            (file, damage, commands[(turn + index) % len(commands)]) for index, (file, damage) in enumerate(pairs)
        ]
    return [Case(number, *chosen) for number, chosen in enumerate(rounds[:count])]


def run_case(setting: Setting, found: Base, case: Case) -> list[Row]:
    """Copy the run, damage it, run the command, judge."""
    here = found.folder.with_name(f"{case.number:05d}")
    shutil.copytree(found.folder, here)
    run, rng = here / "run", random.Random(f"{setting.seed}/damage/{case.number}")
    hit = [path for path in sorted(run.glob(case.file)) if path.is_file()]
    for path in hit:
        DAMAGES[case.damage](path, rng)
    names = {_name(run, path) for path in hit}
    before = {name: _bytes(run / name) for name in found.finished}
    undamaged = max(
        (int(path.name) for path in checkpoints(run) if is_whole(path) and not _in(path, run, names)), default=0
    )
    outcome = setting.program.run(COMMANDS[case.command], here)
    label, detail = judge(found, case, here, outcome, before, names, undamaged)
    fault = f"{case.damage}, then {case.command}"
    if label == "harmless" or label in ("recovered", "refused"):
        reset(here)
    return [Row("damaged file", case.damage, label, detail and f"{case.file}, {fault}: {detail}")]


def judge(
    found: Base, case: Case, here: Path, outcome: Outcome, before: dict[str, bytes | None], names: set[str], whole: int
) -> tuple[str, str]:
    """The class of an outcome and why; `names` were damaged, `whole` is the newest checkpoint that was not."""
    run = here / "run"
    if has_traceback(outcome):
        return "traceback", short(outcome)
    lost = _lost(found, case, run, before, names, whole)
    if lost:
        return "lost", f"{lost}; {short(outcome)}"
    words = {part for name in names for part in Path(name).parts if part not in ("checkpoints", "samples")}
    if outcome.code != 0:
        if case.file == "config.toml" and refusal(outcome) == "refused" and _names_a_key(outcome):
            return "refused", ""
        label = refusal(outcome, *words)
        return label, "" if label == "refused" else short(outcome)
    got, wanted = result(here, case.command), dict(found.results[case.command])
    for name in names & wanted.keys():  # a damaged file that the command left as it was is not its result
        if _bytes(run / name) == before[name]:
            got.pop(name, None)
            wanted.pop(name)
    changed = differences(got, wanted)
    said = any(word in outcome.err or word in outcome.out for word in words)
    if case.command == "report":  # the page itself may name the file
        page, usual = read(run / "report.html"), read(found.folder / "run" / "report.html")
        said = said or any(page.count(word) > usual.count(word) for word in words)
    if not changed:
        return ("recovered" if said else "harmless"), ""
    if said:
        return "told", ""
    if all(_as_written(name, found.finished[name], before[name]) for name in names):
        return "edited", ""
    return "silent", f"differ: {', '.join(changed)}"


def result(here: Path, command: str) -> dict[str, str]:
    """What a command is for, by file."""
    run = here / "run"
    if command == "resume":
        return digest(run)
    if command == "merge":
        return {_name(here, path): hash_of(path) for path in sorted((here / "merged").rglob("*.safetensors"))}
    name = "samples/sample.png" if command == "sample" else "report.html"
    return {name: hash_of(run / name)}


def _lost(found: Base, case: Case, run: Path, before: dict[str, bytes | None], names: set[str], whole: int) -> str:
    """What an undamaged run had and has no longer."""
    if newest_whole(run) < whole:
        return f"checkpoint {whole} was whole and is gone"
    if case.command == "resume" and newest_whole(run) > whole:
        return ""  # it trained, and what was there is replaced by what comes after it
    for name in found.finished.keys() - names - REWRITTEN:
        if _bytes(run / name) != before[name]:
            return f"{name} was undamaged and is {'changed' if (run / name).is_file() else 'gone'}"
    return "" if "config.toml" in names or (run / "config.toml").is_file() else "config.toml is gone"


def _as_written(name: str, whole: bytes, damaged: bytes | None) -> bool:
    """Whether a damaged text still has every key and type: nobody can tell it from one that was edited."""
    parse: Any = {".toml": toml, ".json": json.loads, ".jsonl": _lines}.get(Path(name).suffix)
    if parse is None or damaged is None or name.startswith("checkpoints/"):
        return False
    try:
        return _shape(parse(damaged.decode())) == _shape(parse(whole.decode()))
    except ValueError:
        return False


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shape(part) for key, part in value.items()}
    return [_shape(part) for part in value] if isinstance(value, list) else type(value).__name__


def _names_a_key(outcome: Outcome) -> bool:
    line = lines_of(outcome.err)[-1]
    return any("." in word and word.replace(".", "").replace("_", "").isalpha() for word in line.split()[1:])


def _is_lock(path: Path) -> bool:
    return path.name.startswith(".") or path.suffix == ".lock" or path.name == "lock"


def _in(checkpoint: Path, run: Path, names: set[str]) -> bool:
    return any(name.startswith(f"{_name(run, checkpoint)}/") for name in names)


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _name(run: Path, path: Path) -> str:
    return path.relative_to(run).as_posix()


def _must(outcome: Outcome) -> None:
    if outcome.code != 0:
        raise ValueError(f"the command without a fault must succeed, got {short(outcome)}")
