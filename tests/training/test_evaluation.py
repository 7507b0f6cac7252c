"""The held-out reward: its interval over prompts, the same noise for every policy, the pictures of the report."""

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adascope_fast.training.evaluation import HeldOutScores, contrast, diversity, evaluate, interval


def test_the_interval_is_over_prompts_not_over_pictures():
    scores = torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.2, 0.4], [1.0, 1.0]])
    means = [0.5, 0.5, 0.3, 1.0]
    reach = 1.96 * statistics.stdev(means) / math.sqrt(4)
    found = interval(scores)
    assert found["mean"] == pytest.approx(0.575)
    assert (found["low"], found["high"]) == pytest.approx((0.575 - reach, 0.575 + reach), abs=1e-4)


def _evaluate(toy: object, seed: int = 1, batch: int = 3) -> HeldOutScores:
    return evaluate(
        toy,  # type: ignore[arg-type]
        toy.schedule(4, eta=0.3, noise_level=0.7),  # type: ignore[attr-defined]
        lambda images, prompts: images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts]),
        ["a", "bbb", "cc"],
        samples_per_prompt=2,
        guidance_scale=1.0,
        seed=seed,
        batch=batch,
        num_shown=2,
        breakdown=lambda images, prompts: {"count": float(len(prompts))},
        similarity=lambda images, prompts: torch.tensor([len(prompt) / 10 for prompt in prompts]),
    )


def test_scores_are_those_of_each_prompts_own_pictures(make_toy: Callable):
    evaluation = _evaluate(make_toy())
    assert evaluation.scores.shape == (3, 2)
    lengths = torch.tensor([[1.0], [3.0], [2.0]])
    assert ((evaluation.scores - lengths) > 0).all()
    assert ((evaluation.scores - lengths) < 1).all(), "a picture's mean lies between 0 and 1"
    assert evaluation.shown.shape == (4, 3, 3, 3)
    torch.testing.assert_close(evaluation.scores[:2] - lengths[:2], evaluation.shown.mean((1, 2, 3)).view(2, 2))
    summary = evaluation.summary()
    assert (summary["num_images"], summary["attributes"]) == (6, {"count": 6.0})
    assert summary["clip_score"] == pytest.approx((0.1 + 0.3 + 0.2) / 3)


def _grey(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def test_diversity_is_the_mean_distance_of_pairs_of_one_prompt():
    # Greys 0, 0.2, 0.8 differ by 0.2, 0.8, 0.6, mean 1.6 / 3; the other prompt's pictures are alike.
    images = torch.stack([_grey(0.0, 0.2, 0.8), _grey(0.5, 0.5, 0.5)])
    assert diversity(images) == pytest.approx(1.6 / 3 / 2)
    half = torch.zeros(1, 2, 3, 2, 2)
    half[0, 1, 0] = 1.0  # a third of the values differ by 1
    assert diversity(half) == pytest.approx(math.sqrt(1 / 3))
    assert diversity(images[:, :1]) is None


def test_contrast_is_the_mean_standard_deviation_of_a_picture():
    images = _grey(0.3, 0.9).clone()
    assert contrast(images) == pytest.approx(0.0, abs=1e-6)
    images[1, :, 0] = 0.1  # half the values 0.1, half 0.9: 0.4
    assert contrast(images) == pytest.approx(0.2)


def test_the_summary_tells_how_varied_the_pictures_are(make_toy: Callable):
    evaluation = _evaluate(make_toy())
    summary, shown = evaluation.summary(), evaluation.shown.view(2, 2, 3, 3, 3)
    third = 3 * summary["diversity"] - 2 * diversity(shown)  # type: ignore[operator]  # two of three prompts shown
    assert 0.01 < third < 1
    assert 0 < summary["contrast"] < 0.5
    assert summary["diversity"] != summary["contrast"]


def test_the_spread_is_over_prompts(make_toy: Callable):
    evaluation = _evaluate(make_toy())
    assert evaluation.summary()["spread"] == evaluation.spread
    assert evaluation.spread["clip_score"] == pytest.approx(statistics.stdev([0.1, 0.3, 0.2]))
    shown = evaluation.shown.view(2, 2, 3, 3, 3)
    for name, of in (("contrast", contrast), ("diversity", lambda images: diversity(images[None]))):
        told = [float(of(images) or 0.0) for images in shown]
        told.append(3 * evaluation.summary()[name] - sum(told))  # the third prompt's, which is not shown
        assert evaluation.spread[name] == pytest.approx(statistics.stdev(told), rel=1e-3)


def test_another_policy_meets_the_same_noise(make_toy: Callable):
    def noise_of(toy, seed: int) -> Tensor:
        seen, predict = [], toy.predict

        def watch(sample: Tensor, *arguments: Tensor) -> Tensor:
            seen.append(sample)
            return predict(sample, *arguments)

        toy.predict = watch
        _evaluate(toy, seed, batch=6)
        return seen[0]

    trained = make_toy()
    with torch.no_grad():
        trained.layers[2].bias.add_(0.5)
    assert torch.equal(noise_of(make_toy(), 1), noise_of(trained, 1))
    assert not torch.equal(noise_of(make_toy(), 1), noise_of(make_toy(), 2))
    assert not torch.equal(_evaluate(make_toy()).scores, _evaluate(trained).scores)
