"""What every section of the configuration has in common: exact types with bounds, no unknown keys, a choice by name.

A component's settings class is its section: it declares each key once, with its default, its meaning and its check, and
the component takes the same names. Where a section offers a choice, `name` (or `kind`) says which class it is, and
`module:object` names one of your own. Nothing here imports torch, so a typing error is reported at once.

Every number has an upper bound, far beyond what can be meant: a slip of the keyboard is told before anything is loaded,
and not as an overflow or a memory that runs out in its middle.
"""

import difflib
import importlib
import inspect
import os
import re
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, model_validator
from pydantic_core import PydanticCustomError

SMALLEST = 2.0**-126
"""The least normal number of float32, which the training computes in."""


_CONTROL = r"\x00-\x1f\x7f-\x9f"
_SURROGATES = r"\ud800-\udfff"
UNPRINTABLE = re.compile(rf"[{_CONTROL}{_SURROGATES}\u2028\u2029]")
"""What no name can have: control characters, ends of lines, bytes that were not UTF-8 (as surrogates)."""


def unprintable(text: str, allowed: str = "") -> str | None:
    """The first such character of `text` as `U+0000`, but for those allowed; None where there is none."""
    found = next((match[0] for match in UNPRINTABLE.finditer(text) if match[0] not in allowed), None)
    return None if found is None else f"U+{ord(found):04X}"


def one_line(text: str) -> str:
    """The same on one line, with escapes in place of what no name can have."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def show(value: Any) -> str:
    """`value` as TOML would spell it, in one line of at most 60 characters."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, str):
        text = '"' + one_line(value[:100]) + '"'
    elif isinstance(value, int):
        text = str(value) if value.bit_length() < MOST_BITS else f"a whole number of {value.bit_length()} bits"
    elif isinstance(value, list):
        text = "[" + ", ".join(show(item) for item in value[:100]) + "]"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{name} = {show(item)}" for name, item in value.items()) + "}"
    else:
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


MOST_BITS = sys.int_info.default_max_str_digits * 3  # Python refuses to write longer ones in decimal


def _printable(text: str) -> str:
    if bad := unprintable(text):
        raise PydanticCustomError("unprintable", "control character", {"character": bad})
    return text


def _not_vanishing(value: float) -> float:
    if 0 < value < SMALLEST:
        raise PydanticCustomError("vanishing", "zero in float32", {"least": SMALLEST})
    return value


MOST_IMAGES = 1_000_000
MOST_STEPS = 10_000
MOST_GUIDANCE = 1000
LARGEST_SEED = 2**32 - 1

Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_printable)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
CountOrZero = Annotated[int, Field(ge=0, le=1_000_000_000)]
Images = Annotated[int, Field(ge=1, le=MOST_IMAGES)]
"""Prompts, images or (image, step) pairs."""
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
"""Denoising steps."""
Width = Annotated[int, Field(ge=1, le=65_536)]
"""Units of a layer, the rank of a matrix, tokens of a prompt."""
Pixels = Annotated[int, Field(ge=8, le=16_384)]
"""Side of an image."""
Seed = Annotated[int, Field(ge=0, lt=LARGEST_SEED + 1)]
"""NumPy's seeds have 32 bits."""
Positive = Annotated[float, Field(gt=0, le=1e12), AfterValidator(_not_vanishing)]
PositiveOrZero = Annotated[float, Field(ge=0, le=1e12), AfterValidator(_not_vanishing)]
Guidance = Annotated[float, Field(ge=0, le=MOST_GUIDANCE)]
LearningRate = Annotated[float, Field(gt=0, le=10), AfterValidator(_not_vanishing)]
Share = Annotated[float, Field(gt=0, le=1)]
ShareOrZero = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]

OWN = "module:object"
"""The tag of a choice that is the user's own."""


def only_with(**needs: list[Any]) -> Any:
    """Metadata of a key that has a meaning with some values of other keys alone; with others it keeps its default."""
    extra: Any = {"only_with": needs}
    return Field(json_schema_extra=extra)


def needs(field: Any) -> dict[str, list[Any]]:
    """The other keys that a key has a meaning with, and their values; empty where it has one always."""
    extra = field.json_schema_extra
    return extra.get("only_with", {}) if isinstance(extra, dict) else {}


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
            for other, wanted in needs(field).items():
                has = getattr(self, other)
                if has not in wanted and getattr(self, name) != field.default:
                    context = {"field": name, "value": getattr(self, name), "other": other, "has": has}
                    raise PydanticCustomError(
                        "only_with", "{field} needs another {other}", context | {"wanted": wanted}
                    )
        return self

    def examine(self) -> None:
        """ValueError where what the section names is not there, as far as that is told without importing torch."""

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

    named_by: ClassVar[str] = "name"
    """The key that names it in a configuration, for what is said of it."""

    name: Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*$", max_length=200)]
    """The object to import: an instance, or a class or function that makes one from the section's other keys."""

    def keys(self) -> dict[str, Any]:
        """The section's other keys."""
        return dict(self.__pydantic_extra__ or {})

    def examine(self) -> None:
        """ValueError where it cannot be imported, or does not take the keys; its own module may import torch."""
        found, keys = imported(self.name, self.named_by), self.keys()
        if not isinstance(found, type) and not keys:
            return
        try:
            signature = inspect.signature(found)
        except (TypeError, ValueError):  # written in C, or no function: it is told when it is made
            return
        try:
            signature.bind(**keys)
        except TypeError as error:
            raise ValueError(self._not_made(f"TypeError: {error}")) from None

    def build(self, **context: Any) -> Any:
        """The object itself, or what it makes; ValueError where it cannot be imported or made, whatever it raised."""
        found, keys = imported(self.name, self.named_by), self.keys()
        if not isinstance(found, type) and not keys:
            return found
        try:
            return found(**keys)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise ValueError(self._not_made(blamed(error))) from error

    def _not_made(self, why: str) -> str:
        given = ", ".join(sorted(self.keys())) or "no keys"
        return (
            f'{self.named_by} = "{self.name}" could not be made from {given}: {why}; give what it takes, or correct it'
        )


def imported(name: str, key: str = "name") -> Any:
    """The object of `module:object`, from the current folder or the installed packages.

    Args:
        key: what names it in a configuration.

    Raises:
        ValueError: there is none, or its module raised anything as it was imported, `sys.exit` included.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    failed = f'{key} = "{name}" could not be imported'
    try:
        found = importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if module.startswith("adascope_fast."):
            raise
        if isinstance(error, ModuleNotFoundError) and error.name:
            if f"{module}.".startswith(f"{error.name}."):
                step = "run from the folder of its module, or install it"
                if module.endswith(".py"):
                    step = f'leave out the .py, as in "{module.removesuffix(".py")}:{attribute}"'
                raise ValueError(f"{failed}: there is no module {error.name}; {step}") from error
            raise ValueError(
                f"{failed}: its module {module} raised {blamed(error)}; install {error.name}, or correct the import"
            ) from error
        raise ValueError(f"{failed}: its module {module} raised {blamed(error)}; correct it there") from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            near = difflib.get_close_matches(part, getattr(found, "__dict__", {}), n=1)
            step = f"did you mean {near[0]}?" if near else "check the name behind the colon"
            place = getattr(found, "__file__", None) or module
            why = "" if isinstance(error, AttributeError) else f" ({blamed(error)})"
            raise ValueError(f"{failed}: {_near(str(place))} has no {part}{why}; {step}") from error
    return found


def blamed(error: BaseException) -> str:
    """What was raised and where, in one line: `ZeroDivisionError: division by zero at mine.py:12 (score)`.

    The place is the innermost one in the user's own code: neither in this package nor among the installed ones, unless
    nothing else is on the way.
    """
    try:
        said = " ".join(str(error).split())
    except Exception:
        said = "(its message could not be made)"
    said = said if len(said) <= 300 else said[:297] + "..."
    kind = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{kind}: {error.msg} at {_near(error.filename)}:{error.lineno}"
    said = f"{kind}: {said}" if said else kind
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen ") and not Path(frame.filename).is_relative_to(_PACKAGE)
    ]
    own = [frame for frame in frames if not any(Path(frame.filename).is_relative_to(place) for place in _INSTALLED)]
    if not frames:
        return said
    frame = (own or frames)[-1]
    return f"{said} at {_near(frame.filename)}:{frame.lineno} ({frame.name})"


_PACKAGE = Path(__file__).parent
_INSTALLED = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]


def _near(file: str) -> str:
    """A file's path as seen from the current folder, where it lies in it."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


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
