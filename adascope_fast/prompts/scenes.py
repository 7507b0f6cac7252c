"""Captions of the embedded models: their grammar, and the split that keeps some combinations unseen.

A scene is a count, a size, a colour, a shape, a background and (single objects only) a position:
"two small red circles on a grey background", "a large blue square at the left on a white background".
One combination in eight is held out: it is never drawn or named in pretraining, nor trained on with RL.
"""

import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

COUNTS = {"a": 1, "two": 2, "three": 3}
SIZES = ("small", "large")
COLOURS = {  # sRGB, 0..255
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 215, 45),
    "green": (50, 165, 75),
    "blue": (40, 90, 215),
    "purple": (140, 60, 175),
}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
BACKGROUNDS = {
    "white": (244, 244, 244),
    "grey": (150, 150, 150),
    "black": (22, 22, 22),
    "beige": (222, 198, 160),
}
POSITIONS = {
    "centre": "in the centre",
    "top": "at the top",
    "bottom": "at the bottom",
    "left": "at the left",
    "right": "at the right",
}


@dataclass(frozen=True)
class Scene:
    """What a caption asks for; `position` is None where it leaves the place open."""

    count: int
    size: str
    colour: str
    shape: str
    background: str
    position: str | None = None

    @property
    def caption(self) -> str:
        number = next(word for word, count in COUNTS.items() if count == self.count)
        noun = self.shape if self.count == 1 else SHAPES[self.shape]
        place = f" {POSITIONS[self.position]}" if self.position else ""
        return f"{number} {self.size} {self.colour} {noun}{place} on a {self.background} background"

    @property
    def is_held_out(self) -> bool:
        """True for one combination in eight, chosen by a hash of the caption: the same on every machine."""
        return hashlib.sha256(self.caption.encode()).digest()[0] % 8 == 0


def every_scene() -> list[Scene]:
    """All 1,536 combinations that the grammar can say, in a fixed order."""
    scenes = []
    for size, colour, shape, background in itertools.product(SIZES, COLOURS, SHAPES, BACKGROUNDS):
        for position in (None, *POSITIONS):
            scenes.append(Scene(1, size, colour, shape, background, position))
        for count in (2, 3):
            scenes.append(Scene(count, size, colour, shape, background))
    return scenes


_BY_CAPTION = {scene.caption: scene for scene in every_scene()}


def _scene_of(caption: str) -> Scene | None:
    return _BY_CAPTION.get(" ".join(caption.lower().split()).rstrip("."))


def parse(caption: str) -> Scene:
    """The scene that a caption describes; ValueError where the grammar cannot say it."""
    scene = _scene_of(caption)
    if scene is None:
        raise ValueError(
            f"scene captions read '<a|two|three> <size> <colour> <shape> [position] on a <background> background', "
            f"got {caption[:80]!r}; colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)}; "
            f"positions (single objects): {', '.join(POSITIONS.values())}; backgrounds: {', '.join(BACKGROUNDS)}"
        )
    return scene


def refuse_others(prompts: Sequence[str], where: str) -> None:
    """ValueError where the grammar cannot say one of the prompts, which the scenes' reward cannot judge.

    Args:
        where: what an error calls the prompts.
    """
    others = [prompt for prompt in prompts if _scene_of(prompt) is None]
    if others:
        raise ValueError(
            f'reward.name = "scene_attributes" judges scene captions alone, got {len(others)} others in {where}, first '
            f'{others[0][:60]!r}; choose another reward, or captions such as "a small red circle on a grey background"'
        )


def captions(split: str, *, seed: int = 0) -> list[str]:
    """Every caption of a split, `"train"` or `"held_out"`, in an order drawn from `seed`."""
    if split not in ("train", "held_out"):
        raise ValueError(f"a scenes split is 'train' or 'held_out', got {split!r}; choose one of them")
    chosen = [scene.caption for scene in every_scene() if scene.is_held_out == (split == "held_out")]
    random.Random(seed).shuffle(chosen)
    return chosen
