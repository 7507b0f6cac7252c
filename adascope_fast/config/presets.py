"""Configurations inside this package, by name: of the embedded models, and of published ones on GPUs of 24 GB and more.

A preset is a TOML file of `assets/presets`. `memory.toml` beside them says what differs on larger GPUs: `sd15-40gb` is
`sd15.toml` with those keys changed, also as text, so that what `adascope-fast init` prints keeps its comments.
"""

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w

from adascope_fast.config.sources import ConfigError, closest, read_toml

FOLDER = Path(__file__).parent.parent / "assets" / "presets"
MEMORY = "memory"
"""The file of what differs by memory; no preset itself."""
LONGEST = 80
"""Characters of what could be meant as a name."""
SMALLEST = "24gb"
"""The memory that the files themselves are for."""


def names() -> list[str]:
    """All presets: `sd15`, `sd15-24gb` (the same), `sd15-40gb`, ..."""
    variants = _variants()
    return [name for base in bases() for name in (base, *(f"{base}-{size}" for size in variants.get(base, ())))]


def bases() -> list[str]:
    """The presets that are files."""
    return sorted(path.stem for path in FOLDER.glob("*.toml") if path.stem != MEMORY)


def text(name: str) -> str:
    """A preset as commented TOML; ConfigError where there is none of that name."""
    if name not in names():
        raise ConfigError(f"a preset is one of {', '.join(bases())}, got {name!r}; {_step(name)}")
    base, _, size = name.partition("-")
    found = (FOLDER / f"{base}.toml").read_text(encoding="utf-8")
    if not size:
        return found
    found = found.replace(f" {base}`", f" {name}`")
    found = re.sub(r"^# Planned for .*? GB;.*?80gb\.", f"# Planned for {size[:-2]} GB.", found, flags=re.MULTILINE)
    for section, fields in _variants()[base][size].items():
        for key, value in fields.items():
            found = _with(found, section, key, value)
    return found


def title(base: str) -> str:
    """What a preset is, by the first sentence of its file."""
    head = " ".join(line.lstrip("# ") for line in text(base).split("[", 1)[0].splitlines())
    return re.split(r"(?<=[a-z)`])[.:] ", head)[0].removesuffix(".")


def values_of(place: str | Path) -> dict[str, Any]:
    """The values of a file, or of the preset of that name; ConfigError where it is both, or neither."""
    name, path = str(place), Path(place)
    if name in names():
        if path.is_file():
            raise ConfigError(f"{name} is a preset and a file here; write ./{name} for the file, or rename it")
        return tomllib.loads(text(name))
    if path.stem in names() and not path.exists():
        raise ConfigError(f"a configuration file must exist, got {path}; did you mean the preset {path.stem}?")
    if len(name) <= LONGEST and not path.suffix and len(path.parts) == 1 and not path.exists():
        raise ConfigError(
            f"a configuration is a .toml file, or a preset: {', '.join(bases())}; got {name!r}, {_step(name)}"
        )
    return read_toml(path)


def _step(name: str) -> str:
    near = closest(name, names())
    return f"did you mean {near}?" if near else "`adascope-fast init` says what each is"


@cache
def _variants() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Of each preset by memory, the sections that differ with their keys."""
    found = tomllib.loads((FOLDER / f"{MEMORY}.toml").read_text(encoding="utf-8"))
    return {base: {SMALLEST: {}} | sizes for base, sizes in found.items()}


def _with(found: str, section: str, key: str, value: Any) -> str:
    """The text with another value of a key, which it has; the comment behind it, on the other value, goes."""
    line = tomli_w.dumps({key: value}).strip()
    pattern = rf"(^\[{section}\]\n(?:[^\[\n].*\n)*?){key} = .*$"
    changed, count = re.subn(pattern, lambda match: match[1] + line, found, flags=re.MULTILINE)
    assert count == 1, f"a preset has {section}.{key}, which differs by memory"
    return changed
