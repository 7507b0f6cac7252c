"""The lower bounds of pyproject.toml are those that `make test-lowest` tries."""

import re
import tomllib
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


def test_each_bound_is_the_version_that_was_tried():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    stated = {}
    extras = project["optional-dependencies"]
    own, *tools = extras["dev"]
    named = re.fullmatch(r"adascope-fast\[(.+)\]", own)
    assert named, "dev has the extras that tests need first"
    of_extras = [requirement for extra in named[1].split(",") for requirement in extras[extra]]
    for requirement in [*project["dependencies"], *tools, *of_extras]:
        match = re.match(r"([\w.-]+)[>=]=([\w.]+)(?:[ ,;]|$)", requirement)
        assert match, f"{requirement} has no lower bound"
        stated[match[1]] = match[2]
    lines = (CHECKOUT / ".ci" / "lowest.txt").read_text().splitlines()
    tried = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert stated == tried
