"""A folder of images with what each was drawn for, as the Hugging Face hub and most trainers have it.

`metadata.jsonl` has a line an image, {"file_name": "0003_1.png", "prompt": "a cat", "seed": 1}; `text` and `caption`
are taken for `prompt`. Without that file, an image's prompt is the text in a file of its name ending in .txt; without
either it has none. Images without a line of metadata are left out, which is told.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

METADATA = "metadata.jsonl"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
MOST_PIXELS = 2**26  # of one image
_NAMES = ("prompt", "text", "caption")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Image:
    """One image's file, its prompt if it has one, and the seed of its noise if that is known."""

    path: Path
    prompt: str | None
    seed: int | None = None

    def pixels(self) -> np.ndarray:
        """RGB values [h, w, 3] of 8 bits; ValueError where the file is no image, is cut short, or is too large."""
        with self._opened() as image:
            return np.asarray(image.convert("RGB"))

    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, from the head of the file; ValueError as `pixels`."""
        with self._opened() as image:
            return image.size

    @contextmanager
    def _opened(self) -> Iterator[PIL.Image.Image]:
        try:
            with PIL.Image.open(self.path) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS}")
                yield image
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{self.path} must be an image, got {why}; draw or copy it again") from None


@dataclass(frozen=True)
class Folder:
    """A folder's images in the order of their prompts' first appearance."""

    name: str
    path: Path
    images: tuple[Image, ...]

    @property
    def prompts(self) -> list[str]:
        """The distinct prompts, in their order."""
        return list(dict.fromkeys(image.prompt for image in self.images if image.prompt is not None))

    def by_prompt(self) -> dict[str, list[Image]]:
        """The images of each prompt."""
        found: dict[str, list[Image]] = {}
        for image in self.images:
            if image.prompt is not None:
                found.setdefault(image.prompt, []).append(image)
        return found


def read(path: Path, name: str | None = None) -> Folder:
    """The images of a folder.

    Args:
        name: what tables call it; None: the folder's own.

    Raises:
        ValueError: it is no folder, holds no image, or its `metadata.jsonl` names a file that is not there.
    """
    if not path.is_dir():
        raise ValueError(f"a folder of images must be one, got {str(path)!r}; check the path")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS and file.is_file())
    if not files:
        raise ValueError(
            f"a folder of images must hold at least one ({', '.join(ENDINGS)}), {str(path)!r} holds none; "
            f"check the path"
        )
    described = path / METADATA
    images = list(_described(described, files) if described.is_file() else map(_with_caption, files))
    if len(images) < len(files):
        logger.warning("%s leaves out %d images, which are not used", described, len(files) - len(images))
    order = {prompt: place for place, prompt in enumerate(dict.fromkeys(image.prompt for image in images))}
    images.sort(key=lambda image: order[image.prompt])
    return Folder(path.name if name is None else name, path, tuple(images))


def folders(path: Path) -> list[Folder]:
    """The folders of images directly within `path`, by name; empty where there are none."""
    inner = sorted(one for one in path.iterdir() if one.is_dir()) if path.is_dir() else []
    return [read(one) for one in inner if any(file.suffix.lower() in ENDINGS for file in one.iterdir())]


def write_metadata(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write `metadata.jsonl` in one go; each record has `file_name` and `prompt`."""
    partial = path / f".{METADATA}.partial"
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    partial.replace(path / METADATA)


def _described(described: Path, files: Sequence[Path]) -> Iterator[Image]:
    known = {file.name: file for file in files}
    rule = f'a line of {described} must be an object with "file_name" of an image beside it, and "prompt"'
    for number, line in enumerate(described.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            file = known[record["file_name"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{rule}, got line {number}, {line[:60]!r}; correct it") from None
        prompt = next((record[name] for name in _NAMES if isinstance(record.get(name), str)), None)
        seed = record.get("seed")
        yield Image(file, prompt, seed if isinstance(seed, int) else None)


def _with_caption(file: Path) -> Image:
    caption = file.with_suffix(".txt")
    text = caption.read_text(encoding="utf-8", errors="replace").strip() if caption.is_file() else ""
    return Image(file, text or None)
