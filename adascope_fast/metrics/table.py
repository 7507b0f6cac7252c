"""The registry: the thirteen metrics of the paper's Table 3 in its order, and others besides, by key."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from adascope_fast.metrics import neighbours
from adascope_fast.metrics.entropy import BlockEntropy, InceptionScore, SpectralEntropy, TruncatedEntropy
from adascope_fast.metrics.frechet import Frechet, KernelDistance
from adascope_fast.metrics.lpips import Diversity
from adascope_fast.metrics.metric import Metric
from adascope_fast.metrics.naturalness import Brisque, Niqe
from adascope_fast.metrics.neighbours import Neighbours
from adascope_fast.metrics.scores import ClipScore, ScoreOf
from adascope_fast.metrics.sources import Sources

Group = Literal["preference", "fidelity", "diversity", "quality"]


@dataclass(frozen=True)
class Row:
    """A metric that can be made: what tables say of it, and what makes it.

    Attributes:
        key: what commands call it.
        name: what it is called in a heading.
        title: what it is, in words.
        group: of the paper's table.
        needs_reference: whether `against` has to be called before `compute`.
        maker: what makes it of the networks.
    """

    key: str
    name: str
    title: str
    group: Group
    higher_is_better: bool
    maker: Callable[[Sources], Metric]
    needs_reference: bool = False

    def make(self, sources: Sources) -> Metric:
        """An empty metric.

        Raises:
            Unavailable: weights or a package are missing; the line says which, and how to get them.
            ValueError: their files are damaged.
        """
        return self.maker(sources)


def _preference(key: str, name: str, title: str, section: str, **folders: str) -> Row:
    """A preference model; `folders` are those of other networks that it needs, by key of its section."""

    def make(sources: Sources) -> Metric:
        return ScoreOf(sources.reward(section, key, name, **folders), name, {"weights": key})

    return Row(key, name, title, "preference", True, make)


def _frechet(key: str, name: str, title: str, features: str) -> Row:
    def make(sources: Sources) -> Metric:
        return Frechet(sources.features(features, name), name)

    return Row(key, name, title, "fidelity", False, make, needs_reference=True)


def _neighbours(key: str, name: str, title: str, of: Callable[[float, float], float]) -> Row:
    def make(sources: Sources) -> Metric:
        return Neighbours(sources.features("vgg16", name), name=name, of=of)

    return Row(key, name, title, "fidelity", True, make, needs_reference=True)


def _clip_score(sources: Sources) -> Metric:
    return ClipScore(sources.features("clip", "CLIP"), sources.clip("CLIP"))


def _inception_score(sources: Sources) -> Metric:
    return InceptionScore(sources.features("inception", "IS"), sources.inception("IS").fc.weight)


ROWS: tuple[Row, ...] = (
    _preference("pick_score", "PS", "PickScore", "PickScore"),
    _preference("aesthetic", "AES", "LAION aesthetic V2", "Aesthetic", clip="clip"),
    _preference("image_reward", "IR", "ImageReward", "ImageReward"),
    _preference("hpsv2", "HPSv2", "Human Preference Score v2", "Hpsv2"),
    _frechet("fid", "FID", "Fréchet Inception distance", "inception"),
    Row("clip_score", "CLIP", "CLIP score", "fidelity", True, _clip_score),
    _neighbours("ifs", "iFS", "F1 of improved precision and recall", neighbours.f1),
    Row(
        "lpips",
        "LPIPS",
        "ST-LPIPS between images of a prompt",
        "diversity",
        True,
        lambda it: Diversity(it.distance(needs="LPIPS")),
    ),
    Row("inception_score", "IS", "Inception score", "diversity", True, _inception_score),
    Row(
        "tce",
        "TCE",
        "truncated CLIP entropy",
        "diversity",
        True,
        lambda it: TruncatedEntropy(it.features("clip", "TCE")),
    ),
    Row("brisque", "BRI", "BRISQUE", "quality", False, lambda it: Brisque()),
    Row("niqe", "NIQE", "NIQE", "quality", False, lambda it: Niqe()),
    Row("spectral_entropy", "SE", "spectral entropy", "quality", True, lambda it: SpectralEntropy()),
)
"""The paper's, in its order."""

BESIDES: tuple[Row, ...] = (
    _frechet("frechet_clip", "FD-CLIP", "Fréchet distance of CLIP embeddings; no FID", "clip"),
    _frechet("frechet_vgg", "FD-VGG", "Fréchet distance of VGG-16 features; no FID", "vgg16"),
    Row(
        "kid",
        "KID",
        "kernel Inception distance",
        "fidelity",
        False,
        lambda it: KernelDistance(it.features("inception", "KID")),
        needs_reference=True,
    ),
    _neighbours("precision", "iP", "improved precision", neighbours.precision),
    _neighbours("recall", "iR", "improved recall", neighbours.recall),
    Row(
        "spectral_entropy_amplitude",
        "SE-A",
        "spectral entropy of the amplitude",
        "quality",
        True,
        lambda it: SpectralEntropy("amplitude", "nats", "SE-A"),
    ),
    Row("sseq", "SSEQ-SE", "spectral entropy of blocks", "quality", True, lambda it: BlockEntropy()),
)
"""Others, which the paper has not."""


def row(key: str) -> Row:
    """The metric of that key; ValueError if there is none."""
    known = {one.key: one for one in (*ROWS, *BESIDES)}
    if key not in known:
        raise ValueError(f"a metric must be one of {', '.join(known)}, got {key!r:.80}; choose one of them")
    return known[key]
