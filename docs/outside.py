"""A hook of MkDocs: links from docs/ to the rest of the repository work in the built site as they do in a checkout.

What such a link names is copied into the site below `repository/`, pages and files alike, and so on for the links of
those pages. A link to a folder becomes one to its README, or plain text. MkDocs itself checks that every link and
anchor is there.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"\[(?P<text>[^\[\]]*)\]\((?!\w+:|#|/)(?P<place>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", flags=re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is linked to from docs/, directly or by way of another page."""
    pages = [place_of(file.src_uri) for file in files.documentation_pages()]
    while pages:
        page = pages.pop()
        for target in targets(page):
            uri = uri_of(target)
            if target.is_relative_to(DOCS) or not target.is_file() or files.get_file_from_path(uri):
                continue
            files.append(File.generated(config, uri, abs_src_path=str(target)))
            if target.suffix == ".md":
                pages.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links of a page to where things lie in the site."""
    place, here = place_of(page.file.src_uri), os.path.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = named(place, link["place"])
        if target.is_file():
            return f"[{link['text']}]({os.path.relpath(uri_of(target), here)}{link['anchor'] or ''})"
        return link["text"] if target.is_dir() else link[0]

    return LINK.sub(moved, markdown)


def targets(page: Path) -> list[Path]:
    """The files that a page links to, wherever they are."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [named(page, link["place"]) for link in LINK.finditer(text)]


def named(page: Path, link: str) -> Path:
    """What a page's link names: a file, or the README of a folder that has one."""
    target = (page.parent / link).resolve()
    return target / "README.md" if (target / "README.md").is_file() else target


def uri_of(path: Path) -> str:
    """Where a file of the repository lies in the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"repository/{path.relative_to(ROOT).as_posix()}"


def place_of(uri: str) -> Path:
    """The file of the repository that lies there."""
    outside = uri.removeprefix("repository/")
    return DOCS / uri if outside == uri else ROOT / outside
