"""Every relative link of the repository's pages resolves, with its anchor; every command has its place in the pages."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
FOLDERS = ("bench", "configs", "docs", "examples", "experiments", "kernels")
PAGES = sorted([*CHECKOUT.glob("*.md"), *(page for name in FOLDERS for page in (CHECKOUT / name).rglob("*.md"))])

_FENCE = re.compile(r"^(```|~~~).*?^\1", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def _text(page: Path) -> str:
    """The page without its blocks of code, whose brackets are no links and whose comments are no headings."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def _anchors(page: Path) -> Iterator[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    for heading in re.findall(r"^#+ (.*)$", _text(page), flags=re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(CHECKOUT).as_posix())
def test_relative_links_resolve(page: Path):
    broken = []
    for link in _LINK.findall(_text(page)):
        if re.match(r"\w+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert not broken


def test_headings_of_a_page_differ():
    """Two equal headings would have anchors that GitHub and MkDocs number in different ways."""
    for page in PAGES:
        anchors = list(_anchors(page))
        if page.name != "CHANGELOG.md":  # its form repeats Added and Changed for each version
            assert len(anchors) == len(set(anchors)), page


def test_every_page_is_reached_from_the_readme():
    reached, new = set(), {CHECKOUT / "README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        for link in _LINK.findall(_text(page)):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target not in reached and target.exists():
                new.add(target)
    assert {page for page in PAGES if page.is_relative_to(CHECKOUT / "docs")} <= reached


def test_every_command_is_documented():
    shown = subprocess.run(
        [sys.executable, "-m", "adascope_fast.cli", "--help"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    ).stdout
    commands = re.findall(r"^  (\w+)  ", shown.partition("Commands:")[2], flags=re.MULTILINE)
    described = (CHECKOUT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert commands
    assert [command for command in commands if f"| `{command}" not in described] == []
