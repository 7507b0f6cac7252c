"""Random configurations: each is accepted, or refused in one line that names a key; `plan` says the same."""

import random
import re
from collections.abc import Callable, Iterator
from importlib import import_module

from bench.faults.runs import Row, Setting, has_traceback, is_bad, lines_of, refusal, reset, short

Configurations = Callable[[int, int], Iterator[tuple[str, list[str]]]]
KEY = re.compile(r"\b[a-z_]+\.[a-z_0-9]+|line \d+|\bunknown key\b|section")


def configurations(seed: int, count: int) -> list[tuple[str, list[str]]]:
    """(TOML text, overrides) of `bench.faults.configurations`; none where that module is not there."""
    try:
        module = import_module("bench.faults.configurations")
    except ModuleNotFoundError as error:
        if error.name != "bench.faults.configurations":
            raise
        return []
    return list(module.configurations(seed, count))


def load_all(setting: Setting, part: list[tuple[str, list[str]]], start: int) -> list[Row]:
    """Read configurations in this process."""
    from adascope_fast.config import Config, ConfigError

    folder = setting.folder("configurations", start)
    path, rows = folder / "config.toml", []
    for index, (text, overrides) in enumerate(part, start):
        path.write_text(text, encoding="utf-8")
        label, said = "accepted", ""
        try:
            Config.load(path, overrides)
        except ConfigError as error:
            said = str(error)
            label = "refused" if "\n" not in said and KEY.search(said) else "unnamed"
        except Exception as error:  # whatever is not a ConfigError would be no line about a key
            label, said = "traceback", f"{type(error).__name__}: {error}"
        kept = f"configuration {index} {overrides}: {said[:300]!r}" if is_bad(label) else ""
        rows.append(Row("configuration", "read", label, kept))
    reset(folder)
    return rows


def sample(setting: Setting, count: int, seed: int, whole: list[tuple[str, list[str]]]) -> list[int]:
    """Indices of the configurations that go through the command line as well."""
    return sorted(random.Random(f"{seed}/plan").sample(range(len(whole)), min(count, len(whole))))


def plan(setting: Setting, index: int, text: str, overrides: list[str]) -> list[Row]:
    """One configuration through `adascope-fast plan`."""
    folder = setting.folder("plan", index)
    (folder / "config.toml").write_text(text, encoding="utf-8")
    outcome = setting.program.run(["plan", "config.toml", *overrides], folder)
    if outcome.code == 0 and not has_traceback(outcome):
        label = "accepted"
    else:
        label = refusal(outcome)
        if label == "refused" and not KEY.search(lines_of(outcome.err)[-1]):
            label = "unnamed"
    if not is_bad(label):
        reset(folder)
        return [Row("configuration", "plan", label)]
    return [Row("configuration", "plan", label, f"configuration {index} {overrides}: {short(outcome)}")]
