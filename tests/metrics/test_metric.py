import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from adascope_fast.metrics import MeanScore, interval
from adascope_fast.metrics.metric import Metric


class Brightness(MeanScore):
    name, title, higher_is_better, fewest, draws = "brightness", "mean value", True, 2, 400

    def rows(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


def made(values: Sequence[float], prompts: Sequence[str], batch: int, kind: type[Metric] = Brightness) -> Metric:
    metric = kind()
    images = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    for start in range(0, len(prompts), batch):
        metric.update(images[start : start + batch], list(prompts[start : start + batch]))
    return metric


def test_batches_do_not_matter():
    values, prompts = torch.rand(12).tolist(), [f"{number // 3}" for number in range(12)]
    one, other = made(values, prompts, 12), made(values, prompts, 5)
    assert one.compute() == other.compute() == pytest.approx(sum(values) / 12, rel=1e-6)
    assert torch.equal(one.bootstrap(), other.bootstrap())


def test_the_interval_is_over_prompts_not_images():
    """Copies of an image say nothing new: the standard error is that of the prompts' means."""
    means = [0.1, 0.4, 0.5, 0.9]
    metric = made(
        [mean for mean in means for _ in range(50)], [f"{place}" for place in range(4) for _ in range(50)], 200
    )
    spread = metric.bootstrap().std().item()
    assert spread == pytest.approx(torch.tensor(means).std(correction=0).item() / 2, rel=0.1)
    low, high = interval(metric.compute(), metric.bootstrap())
    assert high - low == pytest.approx(2 * 1.959964 * spread)


def test_one_prompt_has_no_interval():
    metric = made([0.1, 0.2], ["a", "a"], 2)
    assert all(map(math.isnan, interval(metric.compute(), metric.bootstrap())))


def test_models_of_the_same_prompts_see_the_same_draws():
    prompts = ["a", "b", "c", "d"]
    one, other = made([0.1, 0.2, 0.7, 0.3], prompts, 4), made([0.2, 0.3, 0.8, 0.4], prompts, 4)
    difference = other.bootstrap(3) - one.bootstrap(3)
    assert torch.allclose(difference, torch.full_like(difference, 0.1), atol=1e-6)


def test_too_few_images_and_what_is_not_finite_are_refused():
    with pytest.raises(ValueError, match="brightness needs at least 2 images, got 1"):
        made([0.5], ["a"], 1).compute()
    with pytest.raises(ValueError, match=r"must be finite.*'b'"):
        made([0.5, math.nan], ["a", "b"], 2)


def test_the_spread_is_that_of_the_prompts():
    assert made([0.1, 0.3, 0.5, 0.7], ["a", "a", "b", "b"], 4).spread() == pytest.approx(0.4 / 2**0.5, rel=1e-6)
    assert math.isnan(made([0.1, 0.3], ["a", "a"], 2).spread())
