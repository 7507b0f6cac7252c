"""The import rule: a module sees only what lies below it, so that it can be read, and replaced, on its own."""

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

_TABLES = {"trajectory", "schedules", "ops"}
_ENGINE = {
    "acceleration",
    "settings",
    "update_statistics",
    "ode_tail",
    "one_pass",
    "per_sample",
    "scoring",
    "adascope",
    "algorithms",
    "attribution",
    "backbones",
    "rewards",
    "rollout",
    "sensing",
    "theory",
    "timesteps",
} | _TABLES
_TRAIN = _ENGINE | {
    "advantages",
    "building",
    "checkpoint",
    "config",
    "engine",
    "evaluation",
    "metrics",
    "objectives",
    "progress",
    "prompts",
    "reporting",
    "runs",
}
# What each module or folder of the package may import from the package, whether at its top or inside a function.
BELOW: dict[str, set[str]] = {
    "config_source": set(),
    "config_types": set(),
    "config_sections": {"config_types"},
    "config_selection": {"config_types"},
    "config": {"config_sections", "config_selection", "config_source", "config_types"},
    "building": _ENGINE | {"attribution", "config", "decoders", "windows"},
    "installation": set(),
    "loading": set(),
    "decoders": {"loading"},
    "checkpoint": {"loading"},
    "kernels": set(),
    "reference_rows": set(),
    "reference_correlation": {"reference_rows"},
    "reference_transition": {"reference_correlation", "reference_rows"},
    "reference_policy": {"reference_transition"},
    "reference": {"reference_correlation", "reference_policy", "reference_transition"},
    "processes": set(),
    "schedules": {"processes"},
    "ode_tail": {"schedules"},
    "prompts": set(),
    "trajectory": {"schedules"},
    "ops": {"kernels", "reference"},
    "backbones": {"loading", "ops", "schedules", "trajectory"},
    "rewards": {"loading", "prompts"},
    "metrics": {"prompts", "rewards"},
    "reporting": set(),
    "acceleration": set(),
    "settings": {"algorithms"},
    "update_statistics": set(),
    "per_sample": {"backbones"},
    "scoring": {"backbones"},
    "one_pass": {"backbones", "ops", "per_sample", "rollout"},
    "objectives": _TABLES,
    "advantages": _TABLES,
    "attribution": {"trajectory"},
    "timesteps": _TABLES | {"theory"},
    "windows": _TABLES | {"timesteps"},
    "sensing": _TABLES,
    "theory": _TABLES,
    "curves": set(),
    "causal": set(),
    "ranks": set(),
    "interval_rule": {"causal", "curves"},
    "rollout": _TABLES | {"backbones", "ode_tail"},
    "adascope": _TABLES | {"causal", "curves", "interval_rule", "ranks", "sensing", "theory", "timesteps"},
    "algorithms": _TABLES | {"advantages", "attribution", "backbones", "objectives", "rollout"},
    "engine": _ENGINE,
    "evaluation": {"backbones", "rollout", "schedules"},
    "progress": set(),
    "runs": {"checkpoint", "config"},
    "sampling": {"backbones", "checkpoint", "config", "rollout"},
    "export": {"backbones", "config", "sampling"},
    "metering": set(),
    "plan": {"backbones", "config", "engine", "metering"},
    "plan_check": {"backbones", "config", "plan"},
    "train": _TRAIN,
    "calibration": _TRAIN | {"curves", "theory", "train"},
    "pretraining": {"backbones", "checkpoint", "prompts", "rewards"},
}
ENTRANCES = {"__init__", "__main__", "cli"}  # these may import anything but compat
THIRD_PARTIES = {
    "config": {"pydantic", "tomli_w"},
    "config_sections": {"pydantic"},
    "config_selection": {"pydantic"},
    "config_types": {"pydantic"},
    "config_source": {"pydantic"},
    "kernels": {"torch", "triton"},
    "reference_correlation": {"torch", "jaxtyping"},
    "reference_policy": {"torch", "jaxtyping"},
    "reference_rows": {"torch"},
    "reference_transition": {"torch", "jaxtyping"},
    "processes": {"torch", "jaxtyping"},
    "schedules": {"torch", "jaxtyping"},
    "trajectory": {"torch", "jaxtyping"},
}


def _imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it; relative ones in full; names given to `import_module` too."""
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    parents = parts if path.name != "__init__.py" else (*parts[:-1], "")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parents[: -node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"adascope_fast(\.\w+)+\.?", str(node.value)):
            yield str(node.value)


def _modules() -> dict[str, set[str]]:
    """Every module or folder directly in the package, and all names imported by its files."""
    found: dict[str, set[str]] = {}
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]:  # rglob does not enter a symlink
        name = Path(path.relative_to(PACKAGE).parts[0]).stem
        found.setdefault(name, set()).update(_imports(path))
    return found


MODULES = _modules()


@pytest.mark.parametrize("module", sorted(MODULES.keys() - ENTRANCES - {"compat"}))
def test_imports_point_downward(module: str):
    assert module in BELOW, f"adascope_fast.{module} is new: say in BELOW what it may import"
    ours = {name.split(".")[1] for name in MODULES[module] if name.startswith("adascope_fast.")}
    assert ours - {module} <= BELOW[module], f"adascope_fast.{module} imports what is not below it"


def test_the_rule_has_no_cycle_and_one_door_to_the_kernels():
    TopologicalSorter(BELOW).prepare()
    assert [module for module, below in BELOW.items() if "kernels" in below] == ["ops"]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_imports_compat(module: str):
    assert module == "compat" or not [name for name in MODULES[module] if name.startswith("adascope_fast.compat")]


@pytest.mark.parametrize("module", sorted(MODULES.keys() & THIRD_PARTIES.keys()))
def test_foundations_need_little(module: str):
    others = {name.split(".")[0] for name in MODULES[module]} - set(sys.stdlib_module_names) - {"adascope_fast"}
    assert others <= THIRD_PARTIES[module]


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
