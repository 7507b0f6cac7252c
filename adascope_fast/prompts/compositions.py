"""Objects with colours, counts and places, by a grammar of our own, with the metadata that `geneval` judges them by.

The kinds of prompts are GenEval's (2310.11513), the words are not taken from its list: 24 of COCO's classes, the ten
colours that the reward knows, counts of two to four, and each object beside the next five of the list. One prompt in
eight is held out, chosen by a hash of its text: the same on every machine.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

OBJECTS = {
    "apple": "apples", "banana": "bananas", "bear": "bears", "bench": "benches", "bicycle": "bicycles",
    "bird": "birds", "boat": "boats", "book": "books", "bottle": "bottles", "bowl": "bowls", "cake": "cakes",
    "car": "cars", "cat": "cats", "chair": "chairs", "clock": "clocks", "cow": "cows", "cup": "cups", "dog": "dogs",
    "elephant": "elephants", "horse": "horses", "kite": "kites", "umbrella": "umbrellas", "vase": "vases",
    "zebra": "zebras",
}  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
NEIGHBOURS = 5

Composition = tuple[str, dict[str, Any]]
"""A prompt and its metadata."""


def compositions(split: str) -> list[Composition]:
    """Those of a split, `"train"` or `"held_out"`, in an order drawn from their hashes."""
    if split not in ("train", "held_out"):
        raise ValueError(f"a compositions split is 'train' or 'held_out', got {split!r}; choose one of them")
    return sorted(
        (one for one in _every() if _is_held_out(one[0]) == (split == "held_out")), key=lambda one: _hash(one[0])
    )


def _every() -> Iterator[Composition]:
    names = list(OBJECTS)
    for name, plural in OBJECTS.items():
        for colour in COLOURS:
            yield _said(_a(f"{colour} {name}"), "colors", {"class": name, "count": 1, "color": colour})
        for word, count in COUNTS.items():
            yield _said(
                f"{word} {plural}",
                "counting",
                {"class": name, "count": count},
                exclude=[{"class": name, "count": count + 1}],
            )
    for index, one in enumerate(names):
        for step in range(1, NEIGHBOURS + 1):
            other, number = names[(index + step) % len(names)], index * NEIGHBOURS + step
            first, second = {"class": one, "count": 1}, {"class": other, "count": 1}
            yield _said(f"{_a(one)} and {_a(other)}", "two_object", first, second)
            ours, theirs = COLOURS[number % 10], COLOURS[(number + step + index // 2) % 10]
            if ours != theirs:
                words = f"{_a(f'{ours} {one}')} and {_a(f'{theirs} {other}')}"
                yield _said(words, "color_attr", first | {"color": ours}, second | {"color": theirs})
            relation = RELATIONS[number % 4]
            yield _said(f"{_a(one)} {relation} {_a(other)}", "position", second, first | {"position": [relation, 0]})


def _said(words: str, tag: str, *include: dict[str, Any], exclude: list[dict[str, Any]] | None = None) -> Composition:
    return f"a photo of {words}", {"tag": tag, "include": list(include)} | ({"exclude": exclude} if exclude else {})


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _hash(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode()).digest()


def _is_held_out(prompt: str) -> bool:
    return _hash(prompt)[-1] % 8 == 0
