"""The Inception-v3 of FID and the inception score: the TensorFlow network of 2015-12-05, as pytorch-fid converted it.

It is not torchvision's: averages leave the padding out, the last block's pool takes maxima, there are 1008 classes, and
images come as 8-bit levels, scaled to 299 px as TensorFlow 1 did, without half a pixel's shift, and to [-1, 1). Nobody
else's images or scaling give numbers that compare. The last layer's bias is left out, as in the first implementation.

Weights: a safetensors file with the names of `pt_inception-2015-12-05-6726825d.pth`, which
`adascope-fast import-weights` makes of that.

Axes: `n` images.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adascope_fast.metrics.vgg import loaded

SIZE = 299  # pixels
POOL, CLASSES = 2048, 1008


class InceptionV3(nn.Module):
    """Averages [n, 2048] over places of the last block, of images [n, 3, h, w] in [0, 1]; `logits` of those."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = _Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = _Unit(80, 192, 3)
        self.Mixed_5b = _a(192, pool=32)
        self.Mixed_5c = _a(256, pool=64)
        self.Mixed_5d = _a(288, pool=64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b = _c(768, inner=128)
        self.Mixed_6c = _c(768, inner=160)
        self.Mixed_6d = _c(768, inner=160)
        self.Mixed_6e = _c(768, inner=192)
        self.Mixed_7a = _d(768)
        self.Mixed_7b = _e(1280, pool="average")
        self.Mixed_7c = _e(2048, pool="highest")
        self.fc = nn.Linear(POOL, CLASSES, bias=False)

    @classmethod
    def load(cls, file: Path) -> "InceptionV3":
        """The network of a file, frozen; ValueError unless the weights are its own."""
        return loaded(cls, file, "FID's Inception-v3", "inception")

    def forward(self, images: Tensor) -> Tensor:
        levels = images.clamp(0, 1).mul(255).round()
        x = (_scaled(levels) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))

    def logits(self, pool: Tensor) -> Tensor:
        """What the classes' probabilities are the softmax of, [n, 1008]."""
        return self.fc(pool)


class _Unit(nn.Module):
    """Convolution, normalisation by stored statistics, rectifier."""

    def __init__(
        self,
        before: int,
        width: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Step(NamedTuple):
    """A unit of a block: what it reads (a unit's name, the block's input, or a pool of it), and its shape."""

    source: str
    width: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1


_POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False),
    "highest": lambda x: F.max_pool2d(x, 3, 1, padding=1),
    "halved": lambda x: F.max_pool2d(x, 3, 2),
}


class _Block(nn.Module):
    """Units that read one another; the block's maps are those of `outputs`, one after the other."""

    def __init__(self, before: int, steps: Mapping[str, _Step], *outputs: str) -> None:
        super().__init__()
        self.steps, self.outputs = steps, outputs
        for name, step in steps.items():
            source = steps[step.source].width if step.source in steps else before
            height, width = step.kernel if isinstance(step.kernel, tuple) else (step.kernel, step.kernel)
            padding = (height // 2, width // 2) if step.stride == 1 else 0
            self.add_module(name, _Unit(source, step.width, step.kernel, step.stride, padding))

    def forward(self, x: Tensor) -> Tensor:
        maps = {"x": x}
        for name, pool in _POOLS.items():
            if name in self.outputs or any(step.source == name for step in self.steps.values()):
                maps[name] = pool(x)
        for name, step in self.steps.items():
            maps[name] = self.get_submodule(name)(maps[step.source])
        return torch.cat([maps[name] for name in self.outputs], 1)


def _a(before: int, pool: int) -> _Block:
    steps = {
        "branch1x1": _Step("x", 64),
        "branch5x5_1": _Step("x", 48),
        "branch5x5_2": _Step("branch5x5_1", 64, 5),
        "branch3x3dbl_1": _Step("x", 64),
        "branch3x3dbl_2": _Step("branch3x3dbl_1", 96, 3),
        "branch3x3dbl_3": _Step("branch3x3dbl_2", 96, 3),
        "branch_pool": _Step("average", pool),
    }
    return _Block(before, steps, "branch1x1", "branch5x5_2", "branch3x3dbl_3", "branch_pool")


def _b(before: int) -> _Block:
    steps = {
        "branch3x3": _Step("x", 384, 3, 2),
        "branch3x3dbl_1": _Step("x", 64),
        "branch3x3dbl_2": _Step("branch3x3dbl_1", 96, 3),
        "branch3x3dbl_3": _Step("branch3x3dbl_2", 96, 3, 2),
    }
    return _Block(before, steps, "branch3x3", "branch3x3dbl_3", "halved")


def _c(before: int, inner: int) -> _Block:
    across, down = (1, 7), (7, 1)
    steps = {
        "branch1x1": _Step("x", 192),
        "branch7x7_1": _Step("x", inner),
        "branch7x7_2": _Step("branch7x7_1", inner, across),
        "branch7x7_3": _Step("branch7x7_2", 192, down),
        "branch7x7dbl_1": _Step("x", inner),
        "branch7x7dbl_2": _Step("branch7x7dbl_1", inner, down),
        "branch7x7dbl_3": _Step("branch7x7dbl_2", inner, across),
        "branch7x7dbl_4": _Step("branch7x7dbl_3", inner, down),
        "branch7x7dbl_5": _Step("branch7x7dbl_4", 192, across),
        "branch_pool": _Step("average", 192),
    }
    return _Block(before, steps, "branch1x1", "branch7x7_3", "branch7x7dbl_5", "branch_pool")


def _d(before: int) -> _Block:
    steps = {
        "branch3x3_1": _Step("x", 192),
        "branch3x3_2": _Step("branch3x3_1", 320, 3, 2),
        "branch7x7x3_1": _Step("x", 192),
        "branch7x7x3_2": _Step("branch7x7x3_1", 192, (1, 7)),
        "branch7x7x3_3": _Step("branch7x7x3_2", 192, (7, 1)),
        "branch7x7x3_4": _Step("branch7x7x3_3", 192, 3, 2),
    }
    return _Block(before, steps, "branch3x3_2", "branch7x7x3_4", "halved")


def _e(before: int, pool: str) -> _Block:
    steps = {
        "branch1x1": _Step("x", 320),
        "branch3x3_1": _Step("x", 384),
        "branch3x3_2a": _Step("branch3x3_1", 384, (1, 3)),
        "branch3x3_2b": _Step("branch3x3_1", 384, (3, 1)),
        "branch3x3dbl_1": _Step("x", 448),
        "branch3x3dbl_2": _Step("branch3x3dbl_1", 384, 3),
        "branch3x3dbl_3a": _Step("branch3x3dbl_2", 384, (1, 3)),
        "branch3x3dbl_3b": _Step("branch3x3dbl_2", 384, (3, 1)),
        "branch_pool": _Step(pool, 192),
    }
    outputs = "branch1x1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b", "branch_pool"
    return _Block(before, steps, *outputs)


def _scaled(images: Tensor) -> Tensor:
    """Images [n, 3, 299, 299] by linear interpolation, output pixel i at i times the ratio of sizes in the input."""
    down, across = (_interpolation(size, images) for size in images.shape[-2:])
    return down @ images @ across.T


def _interpolation(size: int, like: Tensor) -> Tensor:
    """The matrix [299, size] of linear interpolation to 299 values."""
    place = torch.arange(SIZE, device=like.device, dtype=torch.float32) * (size / SIZE)
    low = place.floor().long()
    part = (place - low)[:, None]
    identity = torch.eye(size, device=like.device, dtype=torch.float32)
    return ((1 - part) * identity[low] + part * identity[(low + 1).clamp(max=size - 1)]).to(like.dtype)
