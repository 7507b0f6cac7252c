"""Stars for the images that a training waits for: one number an image, and one click.

Images of one prompt are shown together, so that they are judged beside each other, and each gets 1 to 5 stars. Stars,
unlike an order of the images, mean the same from one prompt and one evaluation to the next. An image is known by a
digest of its pixels and prompt: a training that is continued after a kill draws the same images, and what was said of
them counts.

Axes: `n` images of a batch.
"""

import hashlib
import io
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from adascope_fast.judging.votes import Votes

MOST_STARS = 5
LARGEST_GROUP = 8
"""Images shown at once."""
HELD_S = 60.0
"""For how long a group that one rater was shown is not given to another while there are others."""


class Stopped(Exception):  # noqa: N818 - no error: the training that waits has ended
    """Nobody waits for the ratings any more."""


@dataclass
class _Group:
    """Images of one prompt on one screen."""

    prompt: str
    images: list[str]
    shown_to: str = ""
    shown_at: float = -HELD_S


class Ratings:
    """The images that are waited for, and what was said of them.

    Args:
        folder: where the votes are kept.
        question: the key of what is asked.
        votes_per_image: different raters that an image needs.
    """

    def __init__(self, folder: Path, *, question: str, votes_per_image: int) -> None:
        self.question, self._needed = question, votes_per_image
        self._votes = Votes(folder, key=("image", "question", "rater"), fields=("stars",))
        self._changed = threading.Condition()
        self._by_image: dict[str, dict[str, int | None]] = {}
        for vote in self._votes:
            if vote["question"] == question and (vote["stars"] is None or vote["stars"] in range(1, MOST_STARS + 1)):
                self._by_image.setdefault(vote["image"], {})[vote["rater"]] = vote["stars"]
        self._groups: list[_Group] = []
        self._pngs: dict[str, bytes] = {}
        self._stage, self._is_stopped, self.num_skipped = "", False, 0

    def ask(self, pixels: np.ndarray, prompts: Sequence[str]) -> list[float | None]:
        """The mean stars of images [n, h, w, 3] of 8 bits, waited for; None of those that every rater skipped.

        Raises:
            Stopped: `stop` was called meanwhile.
        """
        digests = [digest_of(image, prompt) for image, prompt in zip(pixels, prompts, strict=True)]
        with self._changed:
            missing = {digest: place for place, digest in enumerate(digests) if not self._is_done(digest)}
            self._pngs = {digest: _png(pixels[place]) for digest, place in missing.items()}
            self._groups = _grouped([(prompts[place], digest) for digest, place in missing.items()])
            while not all(map(self._is_done, missing)):
                if self._is_stopped:
                    raise Stopped
                self._changed.wait(0.5)  # not for ever: Ctrl-C is to be heard
            self._groups, self._pngs = [], {}
            return [self._mean(digest) for digest in digests]

    def stage(self, words: str) -> None:
        """Say what the next images are of."""
        with self._changed:
            self._stage = words

    def stop(self) -> None:
        """Wait no longer."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def group_for(self, rater: str, back: int) -> dict[str, Any]:
        """What a rater is shown next, or that there is nothing; `back` groups before it that they have rated."""
        with self._changed:
            open_ones = [group for group in self._groups if self._wants(group, rater)]
            rated = [group for group in self._groups if group not in open_ones and self._has_rated(group, rater)]
            now = time.monotonic()
            rated.sort(key=lambda group: group.shown_at)
            total = self._needed * len(self._pngs)
            told: dict[str, Any] = {"stage": self._stage, "left": self._left(), "total": total}
            told["can_go_back"] = len(rated) > back
            if back and rated:
                group = rated[-min(back, len(rated))]
            elif open_ones:
                group = min(open_ones, key=lambda one: one.shown_to != rater and now - one.shown_at < HELD_S)
                group.shown_to, group.shown_at = rater, now
            else:
                return told | {"is_waiting": True}
            images = [{"image": one, "given": self._given(one, rater)} for one in group.images]
            return told | {"is_waiting": False, "prompt": group.prompt, "images": images}

    def rate(self, rater: str, image: str, stars: int | None, seconds: float, at: float) -> bool:
        """Take a rating in, None for a skip; False where the image is not waited for."""
        with self._changed:
            if image not in self._pngs:
                return False
            self._votes.add(
                {"image": image, "question": self.question, "rater": rater, "stars": stars}
                | {"seconds": seconds, "time": at, "stage": self._stage}
            )
            self._by_image.setdefault(image, {})[rater] = stars
            self._changed.notify_all()
            return True

    def png(self, image: str) -> bytes | None:
        """An image that is waited for."""
        with self._changed:
            return self._pngs.get(image)

    def _mean(self, digest: str) -> float | None:
        stars = [one for one in self._by_image[digest].values() if one is not None]
        self.num_skipped += not stars
        return sum(stars) / len(stars) if stars else None

    def _is_done(self, digest: str) -> bool:
        return len(self._by_image.get(digest, {})) >= self._needed

    def _wants(self, group: _Group, rater: str) -> bool:
        return any(rater not in self._by_image.get(one, {}) and not self._is_done(one) for one in group.images)

    def _has_rated(self, group: _Group, rater: str) -> bool:
        return any(rater in self._by_image.get(one, {}) for one in group.images)

    def _given(self, image: str, rater: str) -> Any:
        """The stars that a rater gave, `skip`, or None before they said anything."""
        given = self._by_image.get(image, {})
        if rater not in given:
            return None
        return "skip" if given[rater] is None else given[rater]

    def _left(self) -> int:
        """Votes that are still waited for."""
        return sum(max(0, self._needed - len(self._by_image.get(one, {}))) for one in self._pngs)


def digest_of(image: np.ndarray, prompt: str) -> str:
    """What an image [h, w, 3] of 8 bits and its prompt are known by."""
    return hashlib.sha256(f"{image.shape} {prompt}\0".encode() + image.tobytes()).hexdigest()[:32]


def _grouped(images: Sequence[tuple[str, str]]) -> list[_Group]:
    """Images that follow each other with one prompt, as many as are shown at once."""
    groups: list[_Group] = []
    for prompt, digest in images:
        if groups and groups[-1].prompt == prompt and len(groups[-1].images) < LARGEST_GROUP:
            groups[-1].images.append(digest)
        else:
            groups.append(_Group(prompt, [digest]))
    return groups


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()
