"""What every section of the configuration has in common: exact types, no unknown keys, and a choice by name.

A component's settings class is its section: it declares each key once, with its default, its meaning and its check, and
the component takes the same names. Where a section offers a choice, `name` (or `kind`) says which class it is, and
`module:object` names one of your own. Nothing here imports torch, so a typing error is reported at once.
"""

import importlib
import os
import sys
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, model_validator
from pydantic_core import PydanticCustomError

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
ShareOrZero = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]

OWN = "module:object"
"""The tag of a choice that is the user's own."""


def only_with(**needs: list[Any]) -> Any:
    """Metadata of a key that has a meaning with some values of other keys alone; with others it keeps its default."""
    extra: Any = {"only_with": needs}
    return Field(json_schema_extra=extra)


class Section(BaseModel):
    """A part of the configuration: immutable, exact types, no unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    implementation: ClassVar[str] = ""
    """`module:class` of what `build` makes: a subclass, or a class that takes this section's keys."""

    @model_validator(mode="after")
    def _keys_apply(self) -> Self:
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            needs: Any = extra.get("only_with", {}) if isinstance(extra, dict) else {}
            for other, wanted in needs.items():
                has = getattr(self, other)
                if has not in wanted and getattr(self, name) != field.default:
                    context = {"field": name, "value": getattr(self, name), "other": other, "has": has}
                    raise PydanticCustomError(
                        "only_with", "{field} needs another {other}", context | {"wanted": wanted}
                    )
        return self

    def keys(self) -> dict[str, Any]:
        """The section's keys with their values, without the choice itself."""
        return {name: value for name, value in self if name not in ("name", "kind")}

    def build(self, **context: Any) -> Any:
        """The component that the section describes.

        Args:
            context: what a component needs besides its settings; each takes what it has a use for.
        """
        made = imported(self.implementation)
        if issubclass(made, Section):
            context = {name: value for name, value in context.items() if name in made.model_fields}
        return made(**self.keys(), **context)


class Own(Section):
    """One of your own: `name` is `module:object`, other keys are its arguments."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(pattern=r"^[^:\s]+:[^:\s]+$")]
    """The object to import: an instance, or a class or function that makes one from the section's other keys."""

    def keys(self) -> dict[str, Any]:
        """The section's other keys."""
        return dict(self.__pydantic_extra__ or {})

    def build(self, **context: Any) -> Any:
        """The object itself, or what it makes; ValueError where it cannot be imported or made."""
        found, keys = imported(self.name), self.keys()
        if not isinstance(found, type) and not keys:
            return found
        try:
            return found(**keys)
        except TypeError as error:
            raise ValueError(f"{self.name} cannot be made from {sorted(keys) or 'no keys'}: {error}") from None


def imported(name: str) -> Any:
    """The object of `module:object`, from the current folder or the installed packages; ValueError if there is none."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} could not be imported ({error}); run from the folder of its module") from None
    return found


def chosen_by(key: str, default: str) -> Discriminator:
    """What tells a section's classes apart: the value of `key`, `default` where it is absent."""

    def tag(value: Any) -> Any:
        name = value.get(key, default) if isinstance(value, dict) else getattr(value, key, None)
        return OWN if isinstance(name, str) and ":" in name else name

    return Discriminator(tag, custom_error_type="choice", custom_error_message="unknown choice")


def choices_of(annotation: Any) -> dict[str, type[Section]]:
    """The classes of a section by the choice that they stand for; a section without a choice has one, called ""."""
    if isinstance(annotation, type):
        return {"": annotation}
    found: dict[str, type[Section]] = {}
    for part in get_args(annotation):
        if isinstance(part, type) and issubclass(part, Section):
            found[OWN if issubclass(part, Own) else _name_of(part)] = part
        elif get_args(part):
            found |= choices_of(part)
    return found


def fields_of(section: type[BaseModel]) -> dict[str, Any]:
    """The section's keys in the order that a reader wants: the choice, its own, then those that it shares."""
    own = [name for part in section.__mro__ for name in vars(part).get("__annotations__", {})]
    order = dict.fromkeys(name for name in ("name", "kind", *own) if name in section.model_fields)
    return {name: section.model_fields[name] for name in order}


def key_of(annotation: Any) -> str:
    """The key by which a section's class is chosen, "" where there is no choice."""
    classes = choices_of(annotation)
    if "" in classes:
        return ""
    return "kind" if "kind" in next(iter(classes.values())).model_fields else "name"


def _name_of(section: type[Section]) -> str:
    return section.model_fields["kind" if "kind" in section.model_fields else "name"].default


def or_none(value: float | None) -> str:
    """The value, or `none` in words."""
    return "none" if value is None else str(value)
