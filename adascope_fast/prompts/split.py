"""A list of prompts in two: those to train on, and a share that is held out to judge by."""

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T", bound=str | Mapping)

HELD_OUT_SHARE = 0.1


def split(prompts: Sequence[T], *, seed: int, share: float = HELD_OUT_SHARE) -> tuple[list[T], list[T]]:
    """(to train on, held out), each in the order of the list; a prompt that is repeated is on one side.

    At least two are held out where there are four or more. The same list and seed give the same two.

    ValueError where there is only one prompt.
    """
    texts = list(dict.fromkeys(map(_text, prompts)))
    if len(texts) < 2:
        raise ValueError(
            f"prompts are split into those to train on and those to judge by, got {len(texts)} different; give two or "
            f"more, or held_out_prompts besides"
        )
    count = max(min(2, len(texts) // 2), round(share * len(texts)))
    held_out = set(random.Random(f"held_out/{seed}").sample(texts, count))
    sides: tuple[list[T], list[T]] = [], []
    for prompt in prompts:
        sides[_text(prompt) in held_out].append(prompt)
    return sides


def _text(prompt: str | Mapping) -> str:
    return str(prompt.get("prompt") if isinstance(prompt, Mapping) else prompt).strip()
