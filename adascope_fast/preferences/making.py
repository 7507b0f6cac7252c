"""A set of preferences from a model and a reward: some pictures of each prompt, the best against the worst.

Of `k` pictures of a prompt the one with the highest reward is preferred to the one with the lowest; or each is liked
that lies above the mean of its prompt's, and disliked below it. Ties are left out. A prompt gives one pair a round, and
the prompts are gone through in an order drawn from the seed. Rewards are those of the pictures as they are written, in
8 bits.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from PIL import Image
from torch import Tensor

from adascope_fast.backbone import Backbone, Reward, in_double
from adascope_fast.preferences.files import LABELLED, PAIRS
from adascope_fast.preferences.folders import MANIFEST, refuse_filled
from adascope_fast.rollout import OwnNoise, PromptCache, rollout
from adascope_fast.schedules import Schedule

PICTURES = "pictures"
DRAWN_AT_ONCE = 32
MOST_TIES = 200
"""Prompts in a row without two different rewards, after which there is nothing to prefer."""


@dataclass(frozen=True)
class Made:
    """What was made; `margin` is the mean difference of the rewards of a pair, or of liked and disliked pictures."""

    num_pairs: int
    num_images: int
    num_drawn: int
    num_ties: int
    margin: float
    score: float
    """Mean reward of all pictures that were drawn."""


def make(
    backbone: Backbone,
    schedule: Schedule,
    reward: Reward,
    prompts: Sequence[str],
    folder: Path,
    *,
    num_pairs: int,
    images_per_prompt: int,
    is_labelled: bool,
    guidance_scale: float,
    seed: int,
    batch: int,
    overwrite: bool,
    about: Mapping[str, Any],
    on_pairs: Callable[[int], None] = lambda count: None,
) -> Made:
    """Write `num_pairs` pairs to `folder`, or twice as many labelled pictures; all at once, when they are there.

    Args:
        schedule: how pictures are sampled.
        batch: images denoised at once; a picture does not depend on it.
        about: for `manifest.json`, beside what was made.
        on_pairs: called with the number of pairs whenever there are more.

    Raises:
        ValueError: the folder has something in it and `overwrite` is not given, or that is no set; or the reward
            prefers no picture to another.
    """
    refuse_filled(folder, overwrite=overwrite)
    prompts, drawn = list(dict.fromkeys(prompts)), 0
    scores, margins, lines, ties, in_a_row = [], [], [], 0, 0
    wanted = 2 * num_pairs if is_labelled else num_pairs
    with _replacing(folder, overwrite=overwrite) as partial:
        (partial / PICTURES).mkdir()
        for prompt, images, found in _judged(
            backbone,
            schedule,
            reward,
            prompts,
            images_per_prompt,
            guidance_scale=guidance_scale,
            seed=seed,
            batch=batch,
        ):
            drawn += len(found)
            scores.append(float(in_double(found).mean()))
            if bool((found == found[0]).all()):
                ties, in_a_row = ties + 1, in_a_row + 1
                if in_a_row >= MOST_TIES:
                    raise ValueError(
                        f"a set needs pictures that the reward tells apart, got {in_a_row} prompts in a row whose "
                        f"{images_per_prompt} pictures all have one reward, the last {found[0].item():g}; choose "
                        f"another reward, or more --images-per-prompt"
                    )
                continue
            in_a_row = 0
            write = _labelled if is_labelled else _paired
            made, margin = write(partial, len(lines), prompt, images, found)
            lines += made[: wanted - len(lines)]
            margins.append(margin)
            on_pairs(len(lines) // 2 if is_labelled else len(lines))
            if len(lines) == wanted:
                break
        _drop_unnamed(partial, lines)
        made = Made(
            num_pairs=0 if is_labelled else len(lines),
            num_images=len(lines) * (1 if is_labelled else 2),
            num_drawn=drawn,
            num_ties=ties,
            margin=sum(margins) / len(margins),
            score=sum(scores) / len(scores),
        )
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (partial / (LABELLED if is_labelled else PAIRS)).write_text(text, encoding="utf-8")
        manifest = json.dumps({"made": vars(made)} | dict(about), indent=1, ensure_ascii=False)
        (partial / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
    return made


@torch.no_grad()
def _judged(
    backbone: Backbone,
    schedule: Schedule,
    reward: Reward,
    prompts: Sequence[str],
    images_per_prompt: int,
    *,
    guidance_scale: float,
    seed: int,
    batch: int,
) -> Iterator[tuple[str, Float[Tensor, "k 3 h w"], Float32[Tensor, " k"]]]:
    """(prompt, pictures in 8 bits, rewards) of one prompt after another, round after round; without end.

    Their noise is drawn from the seed, for `DRAWN_AT_ONCE` pictures in one go whatever the batch.
    """
    cache, number = PromptCache(backbone), 0
    group = max(1, DRAWN_AT_ONCE // images_per_prompt)
    while True:
        order = random.Random(f"{seed}/{number}").sample(prompts, len(prompts))
        for start in range(0, len(order), group):
            chosen = order[start : start + group]
            repeated = [prompt for prompt in chosen for _ in range(images_per_prompt)]
            noise = OwnNoise(random.Random(f"{seed}/{number}/{start}").getrandbits(62))
            trajectory = rollout(
                backbone,
                schedule,
                cache(chosen),
                repeated,
                guidance_scale=guidance_scale,
                noise=noise,
                batch=batch,
            )
            with torch.autocast(trajectory.latents.device.type, enabled=False):
                images = backbone.decode(trajectory.latents[:, -1])
            whole = images.flatten(1).isfinite().all(1)
            if not bool(whole.all()):
                raise FloatingPointError(
                    f"images must be finite, and {int((~whole).sum())} of {len(images)} are not: the weights or the "
                    f'type that they are stored in fail; try model.dtype = "float32"'
                )
            images = (images * 255).round() / 255
            scores = reward(images, repeated).float().cpu()
            yield from zip(chosen, images.cpu().split(images_per_prompt), scores.split(images_per_prompt), strict=True)
        number += 1


def _paired(
    folder: Path, number: int, prompt: str, images: Float[Tensor, "k 3 h w"], scores: Float32[Tensor, " k"]
) -> tuple[list[dict[str, Any]], float]:
    """The best picture against the worst, as a line; and the difference of their rewards."""
    best, worst = int(scores.argmax()), int(scores.argmin())
    line: dict[str, Any] = {"prompt": prompt}
    for name, row in (("chosen", best), ("rejected", worst)):
        line[name] = _write(folder, f"{number:06d}_{name}", images[row])
        line[f"{name}_score"] = scores[row].item()
    return [line], (scores[best] - scores[worst]).item()


def _labelled(
    folder: Path, number: int, prompt: str, images: Float[Tensor, "k 3 h w"], scores: Float32[Tensor, " k"]
) -> tuple[list[dict[str, Any]], float]:
    """Each picture that is not the mean of its prompt's, as a line; and by how much the liked ones are above others."""
    mean = in_double(scores).mean()
    lines = []
    for row in (in_double(scores) != mean).nonzero()[:, 0].tolist():
        path = _write(folder, f"{number + len(lines):06d}", images[row])
        is_liked = bool(scores[row] > mean)
        lines.append({"prompt": prompt, "image": path, "label": is_liked, "score": scores[row].item()})
    return lines, (scores[scores > mean].mean() - scores[scores < mean].mean()).item()


def _write(folder: Path, name: str, image: Float[Tensor, "3 h w"]) -> str:
    path = f"{PICTURES}/{name}.png"
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(folder / path)
    return path


def _drop_unnamed(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Remove the pictures of a prompt that were one too many."""
    named = {line[key] for line in lines for key in ("chosen", "rejected", "image") if key in line}
    for path in (folder / PICTURES).iterdir():
        if f"{PICTURES}/{path.name}" not in named:
            path.unlink()


@contextmanager
def _replacing(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder beside `folder` to write to, which takes its place in the end; removed where that does not come."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "old"))
    for place in (partial, old):  # of a process that was killed
        shutil.rmtree(place, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        refuse_filled(folder, overwrite=overwrite)  # somebody else may have written there meanwhile
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
