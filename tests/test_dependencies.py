"""Whatever is imported is asked for: what another package happens to bring may be gone with its next release."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWN = {"adascope_fast", "bench", "experiments", "examples", "kernels"}
ELSEWHERE = {
    "pydantic_core": "pydantic asks for one release of it exactly, and shows its names in its own documentation",
    "trackio": "a tracker, told where log.trackers names it and it is not there",
    "trl": "measured and recorded in an environment of its own",
    "xformers": "an extra that has no build for CPUs",
}


def _declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return {_normal(re.split(r"[\[<>=;, ]", line)[0]) for line in [*project["dependencies"], *extras]}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _imported() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in ("adascope_fast", "kernels", "tests", "bench", "examples", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                found |= {name.partition(".")[0]: path for name in names}
    return found


def _is_a_neighbour(name: str) -> bool:
    """Whether a script imports its neighbour."""
    folders = [ROOT / folder for folder in ("tests", "bench", "experiments", "docs")]
    return any(next(folder.rglob(pattern), None) for folder in folders for pattern in (f"{name}.py", f"{name}/*.py"))


def test_every_package_that_is_imported_is_a_declared_dependency() -> None:
    declared, providers = _declared(), packages_distributions()
    others = {
        name: path
        for name, path in _imported().items()
        if name not in sys.stdlib_module_names and name not in OWN | ELSEWHERE.keys() and not _is_a_neighbour(name)
    }
    assert len(others) > 15
    missing = {
        name: str(path.relative_to(ROOT))
        for name, path in others.items()
        if not declared & {_normal(one) for one in providers.get(name, [name])}
    }
    assert not missing
