"""The weights of shift-tolerant LPIPS (Ghildyal and Liu 2022), out of the PyPI package that ships them.

The package is found, not imported: nothing of its code runs, and its files of tensors are read as such alone.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

PACKAGE = "stlpips-pytorch 0.0.2"
Trunk = Literal["alex", "vgg"]


def find(trunk: Trunk) -> Path | None:
    """The file of AlexNet's or VGG-16's weights; None where the package is not installed."""
    spec = find_spec("stlpips_pytorch")
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(place) / "weights" / "vST0.0" / f"{trunk}_shift_tolerant.pth" for place in places]
    return next((file for file in files if file.is_file()), None)


def read(trunk: Trunk) -> dict[str, Tensor]:
    """The tensors by their names in the file; ValueError where the package is missing, or its file damaged."""
    file = find(trunk)
    if file is None:
        raise ValueError(
            f"ST-LPIPS needs the weights of {trunk} in the package {PACKAGE}, which is not installed; "
            f"pip install 'adascope-fast[metrics]'"
        )
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its reader trips over
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{file.name} of {PACKAGE} must hold tensors, got {why}; install it again") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{file.name} of {PACKAGE} must hold tensors by name; install it again")
    return found
