"""Which prompts judge where only those to train on are named: a share of them, by a hash with a seed.

A prompt's place does not depend on the others, so a longer list holds out about the same ones. One that stands twice is
on one side alone.
"""

import hashlib
from collections.abc import Sequence

from adascope_fast.prompts.settings import Prompts

FEWEST = 2
"""Held-out prompts; from one there is no interval of a gain."""


def divided(prompts: Sequence[str], settings: Prompts, name: str) -> tuple[list[str], list[str], str]:
    """What is trained on, in its order; what is held out, in the order of the hashes; and a line that tells of it.

    Args:
        name: what the list is called.

    Raises:
        ValueError: too few would be held out, or none would be left.
    """
    share, seed = settings.held_out_share, settings.seed
    different = sorted(set(prompts), key=lambda prompt: hashlib.sha256(f"{seed} {prompt}".encode()).digest())
    num = int(share * len(different) + 0.5)
    held_out, total = different[:num], len(different)
    if num < FEWEST or num == total:
        step = "add prompts, or name others as prompts.held_out"
        if total > FEWEST:
            step = f"set prompts.held_out_share = {_share_for(total):g}, {step}"
        raise ValueError(
            f"where no held-out prompts are named, prompts.held_out_share of the others must be {FEWEST} or more and "
            f"leave one to train on, got {share:g} of the {total} different ones of {name}; {step}"
        )
    kept = set(held_out)
    told = (
        f"{num} of the {total} different prompts of {name} are held out and not trained on, first {held_out[0][:60]!r} "
        f"(prompts.held_out_share = {share:g}, prompts.seed = {seed}); prompts.held_out names others"
    )
    return [prompt for prompt in prompts if prompt not in kept], held_out, told


def _share_for(total: int) -> float:
    """A round share that suits: a fifth where that is enough."""
    return next(share for share in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7) if int(share * total + 0.5) in range(FEWEST, total))
