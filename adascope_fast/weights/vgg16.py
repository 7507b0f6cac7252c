"""VGG-16 for improved precision and recall, out of torchvision's `vgg16-397923af.pth`."""

from collections.abc import Mapping

from torch import Tensor

_NEEDED = {
    "features.0.weight": (64, 3, 3, 3),
    "features.28.weight": (512, 512, 3, 3),
    "classifier.3.weight": (4096, 4096),
}


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
