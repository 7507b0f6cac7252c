"""Random configurations, most of them wrong: valid values, bounds, huge ones, other types, unknown keys, odd text.

What reads a configuration must answer each with a `Config` or with one line that names a key, and with nothing else.
The keys are those that the program declares, so a new one is tried without a change here.
"""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from adascope_fast.config import Config
from adascope_fast.settings import OWN, choices_of, fields_of, key_of

ODD_TEXTS = ["", " ", "a b", "é", "图像", "\U0001f600", "\u2028", "\u202e", "\ufeff", "a\\b", "~", "..", "/dev/null"]
ODD_TEXTS += ["x" * 5000]
RAW_TEXTS = ["a\nb", "a\0b", "\x1b[31m", "\ud800", "\r", "\x85"]
"""Those that TOML cannot write as they are; an override can."""
OWNS = ["no_such_module:it", "math:no_such", "math:pi", ":", "a:", ":b", "a.py:f", "a b:c", "os:system:x", "..:x"]
OWNS += ["a" * 300 + ":b"]
HUGE = [2**31, 2**32 - 1, 2**32, 2**63, 2**64, 10**22, -(2**63), 10**400]
WRONG = ["true", "1979-05-27", "07:32:00", "[[1]]", "{ a = 1 }", "[]", "''", '"text"', "0.5", "-1", "nan", "-inf"]
BROKEN = ["[train", "= 3", "[train]\n[train]\n", "x = ", "\x00", "[[train]]", "train = 5", "\ufeff[run]\nseed = 1"]
BROKEN += ["[" * 3000, "a." * 3000 + "b = 1", "x = " + "[" * 3000]
BROKEN += ["x = " + "9" * 5000, "x = 0x" + "f" * 9000, "d = 2020-13-01"]


def configurations(seed: int, count: int) -> Iterator[tuple[dict[str, str], list[str]]]:
    """`count` pairs, the same for the same seed: files by name (`config.toml` is the one to load), and overrides."""
    for index in range(count):
        rng = random.Random(f"{seed}/{index}")
        yield {"config.toml": _toml(rng)}, [_override(rng) for _ in range(rng.choice([0, 0, 1, 1, 2, 5]))]


def _toml(rng: random.Random) -> str:
    if rng.random() < 0.1:
        return rng.choice(BROKEN)
    lines = []
    for section in rng.sample(list(Config.model_fields), rng.randint(0, 4)):
        lines.append(f"[{section}]")
        keys = dict(_pair(rng, section) for _ in range(rng.randint(0, 3)))
        lines += [f"{_bare(key)} = {value}" for key, value in keys.items()]
    if rng.random() < 0.1:
        lines.append(f'["{rng.choice(["trian", "x.y", "é", "a b"])}"]\nq = 1')
    return rng.choice(["\n", "\n", "\r\n"]).join(lines) + "\n"


def _override(rng: random.Random) -> str:
    section = rng.choice(list(Config.model_fields))
    key, value = _pair(rng, section)
    kind = rng.random()
    if kind < 0.1:
        odd = [section, key, "=", "a=", "\ud800=1", "a\nb=1"]
        return rng.choice([*odd, f"{section}=3", f"{section}.{key}.z=1", f"{key}={value}"])
    if kind < 0.2:
        value = rng.choice(RAW_TEXTS + ODD_TEXTS + OWNS)
    return f"{section}.{key}={value}"


def _pair(rng: random.Random, section: str) -> tuple[str, str]:
    """A key of the section, of whichever choice, or one that it has not; and a value as TOML."""
    annotation = Config.model_fields[section].annotation
    choices = choices_of(annotation)
    part = choices[rng.choice(list(choices))]
    fields = fields_of(part)
    if rng.random() < 0.1 or not fields:
        return rng.choice(["x", "naem", "é", "a b", "iteratoins", "k" * 200]), "1"
    name = rng.choice(list(fields))
    made = rng.choice(_VALUES)(rng, fields[name].annotation, fields[name].default)
    if name == key_of(annotation) and rng.random() < 0.7:
        made = json.dumps(rng.choice([*choices, *OWNS]).replace(OWN, "math:pi"))
    return name, made


def _default(rng: random.Random, annotation: Any, default: Any) -> str:
    if isinstance(default, bool):
        return str(rng.random() < 0.5).lower()
    if isinstance(default, int):
        return str(max(0, default + rng.choice([-1, 0, 0, 1, 3])))
    if isinstance(default, float):
        return repr(default * rng.choice([0.5, 1.0, 2.0]))
    return json.dumps(default) if isinstance(default, str | list) else rng.choice(["1", "0.5", '"text"'])


def _boundary(rng: random.Random, annotation: Any, default: Any) -> str:
    return rng.choice(["0", "1", "-1", "0.0", "1.0", "-0.0", "1e-300", "5e-324", "2", "1e6", "10000", "1000000"])


def _huge(rng: random.Random, annotation: Any, default: Any) -> str:
    return rng.choice([str(number) for number in HUGE] + ["1e22", "1e308", "-1e308", "1e400", "inf", "nan", "-inf"])


def _wrong(rng: random.Random, annotation: Any, default: Any) -> str:
    return rng.choice(WRONG)


def _text(rng: random.Random, annotation: Any, default: Any) -> str:
    return json.dumps(rng.choice(ODD_TEXTS + OWNS + ["a\nb", "a\0b", "\x7f"]), ensure_ascii=rng.random() < 0.5)


def _bare(key: str) -> str:
    return key if key.isascii() and key.replace("_", "").isalnum() else json.dumps(key, ensure_ascii=False)


_VALUES: list[Callable[[random.Random, Any, Any], str]] = [_default, _default, _boundary, _huge, _wrong, _text]
