"""The Inception-v3 of FID, out of pytorch-fid's or torch-fidelity's file of the TensorFlow weights of 2015-12-05."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from adascope_fast.weights.files import parted, save, tensors_of

_NEEDED = {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "fc.weight": (1008, 2048)}


def inception(files: Sequence[Path], folder: Path) -> None:
    """FID's Inception-v3 from pt_inception-2015-12-05-6726825d.pth."""
    path, others = parted(files)
    if others:
        raise ValueError(f"import-weights inception takes one file, got {others[0].name!r} besides; leave it out")
    save(convert(tensors_of(path)), folder)


def convert(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names of `metrics.inception.InceptionV3`.

    Raises:
        ValueError: they are of another network; torchvision's, of 1000 classes, is one.
    """
    for name, shape in _NEEDED.items():
        got = list(state_dict[name].shape) if name in state_dict else "none"
        if got != list(shape):
            raise ValueError(
                f"the weights of FID's Inception-v3 must have {name} of shape {list(shape)}, got {got}; download "
                f"pt_inception-2015-12-05-6726825d.pth"
            )
    return {name: value.float().contiguous() for name, value in state_dict.items() if not _is_unused(name)}


def _is_unused(name: str) -> bool:
    return name.startswith("AuxLogits.") or name == "fc.bias" or name.endswith("num_batches_tracked")
