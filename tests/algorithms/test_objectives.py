"""Losses and gradients against values worked out in float64 elsewhere."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adascope_fast.algorithms.objectives import Clipped, score_function

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())


def _double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("known", VECTORS["ppo"], ids=["branches", "ddpo"])
def test_clipped_loss_and_gradient_are_the_known_ones(known):
    log_prob = _double(known["logp"]).requires_grad_()
    objective = Clipped(clip_range=known["clip_low"], clip_range_high=known["clip_high"])
    loss, ratio = objective(log_prob, _double(known["logp_old"]), _double(known["adv"]))
    loss.mean().backward()
    assert log_prob.grad is not None
    assert loss.mean().item() == pytest.approx(known["loss"], rel=1e-12)
    np.testing.assert_allclose(log_prob.grad, known["dloss_dlogp"], rtol=1e-12, atol=1e-15)
    outside = (ratio < 1 - known["clip_low"]) | (ratio > 1 + known["clip_high"])
    assert outside.double().mean().item() == pytest.approx(known["clipfrac"])


def test_the_clip_takes_one_range_for_both_sides():
    log_prob, advantage = _double([0.3, -0.3, 0.3, -0.3]), _double([1.0, -1.0, -1.0, 1.0])
    old = torch.zeros(4, dtype=torch.float64)
    one, two, high = (Clipped(0.2, upper)(log_prob, old, advantage)[0] for upper in (None, 0.2, 0.3))
    assert torch.equal(one, two)
    np.testing.assert_allclose(one[:2], [-1.2, 0.8], rtol=1e-12)  # clipped at 1 + 0.2 and 1 - 0.2
    np.testing.assert_allclose(high[:2], [-1.3, 0.8], rtol=1e-12)


def test_reinforce_loss_and_gradient_are_the_known_ones():
    known = VECTORS["reinforce"]
    log_prob, advantage = _double(known["logp"]).requires_grad_(), _double(known["adv"]).requires_grad_()
    loss, ratio = score_function(log_prob, log_prob.detach() - 0.25, advantage)
    loss.mean().backward()
    assert log_prob.grad is not None
    assert loss.mean().item() == pytest.approx(known["loss"], rel=1e-12)
    np.testing.assert_allclose(ratio, np.exp(0.25), rtol=1e-12)
    assert not ratio.requires_grad
    np.testing.assert_allclose(log_prob.grad, known["dloss_dlogp"], rtol=1e-12)
    assert advantage.grad is None


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-3, 3, allow_subnormal=False), st.floats(-5, 5, allow_subnormal=False)),
        min_size=1,
        max_size=7,
    )
)
def test_on_policy_ppo_has_the_gradient_of_reinforce(pairs):
    start, advantage = _double(pairs).unbind(1)
    first, second = start.clone().requires_grad_(), start.clone().requires_grad_()
    Clipped(1e-4)(first, start, advantage)[0].sum().backward()
    score_function(second, start, advantage)[0].sum().backward()
    assert first.grad is not None
    assert second.grad is not None
    assert torch.equal(first.grad, second.grad)
