"""The registry and the networks behind it: what is there, what is missing, and what is computed once."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from metric_images import images
from safetensors.torch import save_file
from torch import Tensor, nn

from adascope_fast.metrics import BESIDES, ROWS, Metric, Row, ScoreOf, Sources, Unavailable, row, sources
from adascope_fast.metrics.frechet import Frechet
from adascope_fast.metrics.inception import InceptionV3
from adascope_fast.rewards import settings
from adascope_fast.weights import st_lpips

HERE = ["clip_score", "ifs", "lpips", "tce", "brisque", "spectral_entropy"]
HERE += ["frechet_clip", "frechet_vgg", "spectral_entropy_amplitude", "sseq"]


class TinyInception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5, bias=False)

    def forward(self, given: Tensor) -> Tensor:
        return given[:, :, :2, 0].flatten(1)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an Inception-v3, whose network is a stand-in."""
    (tmp_path / "inception").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "inception" / "model.safetensors")
    monkeypatch.setattr(InceptionV3, "load", lambda file: TinyInception().requires_grad_(False))
    return tmp_path


def test_the_rows_are_the_papers_in_its_order():
    groups_in_order = [one.group for one in ROWS]
    assert groups_in_order == sorted(groups_in_order, key=groups_in_order.index)
    groups = [
        [one.name for one in ROWS if one.group == group] for group in ("preference", "fidelity", "diversity", "quality")
    ]
    assert groups == [
        ["PS", "AES", "IR", "HPSv2"],
        ["FID", "CLIP", "iFS"],
        ["LPIPS", "IS", "TCE"],
        ["BRI", "NIQE", "SE"],
    ]
    assert [one.name for one in ROWS if not one.higher_is_better] == ["FID", "BRI", "NIQE"]
    assert [one.name for one in ROWS if one.needs_reference] == ["FID", "iFS"]
    assert len({one.key for one in (*ROWS, *BESIDES)}) == len({one.name for one in (*ROWS, *BESIDES)}) == 20
    assert not [one for one in BESIDES if "FID" in one.name]
    assert row("fid") is ROWS[4]
    with pytest.raises(ValueError, match=r"a metric must be one of pick_score, .* got 'contrast'"):
        row("contrast")


def made(key: str, given: Sources, batch: int, start: int = 0) -> Metric:
    """The metric of 15 prompts with 4 images each."""
    one = row(key)
    metric = one.make(given)
    side = 192 if key == "niqe" else 24
    num_prompts = 2 if key == "niqe" else 15
    pictures = images(start + 4 * num_prompts, side, side)[start:]
    prompts = [f"prompt {place // 4}" for place in range(len(pictures))]
    for first in range(0, len(pictures), batch):
        metric.update(pictures[first : first + batch], prompts[first : first + batch])
    assert len(metric) == len(pictures)
    return metric


@pytest.mark.parametrize("key", [*HERE, "niqe", "fid", "kid", "inception_score"])
def test_no_number_or_draw_depends_on_how_images_are_batched(key: str, weights: Path):
    given = Sources(weights, clip="scenes-clip", batch=16)
    metrics = [made(key, given, batch) for batch in (60, 7)]
    assert (metrics[0].name, metrics[0].higher_is_better) == (row(key).name, row(key).higher_is_better)
    if row(key).needs_reference:
        for metric in metrics:
            with pytest.raises(ValueError, match="compares with a reference set, got none"):
                metric.compute()
            metric.against(made(key, given, 60, start=30))
    one, other = metrics
    assert one.compute() == pytest.approx(other.compute(), rel=1e-4, abs=1e-6)
    drawn = one.bootstrap(3)
    assert bool(drawn.isfinite().any())
    torch.testing.assert_close(drawn, other.bootstrap(3), rtol=1e-3, atol=1e-4, equal_nan=True)
    assert torch.equal(drawn.isfinite(), one.bootstrap(3).isfinite())


@pytest.mark.parametrize("one", [*ROWS, *BESIDES], ids=lambda one: one.key)
def test_every_metric_refuses_an_empty_set_and_what_is_no_image(
    one: Row, weights: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_in(weights, monkeypatch)
    metric = one.make(Sources(weights, clip="scenes-clip"))
    with pytest.raises(ValueError, match=f"{one.name} needs at least [0-9]+ images, got 0; draw more"):
        metric.compute()
    metric.update(torch.rand(0, 3, 200, 200), [])
    assert len(metric) == len(metric.bootstrap()) == 0
    for given, prompts, told in (
        (torch.rand(1, 1, 200, 200), ["a"], "of floats in"),
        (torch.randint(255, (1, 3, 200, 200)).byte(), ["a"], "got .* of uint8; convert them"),
        (torch.rand(2, 3, 200, 200), ["a"], "needs a prompt an image, got 1 of 2"),
        (torch.rand(1, 3, 200, 200) - 0.1, ["a"], r"must be in \[0, 1\], got values from -.*; scale them"),
        (torch.rand(1, 3, 200, 200) * 255, ["a"], r"must be in \[0, 1\], got values from .*; scale them"),
        (torch.full((1, 3, 200, 200), torch.nan), ["a"], "must be finite"),
    ):
        with pytest.raises(ValueError, match=told) as caught:
            metric.update(given, prompts)
        assert "\n" not in str(caught.value)
    assert len(metric) == 0


class StandIn:
    """In place of a reward's section; keeps what it was made from."""

    made: ClassVar[dict[str, Any]] = {}

    def __init__(self, **keys: Any) -> None:
        StandIn.made = keys

    def build(self) -> Any:
        return lambda images, prompts: images.mean((1, 2, 3))


def stand_in(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for section in ("PickScore", "Aesthetic", "ImageReward", "Hpsv2"):
        monkeypatch.setattr(settings, section, StandIn, raising=False)
    for name in ("pick_score", "aesthetic", "image_reward", "hpsv2", "clip"):
        (weights / name).mkdir()


@pytest.mark.parametrize("key", ["pick_score", "aesthetic", "image_reward", "hpsv2"])
def test_a_preference_model_is_the_reward_of_its_folder(key: str, weights: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in(weights, monkeypatch)
    metric = row(key).make(Sources(weights, device="cpu", dtype=torch.bfloat16, batch=3))
    want = {"model": str(weights / key), "dtype": "bfloat16", "device": "cpu", "batch": 3}
    assert StandIn.made == (want | {"clip": str(weights / "clip")} if key == "aesthetic" else want)
    assert isinstance(metric, ScoreOf)
    assert metric.name == row(key).name
    metric.update(torch.full((1, 3, 4, 4), 0.25), ["a"])
    assert metric.compute() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (
            "pick_score",
            r"PS needs the folder .*pick_score, which is not there; download yuvalkirstain/PickScore_v1 into it",
        ),
        ("aesthetic", r"AES needs the folder .*aesthetic, .*; adascope-fast import-weights aesthetic makes it"),
        ("image_reward", "IR needs the folder .*; adascope-fast import-weights image_reward makes it"),
        ("hpsv2", "HPSv2 needs the folder .*; adascope-fast import-weights hpsv2 makes it"),
        ("fid", "FID needs the folder .*; adascope-fast import-weights inception makes it"),
        ("inception_score", "IS needs the folder .*inception"),
        ("kid", "KID needs the folder .*inception"),
        ("clip_score", r"CLIP needs the folder .*clip, .*; download openai/.* into it; or choose another CLIP"),
        ("tce", "TCE needs the folder .*clip"),
    ],
)
def test_missing_weights_are_told_with_how_to_get_them(key: str, told: str, tmp_path: Path):
    for given in (Sources(tmp_path), Sources()):
        with pytest.raises(Unavailable) as caught:
            row(key).make(given)
        assert "\n" not in str(caught.value)
        if given.weights is None:
            assert "no folder of weights is named" in str(caught.value)
        else:
            assert caught.match(told)


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(st_lpips, "find", lambda trunk: None)
    for key, name in (("lpips", "LPIPS"), ("ifs", "iFS")):
        with pytest.raises(
            Unavailable, match=rf"{name} needs the package stlpips-pytorch .*pip install 'adascope-fast"
        ):
            row(key).make(Sources())


def test_published_weights_are_taken_from_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "_cached", lambda repository: tmp_path / repository.rpartition("/")[2])
    assert Sources().folder("pick_score", "PS") == tmp_path / "PickScore_v1"
    with pytest.raises(Unavailable, match="IR needs the weights of image_reward, and no folder of weights is named;"):
        Sources().folder("image_reward", "IR")
    with pytest.raises(Unavailable, match="needs the folder"):  # a folder of weights is not completed by the cache
        Sources(tmp_path / "none").folder("pick_score", "PS")


def test_a_damaged_folder_is_an_error_and_nothing_that_is_missing(tmp_path: Path):
    (tmp_path / "inception").mkdir()
    with pytest.raises(ValueError, match="inception must hold one file of safetensors, got 0; make it by") as caught:
        row("fid").make(Sources(tmp_path))
    assert not isinstance(caught.value, Unavailable)


def test_a_batch_goes_once_through_a_network_that_several_metrics_ask(monkeypatch: pytest.MonkeyPatch):
    given = Sources(clip="scenes-clip", batch=4)
    metrics = [row(key).make(given) for key in ("clip_score", "tce", "frechet_clip")]
    model = given.clip().model
    rows: list[int] = []
    model.vision_model.register_forward_hook(lambda module, inputs, output: rows.append(len(output[0])))
    first, second = images(6, 24, 24), images(6, 24, 24).flip(3)
    for batch in (first, second):
        for metric in metrics:
            metric.update(batch, ["a"] * 6)
    assert rows == [4, 2, 4, 2]
    assert row("frechet_vgg").make(given).features is row("ifs").make(given).features  # type: ignore[attr-defined]


def test_images_that_were_changed_in_place_are_looked_at_again():
    features = Sources(clip="scenes-clip").features("clip")
    given = images(2, 24, 24)
    before = features(given)
    assert features(given) is before
    given.mul_(0.5)
    assert not torch.equal(features(given), before)
    with torch.inference_mode():
        assert torch.isfinite(features(given.clone())).all()


def test_features_are_of_a_network_by_its_name(weights: Path):
    given = Sources(weights, clip="scenes-clip")
    pictures = images(3, 24, 24)
    assert given.features("vgg16")(pictures).shape == (3, 512)
    assert given.features("vgg16").facts["network"] == "VGG-16 of ST-LPIPS"
    assert given.features("inception")(pictures).shape == (3, 6)
    with pytest.raises(
        Unavailable, match=r"features of dinov2 needs the folder .*download facebook/dinov2-base into it"
    ):
        given.features("dinov2")
    with pytest.raises(
        ValueError, match="features must be of clip, vgg16, inception, dinov2, got 'resnet'; choose one"
    ):
        given.features("resnet")


def test_vgg_features_are_fc2_where_its_weights_are(weights: Path, monkeypatch: pytest.MonkeyPatch):
    (weights / "vgg16").mkdir()
    save_file({"a": torch.zeros(1)}, weights / "vgg16" / "any.safetensors")
    monkeypatch.setattr(sources.Vgg16, "load", lambda file: TinyInception().requires_grad_(False))
    metric = row("ifs").make(Sources(weights))
    assert metric.facts() == {"network": "VGG-16", "layer": "fc2", "weights": "vgg16", "neighbours": 3}
    assert metric.least == 1


def test_dinov2_is_transformers_own(tmp_path: Path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dinov2")
    pictures = images(2, 224, 224)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        want = model(pixel_values=(pictures - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(Sources(tmp_path).features("dinov2")(pictures), want, rtol=1e-5, atol=1e-6)


def test_other_features_give_no_fid():
    assert row("frechet_clip").make(Sources(clip="scenes-clip")).name == "FD-CLIP"
    assert Frechet.name != "FID"
