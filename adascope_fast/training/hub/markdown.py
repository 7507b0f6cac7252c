"""Model cards as text: the metadata that the Hub reads, tables, and the words of others, which stay words."""

import html
import re
from collections.abc import Iterable, Sequence

from huggingface_hub import ModelCardData

SPECIAL = re.compile(r"([\\`*_{}\[\]|~$@]|:(?=//)|(?<=www)\.)")
AT_BEGINNING = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$))|(?=[-+=#]))")
"""Where a list, a heading or a rule would begin."""
MOST_SHOWN = 200
"""Characters of a text of others."""


def card(data: ModelCardData, lines: Iterable[str]) -> str:
    """The text of a README.md."""
    return "\n".join(["---", data.to_yaml(), "---", "", *lines, ""])


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; the cells are Markdown already."""
    return [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows)]


def escaped(text: object) -> str:
    """A text on one line that neither Markdown nor HTML makes anything of; a long one is cut."""
    words = " ".join(str(text).split())
    shown = words if len(words) <= MOST_SHOWN else words[: MOST_SHOWN - 3] + "..."
    return html.escape(AT_BEGINNING.sub(r"\1\\", SPECIAL.sub(r"\\\1", shown)), quote=False)
