"""Which settings of a configuration are its own: what differs from the defaults of the choices that it makes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from adascope_fast.config.tree import Config
from adascope_fast.settings import OWN, choices_of, key_of, show


class Change(NamedTuple):
    """A key as `section.key`, its value and its default as TOML, "" for a default where there is none."""

    key: str
    value: str
    default: str


def changes(values: Mapping[str, Any]) -> list[Change]:
    """What is not as by default in nested plain values, such as those of a run's config.toml.

    A section's choice is compared with the choice that is made where none is, its keys with those of its own choice.
    What this version does not know is taken as the configuration's own. Nothing is validated.
    """
    defaults, found = Config(), []
    for section, fields in values.items():
        if isinstance(fields, Mapping):
            usual = {name: _usual(defaults, section, name, fields) for name in fields}
            own = [name for name, value in fields.items() if usual[name] != show(_plain(value))]
            found += [Change(f"{section}.{name}", show(_plain(fields[name])), usual[name]) for name in own]
    return found


def _usual(defaults: Config, section: str, name: str, fields: Mapping[str, Any]) -> str:
    """The default of a key as TOML, `absent` for none; "" where it must be set or is not known."""
    info, by_default = Config.model_fields.get(section), getattr(defaults, section, None)
    if info is None:
        return ""
    key = key_of(info.annotation)
    usual = getattr(by_default, key, None) if key else ""
    choice = fields.get(key, usual) if key else ""
    if name == key or (choice == usual and hasattr(by_default, name)):
        return _shown(getattr(by_default, name, None))
    part = choices_of(info.annotation).get(OWN if ":" in str(choice) else str(choice))
    field = part.model_fields.get(name) if part is not None else None
    return "" if field is None or field.is_required() else _shown(field.default)


def _shown(value: Any) -> str:
    return "absent" if value is None else show(_plain(value))


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, tuple | list) else value
