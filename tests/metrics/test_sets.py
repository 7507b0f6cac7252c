"""Metrics of sets by their features: values worked out by hand, other implementations, draws."""

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from metric_images import Pixels, known, scattered, vector, with_features
from torch import Tensor, nn

from adascope_fast.metrics import Metric
from adascope_fast.metrics.entropy import InceptionScore, TruncatedEntropy
from adascope_fast.metrics.frechet import Frechet, KernelDistance
from adascope_fast.metrics.neighbours import Neighbours, f1, precision, recall


def of(metric: Metric, rows: Tensor, reference: Tensor | None = None) -> float:
    """The number of rows as they are, whatever `fewest` says."""
    if reference is not None:
        metric._reference = reference  # type: ignore[attr-defined]
    return metric.value(rows, ["a"] * len(rows))


def cross(mean: list[float], covariance: list[list[float]]) -> Tensor:
    """Four points of the plane with this mean and unbiased covariance."""
    points = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64) * 1.5**0.5
    root = torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64))
    return points @ root.T + torch.tensor(mean, dtype=torch.float64)


def test_the_frechet_distance_is_that_of_two_gaussians():
    case = vector("fid_diag")
    one, other = (cross(case[f"mu{side}"], [[case[f"var{side}"][0], 0], [0, case[f"var{side}"][1]]]) for side in (1, 2))
    assert of(Frechet(Pixels(2)), one, other) == pytest.approx(case["fid"], rel=1e-12)
    case = vector("fid_2x2")
    one, other = (cross(case[f"mu{side}"], case[f"S{side}"]) for side in (1, 2))
    assert of(Frechet(Pixels(2)), one, other) == pytest.approx(case["fid"], rel=1e-12)


@pytest.mark.parametrize(("count", "others", "width"), [(9, 7, 20), (40, 12, 20), (12, 40, 20), (60, 70, 5)])
def test_the_frechet_distance_is_that_of_covariance_matrices_for_any_sizes(count: int, others: int, width: int):
    one, other = scattered(count * width).view(-1, width), scattered(others * width, 9000).view(-1, width) * 1.3
    first, second = np.cov(one.T), np.cov(other.T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # singular matrices
        root: Any = scipy.linalg.sqrtm(first @ second)
    want = ((one.mean(0) - other.mean(0)) ** 2).sum().item() + np.trace(first + second - 2 * root.real)
    assert of(Frechet(Pixels(width)), one, other) == pytest.approx(want, rel=1e-5)


@pytest.fixture(scope="module")
def library() -> tuple[float, float, float]:
    """FID, KID of all images at once, and IS of one split by torchmetrics, of the same images."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore as Theirs
    from torchmetrics.image.kid import KernelInceptionDistance

    class Values(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :6].double() / 255

    one, other = levels()
    found = []
    fid = FrechetInceptionDistance(Values(), input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    kid = KernelInceptionDistance(Values(), subsets=1, subset_size=60)
    for metric in (fid, kid):
        metric.update(other, real=True)
        metric.update(one, real=False)
    found += [fid.compute().item(), kid.compute()[0].item()]
    score = Theirs(Values(), splits=1)
    score.update(one)
    return found[0], found[1], score.compute()[0].item()


def levels() -> tuple[Tensor, Tensor]:
    """Two sets of 60 images of 8 bits."""
    one, other = scattered(360).view(60, 6), scattered(360, 5000).view(60, 6) ** 1.5
    return tuple(with_features((rows * 255).round()).byte() for rows in (one, other))  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore")
def test_frechet_and_kernel_distance_and_inception_score_are_torchmetrics(library: tuple[float, float, float]):
    one, other = (images.double() / 255 for images in levels())
    found: list[float] = []
    for kind in (Frechet, KernelDistance):
        metric, reference = kind(Pixels(6)), kind(Pixels(6))
        metric.update(one, ["a"] * 60)
        reference.update(other, ["a"] * 60)
        metric.against(reference)
        found.append(metric.compute())
    score = InceptionScore(Pixels(6), torch.eye(6), splits=1)
    score.update(one, ["a"] * 60)
    found.append(score.compute())
    assert found == pytest.approx(library, rel=1e-5)


def test_precision_and_recall_are_those_worked_out_by_hand():
    case = vector("precision_recall")
    real, fake = (torch.tensor(case[name], dtype=torch.float64) for name in ("real", "fake"))
    for part, function in (("precision", precision), ("recall", recall), ("f1", f1)):
        metric = Neighbours(Pixels(2), of=function, neighbours=case["k"])
        assert of(metric, fake, real) == pytest.approx(case[part], rel=1e-12)


def test_precision_and_recall_are_prdc():
    real, fake = scattered(80).view(40, 2), scattered(60, 1000).view(30, 2) * 1.2 + 0.15
    case = known("neighbours")
    assert 0.2 < case["precision"] < 0.8
    assert 0.2 < case["recall"] < 0.9
    assert case["precision"] != case["recall"]
    assert of(Neighbours(Pixels(2), of=precision), fake, real) == pytest.approx(case["precision"])
    assert of(Neighbours(Pixels(2), of=recall), fake, real) == pytest.approx(case["recall"])


def test_f1_of_nothing_is_0():
    assert f1(0.0, 0.0) == 0
    near, far = scattered(20).view(10, 2), scattered(20).view(10, 2) + 100
    assert of(Neighbours(Pixels(2), of=f1), near, far) == 0


def test_truncated_entropy_is_of_the_largest_eigenvalues():
    case = vector("tce")
    signs = torch.tensor(list(itertools.product([1.0, -1], repeat=2)), dtype=torch.float64)
    design = torch.stack([signs[:, 0], signs[:, 1], signs.prod(1)], 1) * 0.75**0.5  # covariance 1
    rows = torch.cat([design * torch.tensor(case["eigs"]).sqrt(), 1e-3 * signs[:, :1]], 1)
    rows[:, 3] -= 1e-3 * signs[:, 0] * (1 - 1e-3)  # a fourth direction hardly there
    assert of(TruncatedEntropy(Pixels(4), eigenvalues=3), rows) == pytest.approx(case["tce"], rel=1e-5)
    wide = torch.cat([rows, torch.zeros(4, 9, dtype=torch.float64)], 1)  # fewer images than numbers
    assert of(TruncatedEntropy(Pixels(13), eigenvalues=3), wide) == pytest.approx(case["tce"], rel=1e-5)


def test_truncated_entropy_refuses_too_few_images_and_images_too_alike():
    metric = TruncatedEntropy(Pixels(30))
    metric.update(with_features(scattered(600).view(20, 30)), ["a"] * 20)
    with pytest.raises(ValueError, match="TCE needs at least 21 images, got 20; draw more"):
        metric.compute()
    metric.update(with_features(scattered(600).view(20, 30)), ["b"] * 20)
    with pytest.raises(ValueError, match="TCE needs images that vary in 20 directions"):
        metric.compute()
    metric = TruncatedEntropy(Pixels(10))
    metric.update(with_features(scattered(300).view(30, 10)), ["a"] * 30)
    with pytest.raises(ValueError, match="embeddings of 20 numbers, got 10; use another CLIP"):
        metric.compute()


def test_inception_score_is_the_one_worked_out_by_hand_and_a_mean_over_splits():
    case = vector("inception_score")
    rows = torch.tensor(case["p"], dtype=torch.float64)
    assert of(InceptionScore(Pixels(), torch.eye(2), splits=1), rows) == pytest.approx(case["is_"], rel=1e-12)
    # Dealt in turn: each split has one of each row.
    dealt = rows.repeat_interleave(4, 0)
    assert of(InceptionScore(Pixels(), torch.eye(2), splits=4), dealt) == pytest.approx(case["is_"], rel=1e-12)


def test_inception_score_has_probabilities_without_bias():
    weight = torch.tensor([[1.0, 0, 0], [0, 2, 0]])
    metric = InceptionScore(Pixels(), weight)
    rows = metric.rows(with_features(torch.tensor([[0.5, 0.25, 1.0]])), ["a"])
    assert torch.allclose(rows, torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    with pytest.raises(ValueError, match="IS needs at least 20 images, got 0"):
        metric.compute()


def test_the_kernel_distance_of_copies_counts_no_pair_with_itself():
    rows, reference = scattered(30).view(10, 3), scattered(30, 400).view(10, 3)
    metric = KernelDistance(Pixels())
    metric._reference = reference
    number = metric.choice(rows)
    once = number(torch.arange(10), ["a"] * 10)
    twice = number(torch.arange(10).repeat(2), ["a"] * 20)
    assert once == pytest.approx(twice, rel=1e-12)


@pytest.mark.parametrize("kind", ["frechet", "kernel", "neighbours"])
def test_a_draw_is_the_number_of_its_images(kind: str):
    """What is computed once for all draws gives what each draw alone would; copies counted as weights or not."""
    rows, reference = scattered(60).view(20, 3), scattered(60, 700).view(20, 3)
    metric = {
        "frechet": Frechet(Pixels()),
        "kernel": KernelDistance(Pixels()),
        "neighbours": Neighbours(Pixels(), of=f1),
    }[kind]
    metric._reference = reference
    index = torch.tensor([3, 3, 3, 7, 1, 0, 12, 12, 19, 5])
    drawn = metric.choice(rows)(index, ["a"] * 10)
    if kind == "frechet":
        assert drawn == pytest.approx(of(metric, rows[index], reference), rel=1e-9)
    elif kind == "kernel":
        assert drawn == pytest.approx(metric.choice(rows)(index.flip(0), ["a"] * 10), rel=1e-12)
        distinct = torch.tensor([0, 4, 9])
        assert metric.choice(rows)(distinct, ["a"] * 3) == pytest.approx(of(metric, rows[distinct], reference))
    else:
        assert 0 <= drawn <= 1
        everyone = metric.choice(rows)(torch.arange(20).repeat(2), ["a"] * 40)
        assert everyone == pytest.approx(of(metric, rows, reference)), "copies shrink no radius"


def test_a_set_is_compared_with_one_of_its_own_kind_that_is_large_enough():
    one, small, other = Frechet(Pixels(), "FID"), Frechet(Pixels(), "FID"), KernelDistance(Pixels())
    rows = with_features(scattered(180).view(60, 3))
    one.update(rows, ["a"] * 60)
    with pytest.raises(ValueError, match=r"FID compares with a reference set, got none; call against\(\)"):
        one.compute()
    with pytest.raises(ValueError, match="metric of its own kind and features, got KID"):
        one.against(other)
    elsewhere = Frechet(Pixels(), "FID")
    elsewhere.features.facts = {"network": "another"}
    with pytest.raises(ValueError, match="metric of its own kind and features, got FID"):
        one.against(elsewhere)
    small.update(rows[:49], ["a"] * 49)
    with pytest.raises(ValueError, match="the reference set is too small: FID needs at least 50 images, got 49"):
        one.against(small)
    small.update(rows[49:], ["a"] * 11)
    one.against(small)
    assert one.compute() == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="TCE is of one set of images, got a reference"):
        TruncatedEntropy(Pixels()).against(one)


def test_the_interval_of_a_distance_covers_other_sets_of_the_same_kind():
    def drawn(seed: int) -> Frechet:
        generator = torch.Generator().manual_seed(seed)
        centres = torch.rand(40, 1, 4, generator=generator, dtype=torch.float64)
        rows = (centres + 0.2 * torch.rand(40, 4, 4, generator=generator, dtype=torch.float64)).flatten(0, 1) / 1.2
        metric = Frechet(Pixels(4))
        metric.update(with_features(rows), [f"{place // 4}" for place in range(160)])
        return metric

    reference, values, spreads = drawn(0), [], []
    for seed in range(1, 13):
        metric = drawn(seed)
        metric.against(reference)
        values.append(metric.compute())
        spreads.append(metric.bootstrap(seed).std().item())
    between = np.std(values, ddof=1)
    assert 0.7 * between < np.mean(spreads) < 3 * between
    assert all(math.isfinite(spread) for spread in spreads)
