"""The VGG-16 of improved precision and recall: 13 convolutions and two layers of 4096, at 224 px.

Weights: a safetensors file with torchvision's names, which `adascope-fast import-weights` makes of
`vgg16-397923af.pth`. The features are those after the second layer's rectifier.

Axes: `n` images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

SIZE, WIDTH = 224, 4096
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_N = TypeVar("_N", bound=nn.Module)
_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: the largest of four


class Vgg16(nn.Module):
    """Features [n, 4096] of images [n, 3, h, w] in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in _WIDTHS:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            before = width or before
        self.features = nn.Sequential(*layers)
        # Dropout has no effect here, and keeps the numbers of the file's names.
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, WIDTH), nn.ReLU(), nn.Dropout(), nn.Linear(WIDTH, WIDTH), nn.ReLU()
        )

    @classmethod
    def load(cls, file: Path) -> "Vgg16":
        """The network of a file, frozen; ValueError unless the weights are its own."""
        return loaded(cls, file, "VGG-16", "vgg16")

    def forward(self, images: Tensor) -> Tensor:
        images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        return self.classifier(self.features(normalised(images, MEAN, STD)).flatten(1))


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images less the mean of each colour, over its deviation."""
    centre, spread = (images.new_tensor(list(values))[:, None, None] for values in (mean, std))
    return (images - centre) / spread


def loaded(kind: type[_N], file: Path, what: str, name: str) -> _N:
    """A network without arguments with the weights of a file, frozen; ValueError unless they are its own.

    Args:
        what: what an error calls it.
        name: what `import-weights` calls it.
    """
    with torch.device("meta"):
        network = kind()
    try:
        network.load_state_dict(load_file(file), assign=True)
    except Exception as error:  # a damaged file raises whatever its reader trips over
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{file} must hold the weights of {what}, got {why}; make it by adascope-fast import-weights {name}"
        ) from error
    return network.float().requires_grad_(False).eval()
