"""VGG-16 for improved precision and recall, out of torchvision's `vgg16-397923af.pth`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from adascope_fast.weights.files import parted, save, tensors_of

_NEEDED = {
    "features.0.weight": (64, 3, 3, 3),
    "features.28.weight": (512, 512, 3, 3),
    "classifier.3.weight": (4096, 4096),
}


def vgg16(files: Sequence[Path], folder: Path) -> None:
    """VGG-16 from vgg16-397923af.pth."""
    path, others = parted(files)
    if others:
        raise ValueError(f"import-weights vgg16 takes one file, got {others[0].name!r} besides; leave it out")
    save(convert(tensors_of(path)), folder)


def convert(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names of `metrics.vgg.Vgg16`: without the classes' layer. ValueError for another network."""
    for name, shape in _NEEDED.items():
        got = list(state_dict[name].shape) if name in state_dict else "none"
        if got != list(shape):
            raise ValueError(
                f"the weights of VGG-16 must have {name} of shape {list(shape)}, got {got}; download vgg16-397923af.pth"
            )
    return {
        name: value.float().contiguous() for name, value in state_dict.items() if not name.startswith("classifier.6")
    }
