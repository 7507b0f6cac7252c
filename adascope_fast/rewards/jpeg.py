"""JPEG size as a reward, as DDPO defines it (Black et al. 2023): quality 95, kilobytes of 1000 bytes."""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from adascope_fast.rewards.reward import eight_bits


def jpeg_incompressibility(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Size [b] in kilobytes of each picture's JPEG; the prompts do not matter."""
    pixels = eight_bits(images)
    sizes = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


def jpeg_compressibility(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Minus the size [b] in kilobytes of each picture's JPEG: smaller files are better."""
    return -jpeg_incompressibility(images, prompts)
