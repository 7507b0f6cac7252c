"""Every section, choice and key of the configuration with its default and meaning, from the classes that declare them.

`adascope-fast config` prints it, and the documentation's page of the configuration is made of it.
"""

import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from adascope_fast.config.sources import ConfigError, closest, number
from adascope_fast.config.tree import Config
from adascope_fast.settings import OWN, Section, choices_of, fields_of, key_of, needs, show


@dataclass(frozen=True)
class Key:
    """A key of a section: what values it takes, its default as TOML ("" if it must be set), and what it means."""

    name: str
    values: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Entry:
    """A section, or one of its choices, with its keys."""

    section: str
    choice: str
    """Empty where the section has no choice."""
    choice_key: str
    is_default: bool
    """Whether the choice is made where none is."""
    meaning: str
    keys: list[Key]

    @property
    def title(self) -> str:
        """As it is written in a file: `[section]`, with the choice where there is one."""
        return f"[{self.section}]" + (f" {self.heading}" if self.choice else "")

    @property
    def heading(self) -> str:
        """The choice as it is written in a file."""
        return f'{self.choice_key} = "{self.choice}"' + (" (default)" if self.is_default else "")


def entries() -> list[Entry]:
    """All of them, in the order of a configuration."""
    return [entry for section in Config.model_fields for entry in _entries_of(section)]


def find(name: str) -> list[Entry]:
    """The entries of a section, or of a choice in any section (`grpo`, `window`); ConfigError if there is none."""
    found = [entry for entry in entries() if name in (entry.section, entry.choice)]
    if found:
        return found
    known = list(dict.fromkeys(part for entry in entries() for part in (entry.section, entry.choice) if part))
    near = closest(name, known)
    raise ConfigError(
        f"config shows a section or a choice of one, got {name!r}; "
        + (f"did you mean {near}?" if near else f"the sections are {', '.join(Config.model_fields)}")
    )


def text(shown: list[Entry]) -> str:
    """Lines for a terminal."""
    return "\n\n".join("\n".join(_lines(entry)) for entry in shown)


def markdown(shown: list[Entry]) -> str:
    """A page: a heading and a table for each entry."""
    parts, last = [], ""
    for entry in shown:
        if entry.section != last:
            parts.append(f"## [{entry.section}]")
            last = entry.section
        if entry.choice:
            parts.append(f"### {entry.heading}")
        parts.append(entry.meaning)
        rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
        for key in entry.keys:
            default = f"`{key.default}`" if key.default else "must be set"
            cells = (f"`{key.name}`", key.values, default if key.default != ABSENT else ABSENT, key.meaning)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if entry.keys:
            parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


ABSENT = "absent"


def _entries_of(section: str) -> Iterator[Entry]:
    annotation = Config.model_fields[section].annotation
    key, default = key_of(annotation), getattr(Config(), section)
    for choice, part in choices_of(annotation).items():
        hidden = () if choice == OWN else (key,)
        keys = [_key(name, part) for name in fields_of(part) if name not in hidden]
        is_default = bool(choice) and type(default) is part
        yield Entry(section, choice, key, is_default, _paragraphs(part.__doc__ or ""), keys)


def _key(name: str, part: type[Section]) -> Key:
    info = part.model_fields[name]
    default = "" if info.is_required() else ABSENT if info.default is None else show(_plain(info.default))
    bounds = [text for item in info.metadata if (text := _bound(item))]
    values = ", ".join([_values(info.annotation), *bounds])
    only = "".join(
        f" Only with {other} = {' or '.join(show(value) for value in wanted)}." for other, wanted in needs(info).items()
    )
    return Key(name, values, default, " ".join((info.description or "").split()) + only)


def _values(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(str(value) for value in arguments)
    if origin is Annotated:
        return ", ".join([_values(arguments[0]), *(text for item in arguments[1:] for text in _bounds(item))])
    if origin in (Union, types.UnionType):
        return " or ".join(_values(part) for part in arguments if part is not types.NoneType)
    if origin is list:
        return f"a list of {_values(arguments[0])}"
    if origin is dict:
        return f"a table of names with {_values(arguments[1])}"
    if origin is tuple:
        return f"{len(arguments)} numbers: {_values(arguments[0])}"
    words = {bool: "true, false", int: "a whole number", float: "a number", str: "text", Any: "a value"}
    return words.get(annotation, str(annotation))


def _bounds(item: Any) -> list[str]:
    """Of a constraint that pydantic has left on a type, as a FieldInfo or as it was."""
    return [text for part in getattr(item, "metadata", [item]) if (text := _bound(part))]


def _bound(item: Any) -> str:
    for name, word in (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most")):
        if (limit := getattr(item, name, None)) is not None:
            return f"{word} {number(limit)}"
    return ""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _paragraphs(doc: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(doc).split("\n\n"))


def _lines(entry: Entry) -> Iterator[str]:
    yield entry.title
    for part in entry.meaning.split("\n\n"):
        yield f"  {part}"
    for key in entry.keys:
        default = "must be set" if not key.default else key.default if key.default == ABSENT else f"= {key.default}"
        yield f"  {key.name} {default}  ({key.values})"
        yield f"      {key.meaning}"
