"""ST-LPIPS: how different two images look, by the features of a network (Zhang et al. 2018; Ghildyal and Liu 2022).

Features of five layers are scaled to unit length at each place; the squared difference is weighed by channel, averaged
over places, and summed over layers. It is not LPIPS 0.1: trunk and weights are those of the shift-tolerant variant,
whose values do not compare. It has convolutions of stride 1, and blurs, with reflected edges, before
it drops every other value.

Axes: `n` images, `p` pairs, `d` all values of the five layers.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adascope_fast.metrics.metric import Metric
from adascope_fast.weights.st_lpips import PACKAGE, Trunk, read

LEAST = 24  # pixels


class Distance:
    """Distance [n] of images [n, 3, h, w] in [0, 1] to others of the same shape; 0 for equal ones.

    Args:
        trunk: AlexNet or VGG-16.
        batch: images at once.

    Raises:
        ValueError: the package with the weights is not installed.
    """

    least = LEAST

    def __init__(self, trunk: Trunk = "alex", device: str | torch.device = "cpu", batch: int = 32) -> None:
        self.device, self.batch = torch.device(device), batch
        self.trunk, heads = load(trunk)
        self.trunk.to(self.device)
        # A weight is never below 0, so its root can be put into the features: what is left is a sum of squares.
        self._roots = [head.sqrt().to(self.device) for head in heads]
        self.facts = {"network": f"ST-LPIPS {trunk}", "weights": PACKAGE}

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape != y.shape or x.ndim != 4 or min(x.shape[-2:]) < LEAST:
            raise ValueError(
                f"ST-LPIPS compares images of one shape, at least {LEAST} x {LEAST} pixels, got {list(x.shape)} and "
                f"{list(y.shape)}; give such"
            )
        parts = zip(x.split(self.batch), y.split(self.batch), strict=True)
        return torch.cat([(self.features(one) - self.features(other)).square().sum(1) for one, other in parts])

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features [n, d] of which the squared distance is the one of the images."""
        layers = []
        for maps, root in zip(self.trunk(images.float().to(self.device)), self._roots, strict=True):
            scale = (maps.shape[2] * maps.shape[3]) ** -0.5
            unit = maps / (maps.square().sum(1, keepdim=True).sqrt() + 1e-10)
            layers.append((unit * root[:, None, None] * scale).flatten(1))
        return torch.cat(layers, 1)

    @torch.no_grad()
    def pairs(self, images: Tensor) -> Tensor:
        """Distance [n (n - 1) / 2] of each two of the images."""
        found = torch.cat([self.features(part) for part in images.split(self.batch)])
        return torch.cat([(found[place + 1 :] - found[place]).square().sum(1) for place in range(len(found) - 1)])


class Diversity(Metric):
    """Mean ST-LPIPS of each two images of the same prompt, then mean over prompts; 0: all of a prompt are alike.

    A row is a prompt. Its images come one after the other and are kept until those of the next one come.
    """

    name, title, higher_is_better, fewest, least = "LPIPS", "ST-LPIPS of images of a prompt", True, 2, LEAST

    def __init__(self, distance: Distance) -> None:
        super().__init__()
        self.distance = distance
        self._open: list[Tensor] = []
        self._prompt: str | None = None
        self._closed: set[str] = set()
        self._num_images = 0

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Take images in; ValueError for a prompt with one image alone, or that comes again after another."""
        self.check(images, prompts)
        for image, prompt in zip(images, prompts, strict=True):
            if prompt != self._prompt:
                if self._prompt is not None:
                    self._rows.append(self._row())
                    self._prompts.append(self._prompt)
                    self._closed.add(self._prompt)
                    self._open, self._prompt = [], None
                if prompt in self._closed:
                    raise ValueError(
                        f"{self.name} needs the images of a prompt one after the other, got {prompt!r:.80} again after "
                        f"others; sort them by prompt"
                    )
                self._prompt = prompt
            if self._open and image.shape != self._open[0].shape:
                raise ValueError(
                    f"{self.name} needs images of a prompt of one size, got {list(image.shape[1:])} and "
                    f"{list(self._open[0].shape[1:])} for {prompt!r:.80}; draw them alike"
                )
            self._open.append(image.detach().clone())
            self._num_images += 1

    def compute(self) -> float:
        with _Closed(self):
            return super().compute()

    def bootstrap(self, seed: int = 0) -> Tensor:
        with _Closed(self):
            return super().bootstrap(seed)

    def spread(self) -> float:
        with _Closed(self):
            return super().spread()

    def __len__(self) -> int:
        return self._num_images

    def rows(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The mean distance [1] of images of one prompt."""
        return self.distance.pairs(images).mean()[None]

    def value(self, rows: Tensor, prompts: Sequence[str]) -> float:
        return rows.mean().item()

    def facts(self) -> dict[str, Any]:
        return self.distance.facts

    def _row(self) -> Tensor:
        if len(self._open) < 2:
            raise ValueError(
                f"{self.name} needs at least 2 images of each prompt, got 1 of {self._prompt!r:.80}; draw more"
            )
        return self.rows(torch.stack(self._open), []).to("cpu", torch.float64)


class _Closed:
    """The metric with the prompt that is still open among its rows, which is open again afterwards."""

    def __init__(self, metric: Diversity) -> None:
        self.metric, self.rows, self.prompts = metric, metric._rows, metric._prompts

    def __enter__(self) -> None:
        if self.metric._open:
            self.metric._rows = [*self.rows, self.metric._row()]
            self.metric._prompts = [*self.prompts, str(self.metric._prompt)]

    def __exit__(self, *raised: object) -> None:
        self.metric._rows, self.metric._prompts = self.rows, self.prompts


class Network(nn.Module):
    """The five maps [n, c, h, w] of a trunk, each after a rectifier, of images in [0, 1].

    Args:
        layers: modules of each of the five, which are counted through, as in the package's file.
    """

    def __init__(self, layers: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__()
        self.scaling_layer, self.net = _Scale(), nn.ModuleDict()
        number = count()
        for place, layer in enumerate(layers):
            named = OrderedDict((str(next(number)), module) for module in layer)
            self.net[f"slice{place + 1}"] = nn.Sequential(named)

    def forward(self, images: Tensor) -> list[Tensor]:
        """All five."""
        maps, found = self.scaling_layer(images), []
        for layer in self.net.values():
            maps = layer(maps)
            found.append(maps)
        return found


def load(trunk: Trunk) -> tuple[Network, list[Tensor]]:
    """The network, frozen, and the weight [c] of each channel of its five maps; ValueError where they are not there."""
    tensors = read(trunk)
    try:
        heads = [tensors.pop(f"lin{layer}.model.1.weight").flatten() for layer in range(5)]
        network = Network(_LAYERS[trunk]())
        network.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the file of {trunk} must be that of {PACKAGE}, got another: {why}; install it again"
        ) from error
    # This order of memory takes a fifth off the time on a CPU.
    return network.requires_grad_(False).eval().to(memory_format=torch.channels_last), heads


class _Scale(nn.Module):
    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(1, 3, 1, 1))
        self.register_buffer("scale", torch.ones(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images * 2 - 1 - self.shift) / self.scale


class _Blur(nn.Module):
    """Every other value of a map blurred by the filter of its state, [1, 2, 1] both ways, with reflected edges."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", torch.zeros(channels, 1, 3, 3))

    def forward(self, maps: Tensor) -> Tensor:
        return F.conv2d(F.pad(maps, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=maps.shape[1])


def _alex() -> list[list[nn.Module]]:
    return [
        [nn.Conv2d(3, 64, 11, padding=2), _Blur(64), nn.ReLU()],
        [nn.MaxPool2d(3, 1), _Blur(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()],
        [nn.MaxPool2d(3, 1), _Blur(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()],
    ]


def _vgg() -> list[list[nn.Module]]:
    found, before = [], 3
    for width, num in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layer: list[nn.Module] = [nn.MaxPool2d(2, 1), _Blur(before)] if found else []
        for place in range(num):
            layer += [nn.Conv2d(width if place else before, width, 3, padding=1), nn.ReLU()]
        found.append(layer)
        before = width
    return found


_LAYERS = {"alex": _alex, "vgg": _vgg}
