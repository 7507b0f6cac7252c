"""The licence of a base model, as its own files or its card on the Hub say it; nothing is guessed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, metadata_load

from adascope_fast.backbones.settings import EMBEDDED_NAMES

FILES = ("LICENSE*", "LICENCE*", "COPYING*")
MOST_BYTES = 2**20
"""Of a licence file."""


@dataclass(frozen=True)
class Licence:
    """What a card says of the licence of its base.

    Args:
        identifier: as the Hub knows it; "other" for one that it has no name for, or that is not known.
        name, link: of another licence.
        file: its text, which is published beside the weights.
        is_known: whether the base says it.
    """

    identifier: str = "other"
    name: str | None = None
    link: str | None = None
    file: Path | None = None
    is_known: bool = False

    def metadata(self) -> dict[str, Any]:
        """The keys of a card."""
        link = self.file.name if self.file is not None and self.link is None else self.link
        return {"license": self.identifier, "license_name": self.name, "license_link": link}


def licence_of(base: str, folder: Path | None = None, *, revision: str | None = None) -> Licence:
    """What an embedded model, a folder of a pipeline, or else the card of a repository says.

    Args:
        base: the embedded model or repository.
        folder: where the base lies here, if it does; what its files say goes first.
        revision: of the repository.
    """
    if base in EMBEDDED_NAMES:
        return Licence("apache-2.0", is_known=True)
    found, file = _of_card(folder / "README.md", base) if folder is not None else Licence(), _file(folder)
    if not found.is_known:
        found = _of_card(_card_on_hub(base, revision), base)
    if file is None:
        return found
    return Licence(found.identifier, found.name, found.link, file, is_known=True)


def _card_on_hub(base: str, revision: str | None) -> Path | None:
    """The repository's README.md, downloaded or from the cache; None where neither can be had."""
    try:
        return Path(hf_hub_download(base, "README.md", revision=revision))
    except Exception:  # no network, no such file, no access: of several libraries
        return None


def _of_card(card: Path | None, base: str) -> Licence:
    try:
        metadata: Any = metadata_load(card) if card is not None and card.is_file() else None
    except Exception:  # a head that is no YAML, or no text
        metadata = None
    told = metadata if isinstance(metadata, Mapping) else {}
    identifier, name, link = (told.get(key) for key in ("license", "license_name", "license_link"))
    if not isinstance(identifier, str) or not identifier:
        return Licence()
    link = link if isinstance(link, str) else None
    if link is not None and "://" not in link:
        link = f"https://huggingface.co/{base}/blob/main/{link}"
    return Licence(identifier, name if isinstance(name, str) else None, link, is_known=True)


def _file(folder: Path | None) -> Path | None:
    if folder is None or not folder.is_dir():
        return None
    found = sorted(path for pattern in FILES for path in folder.glob(pattern))
    return next((path for path in found if path.is_file() and path.stat().st_size <= MOST_BYTES), None)
