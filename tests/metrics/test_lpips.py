import io
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from metric_images import PHOTOGRAPH, images, known
from torch import Tensor

from adascope_fast.metrics import lpips
from adascope_fast.metrics.lpips import Distance, Diversity
from adascope_fast.weights import st_lpips


@pytest.fixture(scope="module")
def alex() -> Distance:
    return Distance("alex")


@pytest.mark.parametrize("trunk", ["alex", "vgg"])
def test_the_distance_is_that_of_the_package(trunk: st_lpips.Trunk):
    distance = Distance(trunk)
    for height, width in ((40, 56), (64, 64)):
        given = images(4, height, width)
        want = torch.tensor(known("st_lpips")[f"{trunk} {height} {width}"])
        torch.testing.assert_close(distance(given[:2], given[2:]), want, rtol=1e-5, atol=1e-6)


def test_a_photograph_is_near_its_jpeg_and_far_from_another_image(alex: Distance):
    photograph = PIL.Image.open(PHOTOGRAPH).convert("RGB").resize((256, 256))
    file = io.BytesIO()
    photograph.save(file, "jpeg", quality=20)
    one, other = (
        torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
        for image in (photograph, PIL.Image.open(file))
    )
    shifted, another = one.roll(1, 3), images(1, 256, 256)
    same, moved, compressed, far = (alex(one, image).item() for image in (one, shifted, other, another))
    assert same == 0
    assert 0 < moved < 0.02 < compressed < 0.2 < far, (moved, compressed, far)


def test_pairs_are_all_pairs(alex: Distance):
    given = images(4, 32, 24)
    want = [alex(given[i : i + 1], given[j : j + 1]).item() for i, j in combinations(range(4), 2)]
    assert alex.pairs(given).tolist() == pytest.approx(want, rel=1e-5)
    small = Distance("alex", batch=1)
    assert small(given[:2], given[2:]).tolist() == pytest.approx(alex(given[:2], given[2:]).tolist(), rel=1e-5)


def test_other_shapes_are_refused(alex: Distance):
    with pytest.raises(ValueError, match=r"images of one shape, at least 24 x 24 pixels, got \[1, 3, 24, 23\]"):
        alex(torch.rand(1, 3, 24, 23), torch.rand(1, 3, 24, 23))
    with pytest.raises(ValueError, match="images of one shape"):
        alex(torch.rand(1, 3, 24, 24), torch.rand(2, 3, 24, 24))


class Stub:
    """Pairs' absolute difference of brightness."""

    facts: dict[str, Any] = {}  # noqa: RUF012

    def pairs(self, given: Tensor) -> Tensor:
        level = given.mean((1, 2, 3))
        return torch.stack([(level[i] - level[j]).abs() for i, j in combinations(range(len(level)), 2)])


def diversity(levels: Sequence[float], prompts: Sequence[str], batch: int) -> Diversity:
    metric = Diversity(Stub())  # type: ignore[arg-type]
    given = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 24, 24)
    for start in range(0, len(prompts), batch):
        metric.update(given[start : start + batch], list(prompts[start : start + batch]))
    return metric


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_diversity_is_a_mean_over_pairs_then_over_prompts_however_batched(batch: int):
    levels, prompts = [0.1, 0.2, 0.4, 0.5, 0.9, 0.0, 0.3], ["a", "a", "a", "b", "b", "c", "c"]
    metric = diversity(levels, prompts, batch)
    assert len(metric) == 7
    want = ((0.1 + 0.3 + 0.2) / 3 + 0.4 + 0.3) / 3
    assert metric.compute() == pytest.approx(want, rel=1e-5)
    assert metric.compute() == pytest.approx(want, rel=1e-5), "computing ends nothing"
    spread = torch.tensor([0.2, 0.4, 0.3]).std(correction=0).item() / 3**0.5
    assert metric.bootstrap().std().item() == pytest.approx(spread, rel=0.2)
    metric.update(torch.full((1, 3, 24, 24), 0.6), ["c"])  # the prompt is still open
    assert metric.compute() == pytest.approx((0.2 + 0.4 + (0.3 + 0.6 + 0.3) / 3) / 3, rel=1e-5)


def test_diversity_is_of_the_images_as_they_came():
    metric, given = Diversity(Stub()), torch.zeros(2, 3, 24, 24)  # type: ignore[arg-type]
    given[0] = 0.5
    metric.update(given, ["a", "a"])
    given.zero_()
    assert metric.compute() == pytest.approx(0.5)


def test_single_images_prompts_that_come_again_and_other_sizes_are_refused():
    with pytest.raises(ValueError, match="LPIPS needs at least 2 images of each prompt, got 1 of 'a'; draw more"):
        diversity([0.1, 0.2, 0.3], ["a", "b", "b"], 3)
    with pytest.raises(ValueError, match="got 1 of 'b'"):
        diversity([0.1, 0.2, 0.3], ["a", "a", "b"], 3).compute()
    with pytest.raises(ValueError, match="got 'a' again after others; sort them by prompt"):
        diversity([0.1, 0.2, 0.3, 0.4, 0.5], ["a", "a", "b", "b", "a"], 5)
    with pytest.raises(ValueError, match="LPIPS needs at least 2 images, got 0"):
        diversity([], [], 1).compute()
    metric = diversity([0.1], ["a"], 1)
    with pytest.raises(ValueError, match=r"images of a prompt of one size, got \[24, 32\] and \[24, 24\] for 'a'"):
        metric.update(torch.rand(1, 3, 24, 32), ["a"])
    with pytest.raises(ValueError, match="LPIPS needs images of at least 24 x 24 pixels, got 23 x 24"):
        metric.update(torch.rand(1, 3, 24, 23), ["a"])


def test_one_prompt_has_no_interval():
    assert len(diversity([0.1, 0.2], ["a", "a"], 2).bootstrap()) == 0


def test_a_missing_package_and_a_damaged_file_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(st_lpips, "find", lambda trunk: None)
    with pytest.raises(ValueError, match=r"stlpips-pytorch 0.0.2, which is not installed; pip install"):
        st_lpips.read("alex")
    file = tmp_path / "alex.pth"
    monkeypatch.setattr(st_lpips, "find", lambda trunk: file)
    file.write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=r"alex\.pth of stlpips-pytorch 0.0.2 must hold tensors, got .*install it again"
    ):
        st_lpips.read("alex")
    torch.save({"net": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"must be that of stlpips-pytorch 0.0.2, got another"):
        lpips.load("alex")


def test_weights_are_never_run_as_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return math.floor, (1.5,)

    file = tmp_path / "alex.pth"
    torch.save({"net": Runs()}, file)
    monkeypatch.setattr(st_lpips, "find", lambda trunk: file)
    with pytest.raises(ValueError, match="must hold tensors, got"):
        st_lpips.read("alex")
