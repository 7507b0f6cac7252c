"""Entropies: of classes (inception score), of embeddings (truncated CLIP entropy), and of an image's spectrum.

The spectral entropy of the paper's table, 11 to 12, is of the whole image's Fourier spectrum; SSEQ's (Liu et al. 2014),
of blocks of 8 x 8, cannot exceed log2 63 = 5.98 and is a number of its own.

Axes: `n` images, `c` classes, `k` numbers of an embedding.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from adascope_fast.metrics.metric import MeanScore, Metric, grey

EIGENVALUES = 20
SPLITS = 10
BLOCK = 8  # pixels


class InceptionScore(Metric):
    """exp of the mean KL divergence of p(class | image) from p(class), mean over splits (Salimans et al. 2016); from 1.

    Images are dealt to the splits in turn: those of one prompt, which come one after the other, fall into different
    ones. It grows with the number of images.

    Args:
        features: images to features, with `name`, `least` and `facts`.
        weight: [c, k] of the last layer, which has no bias here, as in the first implementation.
        splits: among which the images are dealt.
    """

    name, title, higher_is_better, draws = "IS", "inception score", True, 100

    def __init__(self, features: Any, weight: Tensor, splits: int = SPLITS) -> None:
        super().__init__()
        self.features, self.weight, self.splits = features, weight, splits
        self.least, self.fewest = features.least, 2 * splits

    def rows(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Probabilities [n, c]."""
        found = self.features(images).double()
        return (found @ self.weight.to(found).T).softmax(1)

    def value(self, rows: Tensor, prompts: Sequence[str]) -> float:
        scores = []
        for split in range(self.splits):
            part = rows[split :: self.splits]
            divergence = (torch.xlogy(part, part) - torch.xlogy(part, part.mean(0))).sum(1)
            scores.append(divergence.mean().exp().item())
        return sum(scores) / len(scores)

    def facts(self) -> dict[str, Any]:
        return self.features.facts | {"splits": self.splits}


class TruncatedEntropy(Metric):
    """(K/2) ln(2 pi e) + (1/2) sum of ln of the K largest eigenvalues of the embeddings' covariance, in nats.

    (Ibarrola and Grace 2024), of embeddings that are not normalised. Images that vary in fewer than K directions
    have none.

    Args:
        features: images to embeddings, with `name`, `least` and `facts`.
        eigenvalues: K.
    """

    name, title, higher_is_better, unit, draws = "TCE", "truncated CLIP entropy", True, "nats", 50

    def __init__(self, features: Any, eigenvalues: int = EIGENVALUES) -> None:
        super().__init__()
        self.features, self.eigenvalues = features, eigenvalues
        self.least, self.fewest = features.least, eigenvalues + 1

    def rows(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.features(images)

    def value(self, rows: Tensor, prompts: Sequence[str]) -> float:
        num_images, width = rows.shape
        if width < self.eigenvalues:
            raise ValueError(
                f"{self.name} needs embeddings of {self.eigenvalues} numbers, got {width}; use another CLIP"
            )
        centred = rows - rows.mean(0)
        # The smaller of the two products: both have the same eigenvalues.
        product = centred @ centred.T if num_images < width else centred.T @ centred
        largest = torch.linalg.eigvalsh(product / (num_images - 1))[-self.eigenvalues :]
        if largest[0] <= largest[-1] * width * torch.finfo(torch.float32).eps ** 2:
            raise ValueError(
                f"{self.name} needs images that vary in {self.eigenvalues} directions, got some that are too alike; "
                f"draw more"
            )
        return self.eigenvalues / 2 * math.log(2 * math.pi * math.e) + largest.log().sum().item() / 2

    def facts(self) -> dict[str, Any]:
        return self.features.facts | {"eigenvalues": self.eigenvalues}


class SpectralEntropy(MeanScore):
    """-sum P log P of the grey image's Fourier spectrum without its mean; 0 for a flat image.

    Args:
        kind: whether P is of the spectrum's power or amplitude.
        base: of the logarithm.
        name: what tables call it.
    """

    name, title, higher_is_better, least = "SE", "spectral entropy", True, 2

    def __init__(
        self,
        kind: Literal["power", "amplitude"] = "power",
        base: Literal["bits", "nats"] = "bits",
        name: str = "SE",
    ) -> None:
        super().__init__()
        self.kind, self.base, self.name = kind, base, name
        self.unit = base

    def rows(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.of(grey(images))

    def of(self, levels: Tensor) -> Tensor:
        """Entropy [n] of grey images [n, h, w]."""
        spectrum = torch.fft.fft2(levels.double()).abs().flatten(1)
        spectrum[:, 0] = 0
        # What is left of a flat image by rounding has no entropy.
        spectrum[spectrum.amax(1) < 1e-12 * levels[0].numel()] = 0
        entropy = _entropy(spectrum.square() if self.kind == "power" else spectrum)
        return entropy / math.log(2) if self.base == "bits" else entropy

    def facts(self) -> dict[str, Any]:
        return {"spectrum": self.kind, "logarithm": self.base}


class BlockEntropy(MeanScore):
    """Mean over blocks of 8 x 8 of -sum P log2 P of their cosine transform's power without the mean (Liu et al. 2014).

    The feature of SSEQ, not its trained score; at most log2 63. Rows and columns that fill no block are left out.
    """

    name, title, higher_is_better, unit, least = "SSEQ-SE", "spectral entropy of blocks", True, "bits", BLOCK

    def rows(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        levels = grey(images)
        blocks = levels.unfold(1, BLOCK, BLOCK).unfold(2, BLOCK, BLOCK)  # [n, rows, columns, 8, 8]
        transform = _cosines().to(levels.device)
        power = (transform @ blocks @ transform.T).square().flatten(3)
        power[..., 0] = 0
        power[power.amax(-1) < 1e-18] = 0
        return _entropy(power).mean((1, 2)) / math.log(2)


def _entropy(weights: Tensor) -> Tensor:
    """-sum P ln P over the last axis, P the share of each weight; 0 where all are 0."""
    total = weights.sum(-1, keepdim=True)
    share = torch.where(total > 0, weights / total, 0.0)
    return -torch.xlogy(share, share).sum(-1)


@cache
def _cosines() -> Tensor:
    """The orthonormal DCT-II of 8 numbers, [8, 8]."""
    return torch.from_numpy(scipy.fft.dct(np.eye(BLOCK), norm="ortho", axis=0))
