"""A set of preferences: a folder with `preferences.jsonl` or `labelled.jsonl`, and the pictures that its lines name.

`preferences.jsonl` has a pair a line, `{"prompt": ..., "chosen": "a.png", "rejected": "b.png"}`, with
`chosen_score` and `rejected_score` if there are any; `labelled.jsonl` a picture a line,
`{"prompt": ..., "image": "a.png", "label": true}`, with `score` if there is one. Other keys are not used. Pictures are
PNG, JPEG or WebP by paths relative to the folder, which they may not leave. Nothing but pixels and JSON is read.

Nothing here imports torch, so a mistake is told at once. The first `LOOKED_AT` pictures are decoded when a set is read,
of the others the headers: damage behind one is told when the picture is drawn.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image, ImageOps

from adascope_fast import prompts
from adascope_fast.preferences.folders import MAKE, folder_of

PAIRS, LABELLED = "preferences.jsonl", "labelled.jsonl"
FORMATS = ("PNG", "JPEG", "WEBP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
LOOKED_AT = 2000
MOST_SIDE = 16_384
MOST_ASPECT = 2.0


@dataclass(frozen=True)
class StoredImage:
    """A picture of a set, as its header describes it."""

    path: Path
    where: str
    """What an error calls it."""
    width: int
    height: int
    num_bytes: int

    def pixels(self, side: int) -> np.ndarray:
        """The middle square [side, side, 3] in 8 bits: cut, then resized by a bilinear filter as wide as the scale.

        Transparent pictures are laid on white. ValueError where the picture is damaged.
        """
        try:
            with _opened(self.path) as image:
                upright: Any = ImageOps.exif_transpose(image)
                if "A" in upright.mode or "transparency" in upright.info:
                    upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
                upright = upright.convert("RGB")
        except Exception as error:  # a damaged file may raise anything
            raise _damaged(self.where, error) from None
        width, height = upright.size
        least = min(width, height)
        left, top = (width - least) / 2, (height - least) / 2
        box = (left, top, left + least, top + least)
        return np.asarray(upright.resize((side, side), Image.Resampling.BILINEAR, box=box))


@dataclass(frozen=True)
class Pair:
    """Two pictures of a prompt, one of them preferred."""

    prompt: str
    chosen: StoredImage
    rejected: StoredImage


@dataclass(frozen=True)
class Judged:
    """A picture of a prompt, liked or not."""

    prompt: str
    image: StoredImage
    is_liked: bool


Record = TypeVar("Record", Pair, Judged)


@dataclass(frozen=True)
class PreferenceSet(Generic[Record]):
    """The records of a folder, in the order of their lines."""

    folder: Path
    records: Sequence[Record]
    text: str
    """Of the file that lists them."""

    @property
    def prompts(self) -> list[str]:
        """The prompt of each record."""
        return [record.prompt for record in self.records]

    @property
    def name(self) -> str:
        """How many records of which kind, and the first one's prompt."""
        what = "pair" if isinstance(self.records[0], Pair) else "labelled picture"
        return f"{len(self.records)} {what}{'s' * (len(self.records) != 1)}, {self.prompts[0]!r:.60} first"

    @property
    def digest(self) -> str:
        """SHA-256 of the list and of the pictures' sizes."""
        sizes = [[one.width, one.height, one.num_bytes] for one in self._images()]
        return hashlib.sha256(json.dumps([self.text, sizes]).encode("utf-8", "surrogatepass")).hexdigest()

    def refuse_small(self, side: int) -> None:
        """ValueError where a picture is less than half as large as a model's, whose side is given in pixels."""
        for image in self._images():
            if 2 * min(image.width, image.height) < side:
                raise ValueError(
                    f"a picture's shorter side must be at least half of the model's {side} pixels, {image.where} has "
                    f"{image.width} x {image.height}; give a larger one, or lower model.resolution"
                )

    def _images(self) -> Iterator[StoredImage]:
        for record in self.records:
            yield from (record.chosen, record.rejected) if isinstance(record, Pair) else (record.image,)


def read_pairs(folder: str | Path | None) -> PreferenceSet[Pair]:
    """The pairs of a folder. ValueError, in one line with file and line number, where it is no such set."""
    place = folder_of(folder)
    if not (place / PAIRS).is_file():
        has = f"a folder with {LABELLED} alone" if (place / LABELLED).is_file() else f"a folder without {PAIRS}"
        raise ValueError(f"pairs are listed in {PAIRS}, got {str(place)!r}, {has}; {MAKE}")
    text, found = _read(place, PAIRS, _pair)
    return PreferenceSet(place, found, text)


def read_judged(folder: str | Path | None) -> PreferenceSet[Judged]:
    """The labelled pictures of a folder; those of pairs, the chosen one liked, where it has pairs alone."""
    place = folder_of(folder)
    if (place / LABELLED).is_file():
        text, found = _read(place, LABELLED, _judged)
        return PreferenceSet(place, found, text)
    if not (place / PAIRS).is_file():
        raise ValueError(
            f"labels are listed in {LABELLED} or {PAIRS}, got {str(place)!r}, a folder without either; {MAKE} "
            f"--labelled"
        )
    pairs = read_pairs(place)
    both = [
        Judged(pair.prompt, image, is_liked)
        for pair in pairs.records
        for image, is_liked in ((pair.chosen, True), (pair.rejected, False))
    ]
    return PreferenceSet(place, both, pairs.text)


class _Lines:
    """The file that lists a set: what its lines name, checked."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.path, self._root = folder, folder / name, folder.resolve()
        self._seen: dict[str, StoredImage] = {}

    def text(self) -> str:
        try:
            return self.path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path} must be UTF-8, got a byte that is none ({error.reason}); save it so"
            ) from None
        except OSError as error:
            raise ValueError(f"{self.path} must be readable, got {error.strerror}; check its permissions") from None

    def object(self, number: int, line: str) -> dict[str, Any]:
        where = f"line {number} of {self.path}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", "nested too deep")
            raise ValueError(f"{where} must be JSON, got {line[:60]!r} ({why}); write an object a line") from None
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, got {line[:60]!r}; write an object a line")
        return value

    def prompt(self, value: dict[str, Any], where: str) -> str:
        if "prompt" not in value:
            raise ValueError(f'{where} must have "prompt", got {", ".join(map(repr, value))[:80] or "nothing"}; add it')
        return prompts.checked(value["prompt"], f"that of {where}")

    def score(self, value: dict[str, Any], key: str, where: str) -> float | None:
        given = value.get(key)
        if given is None:
            return None
        if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
            raise ValueError(
                f'"{key}" of {where} must be a finite number, got {given!r:.60}; correct it, or leave it out'
            )
        return float(given)

    def image(self, value: dict[str, Any], key: str, where: str) -> StoredImage:
        name = value.get(key)
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError(f'{where} must have "{key}", the path of a picture, got {name!r:.60}; name one')
        where = f"{name[:200]!r} ({where})"
        if name not in self._seen:
            self._seen[name] = self._found(name, where)
        return self._seen[name]

    def _found(self, name: str, where: str) -> StoredImage:
        relative = PurePosixPath(name)
        path = self.folder / relative
        if relative.is_absolute() or ".." in relative.parts or not path.resolve().is_relative_to(self._root):
            raise ValueError(
                f"pictures lie in the set's folder, {where} leaves it; move it there, and name it relative to that"
            )
        if not path.is_file():
            raise ValueError(f"each picture must be a file, {where} is none; add it, or remove the line")
        try:
            with _opened(path) as image:
                (width, height), mode = image.size, image.mode
                num_bytes = path.stat().st_size
        except Exception as error:  # a damaged file may raise anything
            raise _damaged(where, error) from None
        if mode not in MODES:
            raise ValueError(f"a picture has 8 bits a channel, {where} has the mode {mode}; save it as RGB")
        if max(width, height) > MOST_SIDE:
            raise ValueError(
                f"a picture's sides have at most {MOST_SIDE} pixels, {where} has {width} x {height}; make it smaller"
            )
        if max(width, height) > MOST_ASPECT * min(width, height):
            raise ValueError(
                f"a picture is at most {MOST_ASPECT:g} times as long as wide, since its middle square is trained on, "
                f"{where} has {width} x {height}; cut it"
            )
        found = StoredImage(path, where, width, height, num_bytes)
        if len(self._seen) < LOOKED_AT:
            found.pixels(1)
        return found


def _read(folder: Path, name: str, of: Callable[[_Lines, dict[str, Any], str], Record]) -> tuple[str, list[Record]]:
    lines, found = _Lines(folder, name), []
    text = lines.text()
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            found.append(of(lines, lines.object(number, line), f"line {number} of {lines.path}"))
    if not found:
        raise ValueError(f"a set has at least one line, {lines.path} is empty; {MAKE}")
    return text, found


def _pair(lines: _Lines, value: dict[str, Any], where: str) -> Pair:
    prompt = lines.prompt(value, where)
    chosen, rejected = (lines.image(value, key, where) for key in ("chosen", "rejected"))
    if chosen.path == rejected.path:
        raise ValueError(f"a pair is of two pictures, {where} names {value['chosen']!r:.60} twice; remove the line")
    better, worse = (lines.score(value, f"{key}_score", where) for key in ("chosen", "rejected"))
    if better is not None and worse is not None and better < worse:
        raise ValueError(
            f"the chosen picture has the higher score, {where} has {better:g} for it and {worse:g} for the other; "
            f"exchange them, or leave the scores out"
        )
    return Pair(prompt, chosen, rejected)


def _judged(lines: _Lines, value: dict[str, Any], where: str) -> Judged:
    prompt, image = lines.prompt(value, where), lines.image(value, "image", where)
    lines.score(value, "score", where)
    if not isinstance(label := value.get("label"), bool):
        raise ValueError(f'{where} must have "label", true or false, got {label!r:.60}; write one of the two')
    return Judged(prompt, image, label)


def _opened(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path, formats=FORMATS)


def _damaged(where: str, error: Exception) -> ValueError:
    said = " ".join(str(error).split())[:120] or type(error).__name__
    said = "no such picture" if "cannot identify image file" in said else said
    return ValueError(
        f"a picture is a whole PNG, JPEG or WebP file, {where} cannot be read ({said}); replace it, or remove the line"
    )
