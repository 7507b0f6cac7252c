"""BRISQUE, NIQE and spectral entropies: other implementations, values worked out by hand, order, edges."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import scipy.fft
import scipy.linalg
import scipy.ndimage
import scipy.special
import torch
from metric_images import PHOTOGRAPH, images, known, scattered, vector
from safetensors.torch import load_file
from torch import Tensor

from adascope_fast.metrics.entropy import BlockEntropy, SpectralEntropy
from adascope_fast.metrics.metric import Metric, grey
from adascope_fast.metrics.naturalness import ASSETS, Brisque, Niqe, _fit, _parameters, halved


def drawn() -> Tensor:
    """Grey levels [210, 300] of the image that others were given."""
    levels = (images(1, 210, 300)[0].double() * 255).round()
    return torch.einsum("chw,c->hw", levels, torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)).round()


def as_image(levels: Tensor) -> Tensor:
    return (levels / 255).float().expand(1, 3, -1, -1)


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    """Grey levels [272, 224]."""
    image = PIL.Image.open(PHOTOGRAPH).convert("L").resize((224, 272), PIL.Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image).copy()).double()


def blurred(levels: Tensor) -> Tensor:
    return torch.from_numpy(scipy.ndimage.gaussian_filter(levels.numpy(), 1.5)).round()


def noisy(levels: Tensor) -> Tensor:
    noise = (scattered(4 * levels.numel()).view(4, *levels.shape) - 0.5).sum(0) * 50
    return (levels + noise).round().clamp(0, 255)


def test_niqe_is_that_of_scikit_video():
    case = known("niqe")
    features = Niqe().features(drawn()).mean(0)
    torch.testing.assert_close(features, torch.tensor(case["features"], dtype=torch.float64), rtol=1e-3, atol=1e-3)
    assert Niqe().rows(as_image(drawn()), ["a"]).item() == pytest.approx(case["score"], rel=1e-4)


def test_niqe_is_the_distance_of_two_gaussians_with_features_that_are_there_twice(photograph: Tensor):
    features, model = Niqe().features(photograph).numpy(), load_file(ASSETS / "niqe.safetensors")
    assert features.shape == (4, 36)
    apart = features.mean(0) - model["mean"].numpy()
    between = (np.cov(features.T) + model["covariance"].numpy()) / 2
    want = np.sqrt(apart @ scipy.linalg.pinv(between, rtol=1e-12) @ apart)
    assert np.linalg.matrix_rank(between, tol=1e-12) == 32
    assert Niqe().rows(as_image(photograph), ["a"]).item() == pytest.approx(want, rel=1e-6)


def test_brisques_features_are_those_of_the_package():
    features = Brisque().features(drawn()[None])[0, :18]
    torch.testing.assert_close(
        features, torch.tensor(known("brisque")["features"], dtype=torch.float64), rtol=0, atol=1e-3
    )


def test_brisques_regression_is_libsvms(monkeypatch: pytest.MonkeyPatch):
    model = {name: tensor.double() for name, tensor in _parameters("brisque").items()}
    places = range(36)
    rows = [[0.0] * 36, [0.1 * (i % 7) - 0.3 for i in places], [(i * 37 % 36) / 18 - 1 for i in places]]
    unscaled = (torch.tensor(rows, dtype=torch.float64) + 1) / 2 * (model["highest"] - model["lowest"]) + model[
        "lowest"
    ]
    monkeypatch.setattr(Brisque, "features", lambda self, levels: unscaled)
    found = Brisque().rows(torch.zeros(3, 3, 16, 16), ["a"] * 3)
    assert found.tolist() == pytest.approx(known("brisque")["regression"], abs=1e-3)


@pytest.mark.parametrize("metric", [Brisque(), Niqe()], ids=["brisque", "niqe"])
def test_a_photograph_is_better_than_a_blurred_and_a_noisy_one(metric: Metric, photograph: Tensor):
    clean, blur, noise = (
        metric.rows(as_image(change(photograph)), ["a"]).item() for change in (lambda it: it, blurred, noisy)
    )
    assert clean < blur
    assert clean < noise
    assert not metric.higher_is_better


def test_an_image_counts_as_the_file_of_8_bits_that_holds_it():
    given = images(1, 40, 40)
    nudged = (given + 0.4 / 255 * torch.tensor([1.0, -1]).repeat(20)).clamp(0, 1)
    assert torch.equal(Brisque().rows(given, ["a"]), Brisque().rows(nudged, ["a"]))


def test_flat_images_have_finite_values():
    flat = torch.full((1, 3, 192, 192), 0.5)
    for metric in (Brisque(), Niqe(), SpectralEntropy(), SpectralEntropy("amplitude", "nats"), BlockEntropy()):
        for given in (
            flat,
            torch.zeros_like(flat),
            flat[..., :192, :192] * torch.tensor([1.0, 0.4, 0.3])[:, None, None],
        ):
            row = metric.rows(given, ["a"])
            assert row.shape == (1,)
            assert bool(row.isfinite().all()), metric.name
            if not isinstance(metric, Brisque | Niqe):
                assert row.item() == 0


def test_small_images_are_refused():
    with pytest.raises(ValueError, match="NIQE needs images of at least 192 x 192 pixels, got 192 x 191; draw larger"):
        Niqe().update(torch.rand(1, 3, 191, 192), ["a"])
    with pytest.raises(ValueError, match="BRI needs images of at least 16 x 16 pixels, got 15 x 40"):
        Brisque().update(torch.rand(1, 3, 40, 15), ["a"])
    with pytest.raises(ValueError, match="SSEQ-SE needs images of at least 8 x 8 pixels"):
        BlockEntropy().update(torch.rand(1, 3, 7, 8), ["a"])


@pytest.mark.parametrize(("height", "width"), [(40, 30), (41, 33)])
def test_halving_is_pillows_with_mirrored_edges(height: int, width: int):
    levels = scattered(height * width).view(height, width)
    even = height % 2 == 0
    padded = np.pad(levels.numpy(), ((8, 8 if even else 9), (8, 8 if even else 9)), mode="symmetric").astype(np.float32)
    size = padded.shape[1] // 2, padded.shape[0] // 2
    want = np.asarray(PIL.Image.fromarray(padded).resize(size, PIL.Image.Resampling.BICUBIC))
    want = want[4 : 4 + -(-height // 2), 4 : 4 + -(-width // 2)]
    found = halved(levels[None])[0]
    assert found.shape == want.shape
    torch.testing.assert_close(found.float(), torch.from_numpy(want.copy()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "left", "right"), [(0.8, 1.0, 2.0), (2.0, 1.5, 1.5), (4.0, 3.0, 0.5)])
def test_the_fit_finds_the_distribution_that_values_are_of(shape: float, left: float, right: float):
    """Quantiles of an asymmetric generalised Gaussian: its weight on a side is that side's scale's share."""
    quantiles = (np.arange(200_000) + 0.5) / 200_000
    scale = math.exp((math.lgamma(1 / shape) - math.lgamma(3 / shape)) / 2)
    share = left / (left + right)
    sides: list[np.ndarray] = []
    for part, deviation in (
        (share - quantiles[quantiles < share], left),
        (quantiles[quantiles >= share] - share, right),
    ):
        whole = share if deviation is left and not sides else 1 - share
        sides.append(deviation * scale * scipy.special.gammaincinv(1 / shape, part / whole) ** (1 / shape))
    values = torch.from_numpy(np.concatenate([-sides[0], sides[1]]))[None]
    found, mean, lower, upper = _fit(values, zero_is_right=True)
    assert found.item() == pytest.approx(shape, rel=0.02)
    assert (lower.item(), upper.item()) == pytest.approx((left, right), rel=0.01)
    assert mean.item() == pytest.approx(values.mean().item(), abs=0.01)


def test_zeros_count_on_the_right_or_on_neither_side():
    values = torch.tensor([[-1.0, 0, 0, 2]], dtype=torch.float64)
    assert _fit(values, zero_is_right=True)[3].item() == pytest.approx((4 / 3) ** 0.5)
    assert _fit(values, zero_is_right=False)[3].item() == pytest.approx(2)


def test_spectral_entropy_is_the_one_worked_out_by_hand():
    case = vector("spectral_entropy")
    levels = torch.tensor(case["img"], dtype=torch.float64)[None]
    assert SpectralEntropy().of(levels).item() == pytest.approx(case["power_bits"], rel=1e-12)
    assert SpectralEntropy("amplitude", "nats").of(levels).item() == pytest.approx(case["amplitude_nats"], rel=1e-12)


def test_spectral_entropy_of_one_wave_is_1_bit_and_of_a_point_is_the_most():
    wave = torch.cos(2 * math.pi * 3 * torch.arange(32.0).double() / 32).expand(1, 16, 32)
    assert SpectralEntropy().of(wave).item() == pytest.approx(1, abs=1e-9)  # two conjugate frequencies
    point = torch.zeros(1, 16, 32, dtype=torch.float64)
    point[0, 3, 5] = 1
    assert SpectralEntropy().of(point).item() == pytest.approx(math.log2(16 * 32 - 1))


def test_the_entropy_of_blocks_is_that_of_scipys_cosine_transform():
    given = images(1, 27, 18)
    levels = grey(given)[0].numpy()
    found = []
    for top in (0, 8, 16):
        for left in (0, 8):
            transform: Any = scipy.fft.dctn(levels[top : top + 8, left : left + 8], norm="ortho")
            power = transform.ravel()[1:] ** 2
            share = power / power.sum()
            found.append(-(share * np.log2(share)).sum())
    assert BlockEntropy().rows(given, ["a"]).item() == pytest.approx(np.mean(found), rel=1e-9)
    assert BlockEntropy().rows(given, ["a"]).item() < math.log2(63)


def test_grey_is_bt_601():
    corners = torch.eye(3)[:, :, None, None]
    assert grey(corners).flatten().tolist() == pytest.approx([0.299, 0.587, 0.114])


@pytest.mark.parametrize("make", [Brisque, SpectralEntropy, BlockEntropy])
def test_an_images_row_does_not_depend_on_its_batch(make: Callable[[], Metric]):
    given = images(5, 33, 40)
    rows = make().rows(given, ["a"] * 5)
    alone = torch.cat([make().rows(given[place : place + 1], ["a"]) for place in range(5)])
    torch.testing.assert_close(rows, alone, rtol=1e-9, atol=1e-9)
