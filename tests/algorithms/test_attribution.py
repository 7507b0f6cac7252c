"""Which steps get how much of the reward: worked answers, what holds for any choice, and the gradient that follows."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adascope_fast.adascope.selector import AdaScope
from adascope_fast.adascope.sensing import Curves
from adascope_fast.algorithms.attribution import Attribution, similarity_gains
from adascope_fast.algorithms.policy_gradient import ddpo
from adascope_fast.algorithms.settings import AttributionName, Backfill
from adascope_fast.engine.engine import Engine
from adascope_fast.engine.settings import Updates
from adascope_fast.rollout import EncodedPrompts, Trajectory
from adascope_fast.schedules import samplers as schedules
from adascope_fast.selectors.simple import Complement, EveryStep, RandomFraction, StaticRange

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())["backfill"]
PROMPTS = ["a red one", "a red one", "the green", "see", "see"]
T = 6


@pytest.mark.parametrize(
    ("attribution", "key"),
    [
        (Attribution(), "uniform"),
        (Attribution(attribution="discount", gamma=0.9), "discount_0_9"),
        (Attribution(attribution="gain"), "gain"),
        (Attribution(attribution="similarity"), "gain"),
    ],
)
def test_worked_answers(attribution: Attribution, key: str):
    steps = torch.zeros(1, VECTORS["T"], dtype=torch.bool)
    steps[:, VECTORS["start"] : VECTORS["end"]] = True
    credit = attribution.credit(steps, torch.tensor([VECTORS["gains"]]))
    np.testing.assert_allclose(VECTORS["r"] * credit[0].numpy(), VECTORS[key], rtol=2e-6)


def test_the_backfill_says_which_steps():
    chosen = torch.tensor([[False, True, True, False, False], [True, False, False, False, False]])
    trainable = torch.tensor([True, True, True, True, False])  # the last step is deterministic
    assert torch.equal(Attribution(backfill="interval").steps(chosen, trainable), chosen)
    assert Attribution(backfill="full").steps(chosen, trainable).tolist() == [[True, True, True, True, False]] * 2
    assert Attribution(backfill="sparse").steps(chosen, trainable).tolist() == [[False, False, False, True, False]] * 2
    assert Attribution(backfill="sparse").steps(chosen, torch.ones(5).bool()).nonzero().tolist() == [[0, 4], [1, 4]]


def test_steps_that_gain_nothing_get_nothing_and_a_falling_curve_credits_alike():
    steps = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    gains = torch.tensor([[0.1, -0.5, 0.3, 9.0], [-1.0, 0.0, 5.0, 5.0], [torch.nan, 2.0, 0.0, 0.0], [1.0] * 4])
    credit = Attribution(attribution="gain").credit(steps, gains)
    want = torch.tensor([[0.75, 0.0, 2.25, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0] * 4])
    torch.testing.assert_close(credit, want)


@given(st.integers(0, 10**6), st.sampled_from(get_args(AttributionName)), st.sampled_from(get_args(Backfill)))
def test_credit_adds_up_to_the_number_of_steps(seed: int, weights: Any, backfill: Any):
    generator = torch.Generator().manual_seed(seed)
    chosen, trainable = torch.rand(4, 9, generator=generator) < 0.5, torch.rand(9, generator=generator) < 0.8
    gamma = {"gamma": 0.5} if weights == "discount" else {}
    attribution = Attribution(backfill=backfill, attribution=weights, **gamma)
    steps = attribution.steps(chosen & trainable, trainable)
    assert not (steps & ~trainable).any()
    credit = attribution.credit(steps, torch.randn(4, 9, generator=generator))
    assert (credit >= 0).all()
    assert (credit[~steps] == 0).all()
    torch.testing.assert_close(credit.sum(1), steps.sum(1).float())


def _trajectory(x0: Tensor, final: Tensor) -> Trajectory:
    b, t = x0.shape[:2]
    latents = torch.cat([torch.zeros_like(x0), final.unsqueeze(1)], 1)
    schedule = schedules.dance_sde(torch.linspace(1, 0, t + 1), eta=0.3)
    return Trajectory(latents, x0, torch.zeros(b, t), schedule, ["a"] * b, torch.zeros(b, dtype=torch.int64))


def test_similarity_gains_are_increases_of_the_cosine():
    # Guesses at 90, 60 and 45 degrees to the final latent: cosines 0, 1/2, sqrt(1/2), and 1 at the end.
    x0 = torch.tensor([[[[0.0, 3.0]], [[1.0, 3**0.5]], [[2.0, 2.0]]]])
    gains = similarity_gains(_trajectory(x0, torch.tensor([[[5.0, 0.0]]])))
    torch.testing.assert_close(gains, torch.tensor([[0.5, 0.5**0.5 - 0.5, 1 - 0.5**0.5]]))


def test_gains_are_those_of_the_sensed_preference():
    preference = torch.tensor([[0.0, 0.1, 0.4, 0.6, 0.5, 0.55], [0.0, 0.3, 0.4, 0.6, 0.7, 0.75]])
    selector = AdaScope(rule="fraction")
    selector.decide(Curves(preference, structure=preference), ["a", "a"])
    want = torch.tensor([[0.2, 0.2, 0.2, 0.0, 0.05]], dtype=torch.float64).expand(2, -1)  # of the pool's mean
    gains, others = selector.gains(), Complement(selector).gains()
    assert gains is not None
    assert others is not None
    torch.testing.assert_close(gains, want, atol=1e-6, rtol=0)
    assert torch.equal(gains, others)
    assert EveryStep().gains() is None
    selector.decide(None, ["a", "a"], num_steps=5)
    assert selector.gains() is None, "what was not sensed in this rollout is not known"


def _displacement(
    make_toy: Callable, attribution: Attribution, selector: Any = None, update: Any = "replay", step_weight: Any = None
) -> Tensor:
    toy = make_toy(torch.float64)
    parameters = toy.trainable_parameters()
    before = torch.cat([parameter.detach().flatten() for parameter in parameters])
    settings = Updates(rollout_batch=3, microbatch=4, max_grad_norm=1e9, update=update)
    algorithm = replace(ddpo(clip_range=1e-4, min_count=2), attribution=attribution, step_weight=step_weight)
    schedule, optimizer = toy.schedule(T), torch.optim.SGD(parameters, lr=1.0)
    score = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    engine = Engine(toy, schedule, algorithm, selector or StaticRange(start=1, end=4), score, optimizer, settings)
    engine.step(EncodedPrompts.of(toy, PROMPTS), PROMPTS, iteration=0, seed=0)
    return before - torch.cat([parameter.detach().flatten() for parameter in parameters])


def _only(step: int) -> Callable[[Any], Tensor]:
    return lambda schedule: torch.nn.functional.one_hot(torch.tensor(step), schedule.num_steps).float()


def test_the_gradient_is_the_weighted_sum_of_the_steps_gradients(make_toy: Callable):
    parts = [_displacement(make_toy, Attribution(), step_weight=_only(step)) for step in range(1, 4)]
    assert min(part.norm() for part in parts) > 0
    discounted = _displacement(make_toy, Attribution(attribution="discount", gamma=0.5))
    want = 3 / 7 * parts[0] + 6 / 7 * parts[1] + 12 / 7 * parts[2]  # 1 : 2 : 4, adding up to 3
    torch.testing.assert_close(discounted, want, rtol=1e-5, atol=1e-9)
    plain = _displacement(make_toy, Attribution())
    torch.testing.assert_close(plain, sum(parts[1:], parts[0]), rtol=1e-5, atol=1e-9)


def test_full_is_every_step_and_sparse_is_the_last_one(make_toy: Callable):
    every = _displacement(make_toy, Attribution(), EveryStep(last_step="train"))
    assert torch.equal(_displacement(make_toy, Attribution(backfill="full")), every)
    last = _displacement(make_toy, Attribution(), StaticRange(start=T - 1, end=T))
    assert torch.equal(_displacement(make_toy, Attribution(backfill="sparse")), last)


@pytest.mark.parametrize("weights", ["gain", "similarity"])
def test_weights_of_the_rollout_reach_the_gradient(make_toy: Callable, weights: Any):
    plain = _displacement(make_toy, Attribution(), AdaScope())
    weighted = _displacement(make_toy, Attribution(attribution=weights), AdaScope())
    assert plain.norm() > 1e-3
    assert (weighted - plain).norm() > 0.05 * plain.norm()


@pytest.mark.parametrize(
    "attribution",
    [Attribution(attribution="discount", gamma=0.5), Attribution(backfill="full"), Attribution(backfill="sparse")],
    ids=str,
)
def test_one_pass_is_the_replay(make_toy: Callable, attribution: Attribution):
    selector = RandomFraction(fraction=0.5, seed=3)
    want = _displacement(make_toy, attribution, selector)
    got = _displacement(make_toy, attribution, selector, "one_pass")
    assert want.norm() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())


def test_what_cannot_be_known_is_refused(make_toy: Callable):
    with pytest.raises(
        ValueError, match="attribution of ddpo is known after it; use attribution 'uniform' or 'discount'"
    ):
        _displacement(make_toy, Attribution(attribution="gain"), AdaScope(mask_source="previous"), "one_pass")
    with pytest.raises(ValueError, match="needs a selector that has sensed the preference"):
        _displacement(make_toy, Attribution(attribution="gain"), EveryStep())
    with pytest.raises(ValueError, match="'uniform', 'discount', 'gain' or 'similarity'"):
        Attribution(attribution="coca")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="less than or equal to 1"):
        Attribution(attribution="discount", gamma=1.5)
    with pytest.raises(ValueError, match="gamma needs another attribution"):
        Attribution(gamma=0.5)
