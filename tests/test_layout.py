"""The architecture: which room of the package may import which, so that each can be read, and replaced, on its own.

A room is a folder of the package or a module in its root. Arrows point downward only. A folder's `settings.py`, its
section of the configuration, is a room of its own below all others: the configuration imports it, and it imports
nothing but the root module `settings`.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PACKAGE = CHECKOUT / "adascope_fast"
# Python files; `__init__.py` and `settings.py` of a folder not counted, nor `commands`, which has a file a command.
MOST_IN_ROOT, MOST_IN_FOLDER = 8, 12

_LATENTS = {"backbone", "distributed", "ops", "rollout", "schedules"}
_ITERATION = _LATENTS | {
    "adascope",
    "algorithms",
    "backbones",
    "distributed",
    "engine",
    "rewards",
    "selectors",
    "theory",
}
_TRAINING = _ITERATION | {
    "config",
    "remote_rollout",
    "loading",
    "metrics",
    "preferences",
    "prompts",
    "reporting",
    "weights",
}
# What each room may import from the package, in any line of any of its files. Everyone may import what is in GROUND.
GROUND = {"lazy", "settings"}
BELOW: dict[str, set[str]] = {
    "settings": set(),
    "lazy": set(),
    "loading": {"distributed"},
    "kernels": set(),
    "reference": set(),
    "ops": {"kernels", "reference"},
    "schedules": set(),
    "backbone": {"distributed", "schedules"},
    "distributed": set(),
    "prompts": set(),
    "reporting": {"config"},
    "rollout": {"backbone", "distributed", "ops", "reference", "schedules"},
    "theory": {"ops", "rollout", "schedules"},
    "selectors": _LATENTS | {"theory"},
    "adascope": _LATENTS | {"distributed", "loading", "selectors", "theory"},
    "preferences": _LATENTS | {"loading", "prompts", "reference"},
    "algorithms": _LATENTS | {"loading", "preferences", "reference"},
    "backbones": {"backbone", "distributed", "loading", "ops", "schedules"},
    "weights": {"loading"},
    "serving": set(),
    "images": set(),
    "judging": {"images", "reporting", "serving"},
    "rewards": {"backbone", "judging", "loading", "prompts", "serving", "weights"},
    "metrics": {"loading", "prompts", "rewards", "weights"},
    "comparison": _TRAINING | {"images", "training"},
    "engine": _LATENTS | {"adascope", "algorithms", "backbones", "distributed", "reference", "selectors", "theory"},
    "remote_rollout": _LATENTS | {"backbones", "engine", "reference", "serving"},
    "config": set(),
    "training": _TRAINING | {"serving.settings"},  # which keys a resumed run may have otherwise
    "planning": _TRAINING | {"training"},
    "pretraining": _TRAINING | {"preferences", "training"},
    "commands": _TRAINING
    | {"comparison", "images", "judging", "planning", "preferences", "pretraining", "serving", "training"},
    "cli": {"commands"},
    "__init__": _TRAINING | {"compat", "training"},
}
# What these rooms may import besides; the others take what they need.
THIRD_PARTIES = {
    "settings": {"pydantic", "pydantic_core"},
    "lazy": {"torch"},  # its version, in an error
    "kernels": {"torch", "triton"},
    "reference": {"jaxtyping", "torch"},
    "schedules": {"jaxtyping", "torch"},
    "ops": {"torch"},
    "backbone": {"jaxtyping", "torch"},
    "rollout": {"jaxtyping", "torch"},
    "config": {"pydantic", "tomli_w"},
}


def _files() -> list[Path]:
    return [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]  # rglob does not enter a symlink


def _room(path: Path) -> str:
    """`folder`, `folder.settings`, or the name of a module in the root."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts) if len(parts) == 2 and parts[1] == "settings" else parts[0]


def _room_of_name(name: str) -> str:
    """The room of `adascope_fast.folder.module.anything`."""
    first, *rest = name.split(".")[1:]
    return f"{first}.settings" if rest[:1] == ["settings"] and (PACKAGE / first / "settings.py").exists() else first


def _imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it, relative ones in full, and those given to `lazy`."""
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    package = parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join(filter(None, (*base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "lazy":
            assert isinstance(node.args[1], ast.Dict), f"{path}: this test reads only a dict written into the call"
            homes = ast.literal_eval(node.args[1])
            yield from (f"{'.'.join(package)}.{home}" for home in homes.values())
        elif isinstance(node, ast.Constant) and re.fullmatch(r"adascope_fast(\.\w+)+\.?", str(node.value)):
            yield str(node.value).removesuffix(".")  # for `import_module`: the last name may be yet to come


def _arrows() -> dict[str, dict[str, set[str]]]:
    """For each room, each room that it imports, and the files that do."""
    found: dict[str, dict[str, set[str]]] = {}
    for path in _files():
        arrows = found.setdefault(_room(path), {})
        for name in _imports(path):
            if name.split(".")[0] == "adascope_fast":
                target = _room_of_name(name) if "." in name else "adascope_fast"
                arrows.setdefault(target, set()).add(path.relative_to(PACKAGE).as_posix())
        arrows.pop(_room(path), None)
    return found


ARROWS = _arrows()


def _allowed(room: str) -> set[str]:
    if room.endswith(".settings"):  # a section may rest on another; what it builds it names as "module:object"
        return {"settings"} | {one for one in ARROWS if one.endswith(".settings")}
    folders = BELOW[room] | {room}
    sections = {
        one for one in ARROWS if one.endswith(".settings") and (one.split(".")[0] in folders or room == "config")
    }
    return BELOW[room] | GROUND | sections if room not in GROUND else BELOW[room]


@pytest.mark.parametrize("room", sorted(ARROWS.keys() - {"compat"}))
def test_imports_point_downward(room: str):
    assert room in BELOW or room.endswith(".settings"), f"adascope_fast.{room} is new: say in BELOW what it may import"
    upward = {target: sorted(files) for target, files in ARROWS[room].items() if target not in _allowed(room)}
    assert not upward, f"adascope_fast.{room} imports what is not below it"


def test_the_rule_has_no_cycle_and_one_door_to_the_kernels():
    TopologicalSorter({room: _allowed(room) for room in BELOW}).prepare()
    assert [room for room, below in BELOW.items() if "kernels" in below] == ["ops"]


def test_there_is_no_cycle():
    TopologicalSorter(ARROWS).prepare()


def test_nothing_imports_compat():
    """But for the package's door, which has `wrap` among its public names."""
    inner = {room: arrows for room, arrows in ARROWS.items() if room not in ("compat", "__init__")}
    assert not [files for arrows in inner.values() for files in arrows.get("compat", ())]


@pytest.mark.parametrize("path", _files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_foundations_need_little(path: Path):
    room = _room(path)
    allowed = {"pydantic"} if room.endswith(".settings") else THIRD_PARTIES.get(room)
    if allowed is not None:
        others = {name.split(".")[0] for name in _imports(path)} - set(sys.stdlib_module_names) - {"adascope_fast"}
        assert others <= allowed


def test_the_configuration_and_every_section_are_read_without_torch():
    modules = [f"adascope_fast.{room}" for room in ARROWS if room == "config" or room.endswith("settings")]
    program = (
        "import sys\nfrom importlib import import_module\n"
        f"for module in {modules!r}:\n    import_module(module)\n"
        "    heavy = {'torch', 'diffusers', 'transformers'} & sys.modules.keys()\n    assert not heavy, (module, heavy)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_a_training_can_be_named_before_the_libraries_are_imported():
    """They take seven CPU seconds, and a mistake in what `Trainer` is given is told before."""
    heavy = "{'diffusers', 'transformers', 'torch.distributed.fsdp'}"
    program = f"import sys\nfrom adascope_fast import Trainer\nassert not {heavy} & sys.modules.keys()"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_a_room_is_small_enough_to_look_around_in():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_IN_ROOT
    for folder in (folder for folder in PACKAGE.iterdir() if folder.is_dir() and folder.name != "commands"):
        files = sorted(path.name for path in folder.glob("*.py") if path.name not in ("__init__.py", "settings.py"))
        assert len(files) <= MOST_IN_FOLDER, (folder.name, files)


def test_the_folder_of_kernels_hides_no_package():
    assert not (CHECKOUT / "kernels" / "__init__.py").exists()
    spec = find_spec("kernels")  # the package that others publish under this name, or the bare folder, or nothing
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(CHECKOUT)


def test_files_hold_no_absolute_machine_paths():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=CHECKOUT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    machine_path = re.compile(rb"(?<![\w.$}/-])/(?:work|root|home|Users|opt|mnt|srv)/")
    found = []
    for name in listed.stdout.decode().split("\0"):
        path = CHECKOUT / name
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            if b"\0" not in content and machine_path.search(content):
                found.append(name)
    assert not found
