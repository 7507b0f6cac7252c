"""The linear layers of LAION's aesthetic predictor V2, which keep their names; ImageReward ends in the same stack."""

from collections.abc import Sequence
from pathlib import Path

from adascope_fast.weights.files import parted, refuse_others, save, tensors_of

WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)
"""Of the linear layers in the published stack: dropouts, which have no weights, are between them."""


def aesthetic(files: Sequence[Path], folder: Path) -> None:
    """The layers from sac+logos+ava1-l14-linearMSE.pth."""
    path, others = parted(files)
    if others:
        raise ValueError(f"import-weights aesthetic takes one file, got {others[0].name!r} besides; leave it out")
    tensors = tensors_of(path)
    first = tensors.get("layers.0.weight")
    refuse_others(path, tensors, shapes(first.shape[1] if first is not None and first.ndim == 2 else 768))
    save(tensors, folder)


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Of the stack's weights by name, for an embedding of `width` numbers."""
    found: dict[str, tuple[int, ...]] = {}
    for place, inputs, outputs in zip(PLACES, (width, *WIDTHS), WIDTHS, strict=False):
        found |= {f"layers.{place}.weight": (outputs, inputs), f"layers.{place}.bias": (outputs,)}
    return found
