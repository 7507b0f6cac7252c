"""Folders of images made by hand: flat greys, the values of which are known."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from adascope_fast import images
from adascope_fast.images.folders import write_metadata


def folder(path: Path, greys: Mapping[str, Sequence[float]], size: tuple[int, int] = (8, 6)) -> images.Folder:
    """Images of each prompt, of one grey each in [0, 255], on seeds 0, 1, ..."""
    path.mkdir(parents=True, exist_ok=True)
    records = []
    for number, (prompt, values) in enumerate(greys.items()):
        for k, value in enumerate(values):
            name = f"{number}_{k}.png"
            PIL.Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path / name)
            records.append({"file_name": name, "prompt": prompt, "seed": 10 * number + k})
    write_metadata(path, records)
    return images.read(path)
