"""The settings of a run without what belongs to the machine that it ran on: folders, addresses and hosts.

Of a file its name is kept, so that a reader knows what to put in its place.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from adascope_fast.config import Config, ConfigError

ADDRESS = re.compile(r"\w+://\S+|\b[\w-]+(\.[\w-]+)*:\d{2,5}\b|\b\d{1,3}(\.\d{1,3}){3}\b")
PATH = re.compile(r"""(?<![\w.-])(?:~\w*|\.{1,2}|[A-Za-z]:)?[\\/][^\s,;'"]*""")
FILES = {".txt", ".jsonl", ".csv", ".tsv", ".parquet", ".safetensors", ".json", ".toml", ".py"}
HOSTS = {"url", "host", "port"}
"""Keys that say where a server is; their defaults stand for them."""


def settings_shown(config: Config, *, name: str, base: str, folder: Path) -> tuple[Config, list[str]]:
    """The configuration to publish, and `section.key` of what was left out of it.

    Args:
        name: of what is published; the folder of a run that repeats it is called so.
        base: the repository or embedded model that stands for `model.name`.
        folder: of the run; a relative path may be seen from a folder above it, where the run was started.
    """
    shown = _Shown([Path.cwd(), *folder.resolve().parents])
    values = config.model_dump(exclude_none=True)
    if base != values["model"]["name"]:
        values["model"] = {key: value for key, value in values["model"].items() if key not in OF_A_PLACE}
        values["model"]["name"] = base
    values["run"]["folder"] = f"runs/{name}"
    for section, fields in values.items():
        kept = {"folder"} if section == "run" else {"name"} if section == "model" else set()
        found = {key: value if key in kept else shown.of(f"{section}.{key}", value) for key, value in fields.items()}
        values[section] = {key: value for key, value in found.items() if value is not None}
    try:
        return Config.of(values), shown.left_out
    except ConfigError as error:
        raise ConfigError(
            f"without the places of {', '.join(shown.left_out)} the run's settings cannot be read again ({error}); "
            f"name files and folders so that their names tell them apart"
        ) from None


def _last(path: str) -> str:
    return (PureWindowsPath(path) if "\\" in path else PurePosixPath(path)).name.strip("~") or "PATH"


def without_places(text: str, name: Callable[[str], str] = _last) -> str:
    """The same with a word for each address and, for each absolute path in it, its `name`."""
    return PATH.sub(lambda found: name(found[0]), ADDRESS.sub("ADDRESS", text))


OF_A_PLACE = ("base", "revision", "variant")
"""Keys of a model that hold for the place it was loaded from."""


class _Shown:
    """Values as they can be published."""

    def __init__(self, near: Sequence[Path]) -> None:
        self._near, self.left_out = near, []
        self._names: dict[str, str] = {}

    def of(self, key: str, value: Any) -> Any:
        """The value without places; None for one whose default is to stand for it."""
        if isinstance(value, dict):
            found = {name: self.of(f"{key}.{name}", inner) for name, inner in value.items()}
            return {name: inner for name, inner in found.items() if inner is not None}
        if isinstance(value, list | tuple):
            return [inner for one in value if (inner := self.of(key, one)) is not None]
        last = key.rpartition(".")[2]
        if last in HOSTS:
            self._leave_out(key)
            return None
        if not isinstance(value, str):
            return value
        text = without_places(value, lambda path: self._name(last, path))
        if text == value and self._is_file(value):
            text = self._name(last, value)
        if text != value:
            self._leave_out(key)
        return text

    def _is_file(self, text: str) -> bool:
        """Whether it is a path of several names: of what is there, or that no repository has."""
        if "/" not in text and "\\" not in text:
            return False
        if text.count("/") > 1 or Path(text).suffix.lower() in FILES:
            return True
        try:
            return any((folder / text).exists() for folder in self._near)
        except OSError:  # too long a name
            return False

    def _name(self, key: str, path: str) -> str:
        """The last name of a path, with that of its key before it where another path has the same."""
        name = _last(path)
        if self._names.setdefault(name, path) != path:
            name = f"{key}-{name}"
        return name

    def _leave_out(self, key: str) -> None:
        if key not in self.left_out:
            self.left_out.append(key)
