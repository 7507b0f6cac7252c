"""Random configurations: each is accepted, or refused in one line that names a key; `plan` says the same."""

import os
import random
import re
from importlib import import_module
from pathlib import Path

from bench.faults.runs import Row, Setting, has_traceback, is_bad, lines_of, refusal, reset, short

Configuration = tuple[dict[str, str], list[str]]
"""Files by name, of which `config.toml` is the one to read, and overrides."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")


def configurations(seed: int, count: int) -> list[Configuration]:
    """Those of `bench.faults.configurations`; none where that module is not there."""
    try:
        module = import_module("bench.faults.configurations")
    except ModuleNotFoundError as error:
        if error.name != "bench.faults.configurations":
            raise
        return []
    return list(module.configurations(seed, count))


def load_all(setting: Setting, part: list[Configuration], start: int) -> list[Row]:
    """Read configurations in this process."""
    from adascope_fast.config import Config, ConfigError

    folder = setting.folder("configurations", start)
    path, rows = folder / "config.toml", []
    for index, (files, overrides) in enumerate(part, start):
        _write(folder, files)
        label, said = "accepted", ""
        try:
            Config.load(path, overrides)
        except ConfigError as error:
            said = str(error)
            label = "refused" if _names_a_key(said) else "unnamed"
        except Exception as error:  # whatever is not a ConfigError would be no line about a key
            label, said = "traceback", f"{type(error).__name__}: {error}"
        kept = f"configuration {index} {overrides}: {said[:300]!r}" if is_bad(label) else ""
        rows.append(Row("configuration", "read", label, kept))
    reset(folder)
    return rows


def sample(count: int, seed: int, whole: list[Configuration]) -> list[int]:
    """Indices of the configurations that go through the command line as well, where a shell can write them."""
    writable = [index for index, (_, overrides) in enumerate(whole) if all(map(_is_argument, overrides))]
    return sorted(random.Random(f"{seed}/plan").sample(writable, min(count, len(writable))))


def plan(setting: Setting, index: int, files: dict[str, str], overrides: list[str]) -> list[Row]:
    """One configuration through `adascope-fast plan`."""
    folder = setting.folder("plan", index)
    _write(folder, files)
    outcome = setting.program.run(["plan", "config.toml", *overrides], folder)
    if outcome.code == 0 and not has_traceback(outcome):
        label = "accepted"
    else:
        label = refusal(outcome)
        if label == "refused" and not _names_a_key(lines_of(outcome.err)[-1]):
            label = "unnamed"
    if not is_bad(label):
        reset(folder)
        return [Row("configuration", "plan", label)]
    return [Row("configuration", "plan", label, f"configuration {index} {overrides}: {short(outcome)}")]


def _names_a_key(line: str) -> bool:
    """Whether this is one line without control characters that names a section, an override or the file."""
    from adascope_fast.config import Config

    named = re.search(rf"\b({'|'.join(Config.model_fields)})\b|unknown key|an override is|config\.toml", line)
    return bool(named) and not CONTROL.search(line)


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))


def _is_argument(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
