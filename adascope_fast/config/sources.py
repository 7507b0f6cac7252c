"""From a TOML file and command-line overrides to plain values, and from a failed validation to one line of advice.

Works on any two-level pydantic model: sections of fields, some of them with a choice of classes.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from adascope_fast.settings import OWN, choices_of, fields_of, key_of, needs, one_line, show

EXAMPLE = "my_module:my_object"
SENSED = ("adascope", "complement")
"""The selectors that sense."""
RENAMED = {
    "algorithm.per_prompt_buffer": "algorithm.buffer_size",
    "algorithm.per_prompt_min_count": "algorithm.min_count",
}
"""Keys of earlier versions, with what they are called now."""

# pydantic's kind of error: what the value must be, and an example for a field without a default.
WANTED = {
    "int_type": ("a whole number", 1),
    "float_type": ("a number", 1.0),
    "string_type": ("text", "name"),
    "bool_type": ("true or false", True),
    "list_type": ("a list", ["name"]),
    "finite_number": ("a finite number", 1.0),
    "string_too_short": ("text that is not empty", "name"),
    "string_unicode": ("UTF-8 text", "name"),
    "too_short": ("a list that is not empty", ["name"]),
}
# The same for limits: the name of the limit, the rule, the next step.
BOUNDS = {
    "greater_than": ("gt", "above {}", "more than {}"),
    "greater_than_equal": ("ge", "at least {}", "{} or more"),
    "less_than": ("lt", "below {}", "less than {}"),
    "less_than_equal": ("le", "at most {}", "{} or less"),
}


MOST_BYTES = 2**20  # of a configuration file
DEEPEST = 8  # lists and tables within each other
MOST_OF_A_KEY = 80  # characters that are shown of one


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line: the rule, the value received, the next step."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file; `ConfigError` if it is missing, too large, not text, or not TOML. A BOM is skipped."""
    try:
        if not path.is_file():
            raise ConfigError(_missing(path))
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ConfigError(
                f"a configuration file has at most {MOST_BYTES} bytes, got {path} with {size}; name the .toml file"
            )
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} must be readable, got {error.strerror}; check its permissions") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} must be UTF-8 text, got a byte that is not at {error.start}; save it as UTF-8"
        ) from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_malformed(path, text, str(error))) from None
    except RecursionError:
        raise ConfigError(_too_deep(path)) from None
    except ValueError as error:  # a whole number of thousands of digits, a date that is none
        raise ConfigError(
            f"{path} has a value that cannot be read ({str(error).partition(';')[0]}); correct it"
        ) from None
    if _depth(values) > DEEPEST:
        raise ConfigError(_too_deep(path))
    return values


def _too_deep(path: Path) -> str:
    return f"{path} has lists or tables more than {DEEPEST} deep; put field = value lines below a [section] line"


def _depth(value: Any) -> int:
    """Lists and tables within each other, counted without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


Override = str | tuple[str, Any]
"""`section.field=value` with the value as TOML or bare text, or the same as (`section.field`, value)."""


def apply_overrides(
    model: type[BaseModel], values: Mapping[str, Any], overrides: Sequence[Override]
) -> tuple[dict[str, Any], list[str]]:
    """A copy of `values` with each override set; later ones win.

    Where an override makes another choice (`selector.name=every_step`, `model.train=full`), the keys of `values` that
    have no meaning with it are left out; the second result says so, a line for each such override.
    """
    result = {section: dict(fields) if isinstance(fields, dict) else fields for section, fields in values.items()}
    given = [_split(model, override) for override in overrides]
    choices = [(section, field, value) for section, field, value in given if field == _key(model, section)]
    left_out: dict[str, list[str]] = {}
    for section, field, value in choices:
        if gone := _leave_out(model, result, section, field, value):
            left_out[f"{section}.{field} = {show(value)}"] = gone
    for section, field, value in given:
        if gone := _leave_out_idle(model, result, given, section, field, value):
            left_out.setdefault(f"{section}.{field} = {show(value)}", []).extend(gone)
    is_set = {section for section, *_ in given}
    senses = not isinstance(result.get("selector"), dict) or result["selector"].get("name", "adascope") in SENSED
    if "selector" in is_set and "sensing" not in is_set and not senses and isinstance(result.get("sensing"), dict):
        by = f"selector.name = {show(result['selector'].get('name'))}"
        left_out.setdefault(by, []).extend(f"sensing.{name}" for name in result.pop("sensing"))
    for section, field, value in given:
        fields = result.setdefault(section, {})
        if isinstance(fields, dict):  # else the file has a value where a section belongs, which validation reports
            _set(fields, _path(model, section, field) or [field], value)
    return result, [f"{choice} leaves out the file's {', '.join(keys)}" for choice, keys in left_out.items()]


def _split(model: type[BaseModel], override: Override) -> tuple[str, str, Any]:
    if not isinstance(override, str):
        section, field, _ = _place(model, *override)
        return section, field, override[1]
    key, equals, text = _halves(override)
    key = key if len(key) <= MOST_OF_A_KEY else key[:MOST_OF_A_KEY] + "..."
    if not equals:
        raise ConfigError(
            f"an override is section.field=value, got {show(override)} without '='; "
            f"write for example {_example_key(model, key)}=..."
        )
    text = text.strip()
    section, field, known = _place(model, key.strip(), _value(text, as_text=False))
    return section, field, _value(text, as_text=known is not None and known.annotation is str)


def _place(model: type[BaseModel], key: str, received: Any) -> tuple[str, str, Any]:
    """Section and field of a key, and the field's description, None for a table's; `ConfigError` if there is none."""
    section, _, field = key.partition(".")
    if key in _sections(model):
        raise ConfigError(_not_a_field(model, key, received))
    known = _sections(model).get(section, {}).get(field)
    if known is None and _path(model, section, field) is None and not (OWN in _choices(model, section) and field):
        raise ConfigError(_unknown(model, key, received))
    return section, field, known


def _halves(override: str) -> tuple[str, str, str]:
    """Key, equals sign and value; a quoted part of the key may have an equals sign."""
    found = re.match(r"""((?:"[^"]*"|'[^']*'|[^="'])*)(=)(.*)""", override, re.DOTALL)
    return (found[1], found[2], found[3]) if found else override.partition("=")


def _path(model: type[BaseModel], section: str, field: str) -> list[str] | None:
    """The names of `field.name.name`, as TOML writes them, where `field` is a table; None for anything else."""
    name, dot, _ = field.partition(".")
    known = _sections(model).get(section, {}).get(name)
    if not dot or known is None or get_origin(known.annotation) is not dict:
        return None
    try:
        inner: Any = tomllib.loads(f"{field} = 0")
    except ValueError:
        return None
    path = []
    while isinstance(inner, dict):
        ((name, inner),) = inner.items()
        path.append(name)
    return path if len(path) <= DEEPEST else None


def _set(fields: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a value within tables, each of which is copied. A number and a table stand for each other by its weight."""
    *outer, last = path
    for name in outer:
        inner = fields.get(name, {})
        fields[name] = dict(inner) if isinstance(inner, dict) else {"weight": inner}
        fields = fields[name]
    is_weight = outer and isinstance(fields.get(last), dict) and not isinstance(value, dict)
    fields[last] = {**fields[last], "weight": value} if is_weight else value


def _leave_out(model: type[BaseModel], result: dict[str, Any], section: str, field: str, value: Any) -> list[str]:
    """Take from `result` the keys of a section that its new choice has not; their names."""
    fields, classes = result.get(section, {}), _choices(model, section)
    chosen = classes.get(OWN if ":" in value else value) if isinstance(value, str) else None
    if not isinstance(fields, dict) or chosen is None:
        return []
    before = fields.pop(field, None)
    gone = [name for name in fields if before != value and name not in chosen.model_fields]
    for name in gone:
        del fields[name]
    fields[field] = value
    return [f"{section}.{name}" for name in gone]


def _leave_out_idle(
    model: type[BaseModel], result: dict[str, Any], given: Sequence[Any], section: str, field: str, value: Any
) -> list[str]:
    """Take from `result` what an override leaves without a meaning, but for what is an override itself; the names."""
    fields, gone = result.get(section, {}), []
    for part in _choices(model, section).values() if isinstance(fields, dict) else ():
        for name, info in part.model_fields.items():
            wanted = needs(info).get(field, [value])
            if name in fields and value not in wanted and (section, name) not in [one[:2] for one in given]:
                del fields[name]
                gone.append(f"{section}.{name}")
    return gone


def explain(model: type[BaseModel], values: Mapping[str, Any], error: ValidationError) -> str:
    """The first thing wrong with `values`, in one line; unknown keys before wrong values."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    line = _explain_one(model, problems[0], values)
    more = len(problems) - 1
    return line + (f" (and {more} more)" if more else "")


def _explain_one(model: type[BaseModel], problem: Any, values: Mapping[str, Any]) -> str:
    kind, received, context = problem["type"], problem["input"], problem.get("ctx", {})
    names = [part for part in problem["loc"] if isinstance(part, str)]
    choice = ""
    if len(names) > 1 and names[1] in _choices(model, names[0]):
        choice = names.pop(1)
    names = [name if len(name) <= MOST_OF_A_KEY else name[:MOST_OF_A_KEY] + "..." for name in names]
    key = ".".join(names)
    if kind == "extra_forbidden":
        return _not_of_this_choice(model, names, choice, received) or _unknown(model, key, received)
    if kind == "value_error":
        return str(context["error"])
    if kind in ("model_type", "model_attributes_type"):
        return _not_a_field(model, key, received)
    if kind == "only_with":
        wanted = " or ".join(show(value) for value in context["wanted"])
        other = f"{names[0]}.{context['other']}"
        return (
            f"{names[0]}.{context['field']} has a meaning with {other} = {wanted} alone, got {show(context['value'])} "
            f"with {show(context['has'])}; remove it, or change {other}"
        )
    if kind == "choice":
        return _unknown_choice(model, names[0], received)
    if kind == "unprintable":
        return f"{key} must have no control character, got {show(received)} with {context['character']}; remove it"
    if kind == "vanishing":
        least = f"{context['least']:.1e}"
        return f"{key} is zero in float32, got {show(received)}; set {key} to {least} or more"
    if kind == "string_too_long":
        most = context["max_length"]
        return f"{key} must have at most {most} characters, got {len(received)}; shorten it"
    if kind == "missing":
        info = _choices(model, names[0])[choice].model_fields[names[-1]]
        example = (info.examples or [1])[0]
        return f"{choice} needs {key}, got none; set for example {key} = {show(example)}"
    if kind in BOUNDS:
        limit, rule, step = BOUNDS[kind]
        bound = number(context[limit])
        return f"{key} must be {rule.format(bound)}, got {show(received)}; set {key} to {step.format(bound)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", context["expected"])
        choice = (difflib.get_close_matches(str(received), choices, n=1, cutoff=0.5) or choices)[0]
        return (
            f"{key} must be one of {', '.join(choices)}, got {show(received)}; set for example {key} = {show(choice)}"
        )
    if kind == "string_pattern_mismatch":  # where a name has a colon
        return f"{key} must be module:object, got {show(received)}; write for example {key} = {show(EXAMPLE)}"
    if kind not in WANTED:
        return f"{key} is not valid, got {show(received)}: {problem['msg']}; remove {key} to take its default"
    wanted, example = WANTED[kind]
    inside_list = len(names) < len(problem["loc"]) - bool(choice)
    info = _choices(model, names[0])[choice].model_fields[names[1]]
    default = None if info.is_required() else info.default
    example = default if default is not None else [example] if inside_list else (info.examples or [example])[0]
    rule = f"each item of {key} must be {wanted}" if inside_list else f"{key} must be {wanted}"
    return f"{rule}, got {show(received)}{_kind(received)}; write for example {key} = {show(example)}"


def _unknown_choice(model: type[BaseModel], section: str, received: Any) -> str:
    if not isinstance(received, dict):
        return _not_a_field(model, section, received)
    choices, key = list(_choices(model, section)), _key(model, section)
    name = received.get(key)
    near = (difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5) or choices)[0]
    return (
        f"{section}.{key} must be one of {', '.join(choices)}, got {show(name)}; "
        f"set for example {section}.{key} = {show(near)}"
    )


def _not_of_this_choice(model: type[BaseModel], names: list[str], choice: str, received: Any) -> str | None:
    """What to say of a key that another choice of the section has; None where no other has it."""
    section, field = names[0], names[-1]
    owners = [name for name, part in _choices(model, section).items() if name != OWN and field in part.model_fields]
    if not choice or not owners:
        return None
    key = f"{section}.{_key(model, section)}"
    return (
        f"{section}.{field} belongs to {key} = {' or '.join(show(owner) for owner in owners)}, got "
        f"{section}.{field} = {show(received)} with {show(choice)}; remove it, or change {key}"
    )


def _missing(path: Path) -> str:
    if path.is_dir():
        inside = path / "config.toml"
        step = f"did you mean {inside}?" if inside.is_file() else "name the .toml file itself"
        return f"a configuration is a file, got the folder {path}; {step}"
    folder = path.parent
    if not folder.is_dir():
        return f"a configuration file must exist, got {path}; there is no folder {folder}"
    if path.exists():
        return f"a configuration is a file, got {path}, which is a device or a pipe; save it to a file"
    beside = sorted(other.name for other in folder.glob("*.toml"))
    near = difflib.get_close_matches(path.name, beside, n=3) or beside[:3]
    step = (
        f"did you mean {' or '.join(str(folder / name) for name in near)}?" if near else f"{folder} holds no .toml file"
    )
    return f"a configuration file must exist, got {path}; {step}"


def _malformed(path: Path, text: str, message: str) -> str:
    place = re.search(r"\s*\(at (?:line (\d+), column \d+|end of document)\)", message)
    rule = message[: place.start()] if place else message
    lines = text.split("\n")  # as tomllib counts them
    while len(lines) > 1 and not lines[-1].strip():
        lines.pop()
    number = min(int(place[1]) if place and place[1] else len(lines), len(lines))
    content = lines[number - 1].strip()
    rule = " ".join(rule.split())
    step = "put field = value lines below a [section] line"
    return f"{path} line {number} is not TOML: {rule}, got {show(content)}; {step}"


def _choices(model: type[BaseModel], section: str) -> dict[str, type[BaseModel]]:
    """The classes of a section by choice; one class called "" where there is no choice, none for an unknown section."""
    info = model.model_fields.get(section)
    return {} if info is None else dict(choices_of(info.annotation))


def _key(model: type[BaseModel], section: str) -> str:
    """The key that makes the choice, "" where there is none."""
    info = model.model_fields.get(section)
    return "" if info is None else key_of(info.annotation)


def _sections(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Every field of every section, whatever its choice."""
    return {
        section: {name: info for part in _choices(model, section).values() for name, info in fields_of(part).items()}
        for section in model.model_fields
    }


def _nearest_key(model: type[BaseModel], key: str) -> str | None:
    """The section or `section.field` that `key` most likely meant, looking in its own section first."""
    sections = _sections(model)
    section, dot, field = key.partition(".")
    anywhere = {name: f"{other}.{name}" for other, names in reversed(sections.items()) for name in names}
    if not dot:
        near_section = difflib.get_close_matches(section, sections, n=1, cutoff=0.75)
        if near_section and section not in anywhere:
            return near_section[0]
        field = section
    own = difflib.get_close_matches(field, sections.get(section, {}), n=1)
    if own:
        return f"{section}.{own[0]}"
    near = difflib.get_close_matches(field, anywhere, n=1)
    return anywhere[near[0]] if near else None


def _example_key(model: type[BaseModel], key: str) -> str:
    sections = _sections(model)
    section, _, field = (key if key in sections else _nearest_key(model, key) or next(iter(sections))).partition(".")
    return f"{section}.{field or next(iter(sections[section]))}"


def _unknown(model: type[BaseModel], key: str, received: Any) -> str:
    if key in RENAMED:
        return f"{key} is called {RENAMED[key]} now, got {key} = {show(received)}; rename it"
    near = _nearest_key(model, key)
    section = key.partition(".")[0]
    known = _sections(model).get(section)
    choices = f"{section} has {', '.join(known)}" if known else f"the sections are {', '.join(_sections(model))}"
    step = f"did you mean {near}?" if near else choices
    return f"unknown key {key} = {show(received)}; {step}"


def _not_a_field(model: type[BaseModel], section: str, received: Any) -> str:
    field = next(name for name in _sections(model)[section] if name != _key(model, section))
    return f"{section} is a section, got {section} = {show(received)}; set one of its fields, such as {section}.{field}"


def _value(text: str, *, as_text: bool) -> Any:
    """`text` as a TOML value, else as it stands; where the field is text, only quotes are taken off."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # also numbers of thousands of digits, and lists thousands deep
        return text
    value = parsed["value"]
    bare = len(parsed) != 1 or _depth(value) > DEEPEST or (as_text and not isinstance(value, str))
    return text if bare else value


def number(value: float) -> str:
    """A bound: whole where it is, `4294967296` and `1e-30`."""
    return str(int(value)) if value == int(value) else f"{value:g}"


def _kind(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a section",
    }
    return f" ({names[type(value)]})" if type(value) in names else ""


def closest(name: str, known: Sequence[str]) -> str | None:
    """The known name that `name` most likely meant."""
    near = difflib.get_close_matches(name, known, n=1)
    return near[0] if near else None
