"""Images of a folder as tensors, a batch at a time."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from adascope_fast.images import Folder, Image


def batches(folder: Folder, size: int) -> Iterator[list[Image]]:
    """The images of a folder, in its order, up to `size` at once, of one size in pixels each time."""
    waiting: list[Image] = []
    shape: Any = None
    for image in folder.images:
        own = image.size()
        if waiting and (len(waiting) == size or own != shape):
            yield waiting
            waiting = []
        shape = own
        waiting.append(image)
    if waiting:
        yield waiting


def pixels_of(batch: Sequence[Image]) -> Tensor:
    """Images [n, 3, h, w] in [0, 1], float32."""
    return torch.stack([torch.from_numpy(image.pixels().copy()).permute(2, 0, 1) for image in batch]).float() / 255
