"""Pairs of images of one prompt by two arms, shuffled so that neither side nor order tells whose an image is.

An arm is a folder of images: a model, a run, an algorithm. Images are matched by prompt and, where both have one, by
seed; else the first of a prompt with the first. Every two arms have as many pairs as any other two, to within one, and
each is on the left in half of them. What is compared is written to `pairs.json`, which names the arms and which no page
is ever shown; it has a digest of every image, so votes are never added to those on other images.
"""

import hashlib
import io
import itertools
import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from adascope_fast.images import Folder, Image, folders, read

FILE = "pairs.json"
INNER = "images"  # where `evaluate` puts the folders of its arms

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Side:
    """One image of a pair."""

    arm: str
    path: str
    digest: str
    """SHA-256 of its pixels."""

    def png(self) -> bytes:
        """The image alone, without what its file says of where it comes from."""
        file = io.BytesIO()
        PIL.Image.fromarray(Image(Path(self.path), None).pixels()).save(file, format="PNG")
        return file.getvalue()


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt."""

    prompt: str
    left: Side
    right: Side


@dataclass(frozen=True)
class Comparison:
    """All pairs in the order in which they are shown."""

    arms: tuple[str, ...]
    pairs: tuple[Pair, ...]
    seed: int

    @property
    def digest(self) -> str:
        """SHA-256 of the images, prompts, arms and their order."""
        about = [self.seed, list(self.arms)]
        about += [[pair.prompt, *(f"{one.arm} {one.digest}" for one in (pair.left, pair.right))] for pair in self.pairs]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def keep_in(self, out: Path) -> None:
        """Write `pairs.json`; ValueError where the folder has one of other pairs."""
        path = out / FILE
        if path.exists() and _values(path).get("digest") != self.digest:
            raise ValueError(
                f"the votes in {str(out)!r} must be on the same pairs, and its {FILE} is of other images, another "
                f"seed or another number; give the same as before, or another --out"
            )
        out.mkdir(parents=True, exist_ok=True)
        partial = out / f".{FILE}.partial"
        partial.write_text(json.dumps({**asdict(self), "digest": self.digest}, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def kept_in(cls, out: Path) -> "Comparison":
        """What a folder's `pairs.json` says was compared; ValueError where it has none, or a damaged one."""
        path, rule = out / FILE, f"a folder of judgments has {FILE}"
        if not path.is_file():
            raise ValueError(f"{rule}, {str(out)!r} has none; give the --out of a judging")
        values = _values(path)
        try:
            pairs = tuple(Pair(pair["prompt"], Side(**pair["left"]), Side(**pair["right"])) for pair in values["pairs"])
            found = cls(tuple(values["arms"]), pairs, values["seed"])
            is_whole = found.digest == values["digest"]
        except (KeyError, TypeError, AttributeError):
            is_whole = False
        if not is_whole:
            raise ValueError(f"{rule} as it was written, and that of {str(out)!r} is damaged; restore it")
        return found  # pyright: ignore[reportPossiblyUnboundVariable]


def arms_of(paths: Sequence[Path]) -> list[Folder]:
    """The folders of images that `paths` are, or that a single path holds, under names of their own.

    Raises:
        ValueError: there are fewer than two, or one of them twice.
    """
    found = [read(path) for path in paths] if len(paths) > 1 else []
    if len(paths) == 1:
        found = folders(paths[0]) or folders(paths[0] / INNER)
    if len(found) < 2:
        got = f"{len(found)} in {str(paths[0])!r}" if paths else "none"
        raise ValueError(
            f"judging compares two folders of images or more, got {got}; name another, or a folder that holds several"
        )
    names = [folder.name for folder in found]
    if len(set(names)) < len(names):
        found = [Folder(str(folder.path), folder.path, folder.images) for folder in found]
    if len({folder.path.resolve() for folder in found}) < len(found):
        raise ValueError("judging compares different folders, got one of them twice; name each once")
    return found


def compare(arms: Sequence[Folder], *, num: int | None, seed: int) -> Comparison:
    """At most `num` pairs of the arms' images (None: all), shuffled by `seed`.

    Raises:
        ValueError: two arms have no prompt in common, or an image cannot be read.
    """
    rng, arms = random.Random(seed), sorted(arms, key=lambda arm: arm.name)
    matched = {}
    for one, other in itertools.combinations(arms, 2):
        pairs = list(_matches(one, other))
        if not pairs:
            raise ValueError(
                f"two arms are compared on prompts of both, {one.name!r} and {other.name!r} have none in common; "
                f"draw the same prompts with both, and name them in metadata.jsonl"
            )
        matched[one.name, other.name] = _different_prompts_first(pairs, rng)
    taken = _in_turn(list(matched.values()), num)
    made = []
    for pairs in taken:
        for place, (one, other) in enumerate(rng.sample(pairs, len(pairs))):
            made.append((one, other) if place % 2 else (other, one))
    rng.shuffle(made)
    names = {image.path: folder.name for folder in arms for image in folder.images}
    sides: dict[Path, Side] = {}
    sizes: dict[tuple[int, ...], str] = {}
    for image in itertools.chain.from_iterable(made):
        if image.path not in sides:
            pixels = image.pixels()
            digest = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
            sides[image.path] = Side(names[image.path], str(image.path.absolute()), digest)
            sizes.setdefault(pixels.shape, names[image.path])
    if len(sizes) > 1:
        logger.warning("the images differ in size, which may tell whose they are; draw them all at one")
    pairs = tuple(Pair(one.prompt, sides[one.path], sides[other.path]) for one, other in made)
    return Comparison(tuple(arm.name for arm in arms), pairs, seed)


def _matches(one: Folder, other: Folder) -> Iterator[tuple[Image, Image]]:
    """Two images of the same prompt, and of the same seed where both know theirs."""
    others = other.by_prompt()
    for prompt, images in one.by_prompt().items():
        theirs = others.get(prompt, [])
        if all(image.seed is not None for image in [*images, *theirs]):
            by_seed = {image.seed: image for image in theirs}
            yield from ((image, by_seed[image.seed]) for image in images if image.seed in by_seed)
        else:
            yield from zip(images, theirs, strict=False)


def _different_prompts_first(pairs: list[tuple[Image, Image]], rng: random.Random) -> list[tuple[Image, Image]]:
    """Shuffled, one of each prompt before a second of any: prompts are what an interval is made of."""
    by_prompt: dict[str | None, list[tuple[Image, Image]]] = {}
    for pair in rng.sample(pairs, len(pairs)):
        by_prompt.setdefault(pair[0].prompt, []).append(pair)
    rounds = itertools.zip_longest(*by_prompt.values())
    return [pair for one in rounds for pair in one if pair is not None]


def _in_turn(lists: list[list[Any]], num: int | None) -> list[list[Any]]:
    """The beginnings of these lists, `num` in all, as equally long as they can be."""
    rounds = [(place, number) for number, one in enumerate(lists) for place in range(len(one))]
    taken = sorted(rounds)[: len(rounds) if num is None else num]
    return [[one[place] for place, number in taken if number == index] for index, one in enumerate(lists)]


def _values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
