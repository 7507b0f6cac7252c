"""The networks of metrics: their numbers by other implementations, and what of their files is refused."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from metric_images import images, known, weights
from safetensors.torch import load_file, save_file

from adascope_fast.metrics import inception, vgg
from adascope_fast.metrics.inception import InceptionV3
from adascope_fast.weights import convert
from adascope_fast.weights import inception as inception_weights
from adascope_fast.weights import vgg16 as vgg16_weights


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """Weights by formula with the names of the published file."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in InceptionV3().state_dict().items()}
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}
    return weights(shapes | {"fc.bias": torch.Size([1008])})


@pytest.fixture(scope="module")
def network(published: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> InceptionV3:
    folder = tmp_path_factory.mktemp("inception")
    counts = {
        f"{name.removesuffix('weight')}num_batches_tracked": torch.tensor(1) for name in published if "bn.w" in name
    }
    auxiliary = {"AuxLogits.conv0.conv.weight": torch.zeros(1)}
    torch.save(published | counts | auxiliary, folder / "pt_inception.pth")
    convert("inception", [folder / "pt_inception.pth"], folder / "inception")
    return InceptionV3.load(folder / "inception" / "model.safetensors")


def test_inception_is_that_of_torch_fidelity(network: InceptionV3):
    case = known("inception")
    for given, pool, logits in (
        (images(2, 40, 56), "pool", "logits_unbiased"),
        (images(1, 320, 301), "large_pool", "large_logits"),
    ):
        found = network(given)
        assert found.shape == (len(given), inception.POOL)
        torch.testing.assert_close(found[:, ::128], torch.tensor(case[pool]), rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(network.logits(found)[:, ::63], torch.tensor(case[logits]), rtol=1e-4, atol=1e-4)


def test_inception_sees_the_nearest_of_256_levels(network: InceptionV3):
    given = images(1, 24, 24)
    nudged = (given + 0.4 / 255 * torch.tensor([1.0, -1]).repeat(12)).clamp(0, 1)
    assert torch.equal(network(given), network(nudged))
    assert not torch.equal(network(given), network((given + 0.6 / 255).clamp(0, 1)))


def test_the_weights_of_another_network_are_refused(published: dict[str, torch.Tensor], tmp_path: Path):
    others = published | {"fc.weight": torch.zeros(1000, 2048)}
    with pytest.raises(
        ValueError, match=r"fc.weight of shape \[1008, 2048\], got \[1000, 2048\]; download pt_inception"
    ):
        inception_weights.convert(others)
    with pytest.raises(ValueError, match=r"VGG-16 must have features.0.weight .* got none"):
        vgg16_weights.convert(others)
    file = tmp_path / "model.safetensors"
    save_file({"fc.weight": torch.zeros(1008, 2048)}, file)
    with pytest.raises(ValueError, match=r"must hold the weights of FID's Inception-v3.*import-weights inception"):
        InceptionV3.load(file)
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="must hold the weights of VGG-16"):
        vgg.Vgg16.load(file)


CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # torchvision's numbers, between its pools


def test_vgg_is_torchvisions_up_to_its_second_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert vgg.WIDTH == 4096
    monkeypatch.setattr(vgg, "WIDTH", 64)  # 130 million weights take seconds
    monkeypatch.setitem(vgg16_weights._NEEDED, "classifier.3.weight", (64, 64))
    widths = {0: 64, 5: 128, 10: 256, 17: 512, 24: 512}
    with torch.device("meta"):
        state = vgg.Vgg16().state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        if value.ndim > 1
        else torch.full(value.shape, 0.01)
        for name, value in state.items()
    }
    published = state | {"classifier.6.weight": torch.zeros(1000, 4096), "classifier.6.bias": torch.zeros(1000)}
    torch.save(published, tmp_path / "vgg16.pth")
    file = convert("vgg16", [tmp_path / "vgg16.pth"], tmp_path / "vgg16") / "model.safetensors"
    assert load_file(file).keys() == state.keys()
    given = images(1, 224, 224)
    x = (given - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    for block in CONVOLUTIONS:
        assert len(state[f"features.{block[0]}.weight"]) == widths[block[0]]
        for number in block:
            x = F.conv2d(x, state[f"features.{number}.weight"], state[f"features.{number}.bias"], padding=1).relu()
        x = F.max_pool2d(x, 2)
    x = x.flatten(1)
    for number in (0, 3):
        x = F.linear(x, state[f"classifier.{number}.weight"], state[f"classifier.{number}.bias"]).relu()
    found = vgg.Vgg16.load(file)(given)
    assert found.shape == (1, vgg.WIDTH)
    assert found.std() > 0.01
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
