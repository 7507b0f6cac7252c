"""The Inception-v3 of FID, out of pytorch-fid's or torch-fidelity's file of the TensorFlow weights of 2015-12-05."""

from collections.abc import Mapping

from torch import Tensor

_NEEDED = {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "fc.weight": (1008, 2048)}


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
    unused = ("AuxLogits.", "fc.bias")
    return {name: value.float().contiguous() for name, value in state_dict.items() if not name.startswith(unused)}
