"""The clipped losses of PPO and DPOK, interpreted, against the reference and the known answers."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run here under TRITON_INTERPRET=1 alone", allow_module_level=True)

from ratio_edges import BOUNDS, assert_alike, assert_bounds_belong_to_the_range, by_hand, found, grid

from adascope_fast import reference
from adascope_fast.kernels import policy_loss

INTERPRETED_BY_NUMPY = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())


@pytest.mark.parametrize("case", VECTORS["ppo"], ids=["branches", "ddpo-scale"])
def test_clipped_loss_equals_the_known_answers(case):
    log_prob, old_log_prob, advantage = (torch.tensor(case[name]) for name in ("logp", "logp_old", "adv"))
    log_prob.requires_grad_()
    loss, ratio = policy_loss.clipped_policy_loss(
        log_prob, old_log_prob, advantage, clip_range=case["clip_low"], clip_range_high=case["clip_high"]
    )
    loss.mean().backward()
    assert not ratio.requires_grad
    torch.testing.assert_close(loss.mean().detach(), torch.tensor(case["loss"]), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(log_prob.grad, torch.tensor(case["dloss_dlogp"]), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(ratio, (log_prob.detach() - old_log_prob).exp())


@pytest.mark.parametrize("name", ["clipped_policy_loss", "dpok_policy_loss"])
def test_loss_of_many_rows_and_of_none(name):
    for n in (0, 1, 300):
        generator = torch.Generator().manual_seed(n)
        log_prob, old_log_prob, advantage = torch.randn(3, n, generator=generator).unbind(0)
        results = []
        for operation in (getattr(policy_loss, name), getattr(reference, name)):
            leaf = log_prob.clone().requires_grad_()
            loss, ratio = operation(leaf, old_log_prob, advantage, clip_range=0.2)
            loss.sum().backward()
            results.append((loss.detach(), ratio, leaf.grad))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@INTERPRETED_BY_NUMPY
@pytest.mark.parametrize("name", ["clipped_policy_loss", "dpok_policy_loss"])
def test_loss_ratio_and_slope_at_the_edges(name):
    rows, wanted = by_hand()
    assert_alike(found(getattr(policy_loss, name), rows, **BOUNDS), wanted[name])
    assert_bounds_belong_to_the_range(getattr(policy_loss, name))


@INTERPRETED_BY_NUMPY
@pytest.mark.parametrize("bounds", [BOUNDS, {"clip_range": 1.5}, {"clip_range": 1e-4}, {"clip_range": 1e12}])
@pytest.mark.parametrize("name", ["clipped_policy_loss", "dpok_policy_loss"])
def test_twins_agree_on_every_combination_of_edges(name, bounds):
    got, want = (found(getattr(twin, name), grid(), **bounds) for twin in (policy_loss, reference))
    assert_alike(got, want)


def test_clipped_loss_keeps_nan_and_a_ratio_of_exactly_one():
    log_prob = torch.tensor([-1.25, math.nan, -0.7, -3.0, -1.0], requires_grad=True)
    old_log_prob = torch.tensor([-1.25, -1.0, math.nan, -3.0, -1.0])
    advantage = torch.tensor([1.0, 1.0, -1.0, math.nan, 0.0])
    loss, ratio = policy_loss.clipped_policy_loss(log_prob, old_log_prob, advantage, clip_range=1e-4)
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, True, True, False]
    assert ratio[[0, 3, 4]].tolist() == [1.0, 1.0, 1.0]
    assert log_prob.grad is not None
    assert log_prob.grad.isnan().tolist() == [False, True, True, True, False]
    assert loss[0] == log_prob.grad[0] == -1


def test_dpok_loss_equals_the_known_answer():
    case = VECTORS["dpok"]
    log_prob, old_log_prob, advantage = (torch.tensor(case[name]) for name in ("logp", "logp_old", "adv"))
    log_prob.requires_grad_()
    loss, ratio = policy_loss.dpok_policy_loss(log_prob, old_log_prob, advantage, clip_range=case["ratio_clip"])
    (case["reward_weight"] * loss.mean()).backward()
    whole = case["reward_weight"] * loss + case["kl_weight"] * torch.tensor(case["kl"])
    torch.testing.assert_close(whole.mean().detach(), torch.tensor(case["loss"]), rtol=1e-6, atol=0)
    torch.testing.assert_close(log_prob.grad, torch.tensor(case["dloss_dlogp"]), rtol=1e-6, atol=0)
    assert not ratio.requires_grad


def test_dpok_has_no_gradient_outside_the_range_and_one_on_its_bounds():
    ratio = torch.tensor([0.75, 0.5, 1.25, 2.0, math.nan])
    log_prob = ratio.log().requires_grad_()
    bounds = {"clip_range": 0.25, "clip_range_high": 0.25}
    for advantage, slope in ((1.0, [-0.75, 0.0, -1.25, 0.0]), (-1.0, [0.75, 0.0, 1.25, 0.0])):
        loss, _ = policy_loss.dpok_policy_loss(log_prob, torch.zeros(5), torch.full((5,), advantage), **bounds)
        (grad,) = torch.autograd.grad(loss.sum(), log_prob)
        assert loss[:4].tolist() == pytest.approx([-advantage * r for r in (0.75, 0.75, 1.25, 1.25)])
        assert loss[4].isnan()
        assert grad[4].isnan()
        assert grad[1] == grad[3] == 0
        # exp(log(0.75)) may land a rounding below the bound, where the slope is zero by right.
        inside = log_prob.detach().exp()
        held = (inside >= 0.75) & (inside <= 1.25)
        assert grad[:4].tolist() == pytest.approx(torch.where(held[:4], torch.tensor(slope), 0.0).tolist())


def test_wrong_input_is_refused():
    rows = torch.zeros(3)
    for loss in (policy_loss.clipped_policy_loss, policy_loss.dpok_policy_loss):
        with pytest.raises(ValueError, match="must have one shape"):
            loss(rows, rows, rows[:1], clip_range=0.1)
        for value in (0.0, -0.1, math.nan, math.inf, 1e13):
            with pytest.raises(ValueError, match=rf"clip_range must be above 0 and at most 1e12, got {value}; pass a"):
                loss(rows, rows, rows, clip_range=value)
            with pytest.raises(ValueError, match=rf"clip_range_high must be above 0 and at most 1e12, got {value};"):
                loss(rows, rows, rows, clip_range=0.1, clip_range_high=value)
