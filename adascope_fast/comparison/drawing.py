"""Images of every arm on the same prompts and seeds, as PNG in a folder each, so that a stopped evaluation goes on.

Image `k` of prompt `i` starts from the noise of seed `first + i * images + k`, whatever the arm.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from adascope_fast import images
from adascope_fast.backbones import PipelineBackbone
from adascope_fast.comparison.arms import Arm, identity, load
from adascope_fast.images.folders import write_metadata
from adascope_fast.reporting.files import json_object, text_of
from adascope_fast.training.draw import draw_each

MADE_OF = "made_of.json"


@dataclass(frozen=True)
class Asked:
    """What is drawn, alike for every arm."""

    prompts: tuple[str, ...]
    images: int
    """Of each prompt."""
    seed: int
    num_steps: int
    guidance_scale: float
    shift: float | None = None

    def seeds(self, number: int) -> list[int]:
        """Of the images of prompt `number`."""
        first = self.seed + number * self.images
        return list(range(first, first + self.images))


def digest_of(arm: Arm, asked: Asked) -> str:
    """What tells these images from others: SHA-256 of the arm's identity and of what is asked."""
    return hashlib.sha256(json.dumps([identity(arm), asdict(asked)]).encode()).hexdigest()


def holds_others(arm: Arm, asked: Asked, folder: Path) -> bool:
    """Whether a folder has something in it that is not these images."""
    is_filled = folder.exists() and any(folder.iterdir())
    return is_filled and json_object(text_of(folder / MADE_OF)).get("digest") != digest_of(arm, asked)


def refuse_others(arm: Arm, asked: Asked, folder: Path) -> None:
    """ValueError where `folder_of` would replace what is there."""
    if holds_others(arm, asked, folder):
        raise ValueError(
            f"{str(folder)!r} must hold images of {arm.place!r} as it is asked for now, and holds others; add "
            f"--overwrite, or name another --out"
        )


def folder_of(
    arm: Arm,
    asked: Asked,
    folder: Path,
    *,
    device: torch.device,
    batch: int,
    overwrite: bool = False,
    on_images: Callable[[int], None] = lambda count: None,
) -> images.Folder:
    """The arm's images, those that are not yet there drawn into `folder`.

    Args:
        batch: images denoised at once.
        overwrite: what else is in `folder` goes first.
        on_images: told how many more there are.

    Raises:
        FloatingPointError: an image is not finite.
        ValueError: the arm's weights are not found.
    """
    made_of = digest_of(arm, asked)
    if overwrite and holds_others(arm, asked, folder):
        for file in folder.iterdir():
            file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MADE_OF).write_text(json.dumps({"digest": made_of, "source": arm.place, **_plain(asked)}, indent=1))
    names = [[f"{number:05d}_{k}.png" for k in range(asked.images)] for number in range(len(asked.prompts))]
    missing = [number for number, files in enumerate(names) if not all((folder / name).is_file() for name in files)]
    on_images((len(names) - len(missing)) * asked.images)
    if missing:
        backbone = load(arm)
        backbone.to(device)
        at_once = max(1, batch // asked.images)
        for start in range(0, len(missing), at_once):
            numbers = missing[start : start + at_once]
            drawn = _draw(backbone, numbers, asked, batch)
            for name, image in zip([name for number in numbers for name in names[number]], drawn, strict=True):
                _save(image, folder / name)
            on_images(len(drawn))
    records = [
        {"file_name": name, "prompt": prompt, "seed": seed}
        for number, prompt in enumerate(asked.prompts)
        for name, seed in zip(names[number], asked.seeds(number), strict=True)
    ]
    write_metadata(folder, records)
    return images.read(folder, arm.name)


def _draw(backbone: PipelineBackbone, numbers: Sequence[int], asked: Asked, batch: int) -> Tensor:
    return draw_each(
        backbone,
        [asked.prompts[number] for number in numbers for _ in range(asked.images)],
        [seed for number in numbers for seed in asked.seeds(number)],
        num_steps=asked.num_steps,
        guidance_scale=asked.guidance_scale,
        shift=asked.shift,
        batch=batch,
    )


def _save(image: Tensor, path: Path) -> None:
    """In one go: a file that is there is whole."""
    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    partial = path.with_suffix(".partial")
    PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(partial, format="PNG")
    os.replace(partial, path)


def _plain(asked: Asked) -> dict[str, Any]:
    return {name: value for name, value in asdict(asked).items() if name != "prompts"} | {
        "num_prompts": len(asked.prompts)
    }
