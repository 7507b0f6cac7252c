"""DPOK's loss, other KLs by their weights, and the gradient without a graph: known answers and what must be equal."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ratio_edges import BOUNDS, assert_alike, assert_bounds_belong_to_the_range, by_hand, found

from adascope_fast import reference

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())
RTOL = {torch.float64: 1e-12, torch.float32: 2e-5}


def _random(n, d):
    """(sample, output, prev_sample, coef, old_log_prob, advantage), then output_uncond and ref_output, in float64."""
    generator = torch.Generator().manual_seed(n * 100 + d)
    sample, output, prev_sample, uncond, ref_output = torch.randn(5, n, d, generator=generator).double().unbind(0)
    coef = 0.5 + torch.rand(n, 3, generator=generator).double()
    old_log_prob = reference.guided_transition_log_prob(sample, output, uncond, 2.5, prev_sample, coef) + 0.05
    return (sample, output, prev_sample, coef, old_log_prob, torch.linspace(-1, 1, n).double()), uncond, ref_output


@pytest.mark.parametrize("dtype", RTOL)
def test_dpok_loss_equals_the_known_answer(dtype):
    case = VECTORS["dpok"]
    log_prob, old_log_prob, advantage = (torch.tensor(case[name], dtype=dtype) for name in ("logp", "logp_old", "adv"))
    kl = torch.tensor(case["kl"], dtype=dtype)
    log_prob.requires_grad_()
    loss, ratio = reference.dpok_policy_loss(log_prob, old_log_prob, advantage, clip_range=case["ratio_clip"])
    whole = (case["reward_weight"] * loss + case["kl_weight"] * kl).mean()
    whole.backward()
    assert not ratio.requires_grad
    torch.testing.assert_close(whole.detach(), torch.tensor(case["loss"], dtype=dtype), rtol=RTOL[dtype], atol=0)
    want = torch.tensor(case["dloss_dlogp"], dtype=dtype)
    torch.testing.assert_close(log_prob.grad, want, rtol=RTOL[dtype], atol=0)


def test_dpok_differs_from_ppo_only_on_the_side_that_ppo_pulls_back():
    log_prob = torch.tensor([0.5, 2.0]).log().repeat(2).requires_grad_()
    rows = (log_prob, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]))
    grads = []
    for operation in (reference.clipped_policy_loss, reference.dpok_policy_loss):
        loss, _ = operation(*rows, clip_range=0.2)
        grads.append(torch.autograd.grad(loss.sum(), log_prob)[0].tolist())
    assert grads == [pytest.approx([-0.5, 0, 0, 2.0]), [0, 0, 0, 0]]


@pytest.mark.parametrize("name", ["clipped_policy_loss", "dpok_policy_loss"])
def test_loss_ratio_and_slope_at_the_edges(name):
    rows, wanted = by_hand()
    assert_alike(found(getattr(reference, name), rows, **BOUNDS), wanted[name])
    assert_bounds_belong_to_the_range(getattr(reference, name))


@pytest.mark.parametrize("name", ["clipped_policy_loss", "dpok_policy_loss"])
@pytest.mark.parametrize("low", [1.0, 7.0])
def test_a_wide_clip_range_clips_no_ratio_from_below(name, low):
    rows = torch.tensor([-torch.inf, -200.0]), torch.zeros(2), torch.tensor([-3.0, -3.0])
    got = found(getattr(reference, name), rows, clip_range=low, clip_range_high=0.5)
    assert got["loss"].tolist() == got["slope"].tolist() == [0, 0]


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf, -math.inf, 1e13])
def test_clip_ranges_that_are_none_are_refused(value):
    rows = (torch.zeros(3),) * 3
    for loss in (reference.clipped_policy_loss, reference.dpok_policy_loss):
        with pytest.raises(ValueError, match=rf"clip_range must be above 0 and at most 1e12, got {value}; pass a dist"):
            loss(*rows, clip_range=value)
        with pytest.raises(ValueError, match=rf"clip_range_high must be above 0 and at most 1e12, got {value}; pass"):
            loss(*rows, clip_range=0.1, clip_range_high=value)


def test_a_kl_weight_a_row_gives_the_other_kls_of_the_field():
    (sample, output, prev_sample, coef, old_log_prob, advantage), _, ref_output = _random(3, 8)
    rows = (sample, output, prev_sample, coef, old_log_prob, advantage)
    _, weight_output, std = coef.unbind(1)
    policy: dict[str, Any] = {"clip_range": 0.1, "clip": "dpok", "ref_output": ref_output}
    plain, _ = reference.transition_policy_loss(*rows, **policy)
    for weight, want in (
        (2 * std.square() / weight_output.square(), (output - ref_output).square().mean(1)),  # DPOK
        (2 * std.square(), (weight_output[:, None] * (output - ref_output)).square().mean(1)),  # of the means
    ):
        loss, _ = reference.transition_policy_loss(*rows, **policy, kl_weight=0.01 * weight)
        torch.testing.assert_close(loss - plain, 0.01 * want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", RTOL)
def test_direct_gradient_equals_the_known_answer(dtype):
    case = VECTORS["fused_chain"]
    sample, output, prev_sample = (torch.tensor(case[name], dtype=dtype) for name in "xmy")
    old_log_prob, advantage = (torch.tensor(case[name], dtype=dtype) for name in ("logp_old", "adv"))
    affine = next(entry for entry in VECTORS["logprob"] if entry["scheme"] == "ddim" and entry["eta"] == 1.0)
    coef = torch.tensor([[affine["a_x"], affine["b_m"], affine["std"]]], dtype=dtype).expand(2, 3)
    loss, stats, grad, grad_uncond = reference.transition_policy_grad(
        sample, output, prev_sample, coef, old_log_prob, advantage, clip_range=case["clip"], scale=0.5
    )
    assert grad_uncond is None
    torch.testing.assert_close(loss.mean(), torch.tensor(case["loss"], dtype=dtype), rtol=RTOL[dtype], atol=0)
    torch.testing.assert_close(grad, torch.tensor(case["dloss_dm"], dtype=dtype), rtol=RTOL[dtype], atol=1e-9)
    assert stats["nonfinite"].tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["gaussian", "squared_error"])
@pytest.mark.parametrize("clip", ["ppo", "dpok"])
def test_direct_gradient_agrees_with_finite_differences(kind, clip):
    (sample, output, prev_sample, coef, _, advantage), uncond, ref_output = _random(2, 3)
    old_log_prob = (
        reference.guided_transition_log_prob(sample, output, uncond, 2.5, prev_sample, coef, kind=kind) + 0.05
    )
    scale = torch.tensor([0.3, -2.0], dtype=torch.float64)
    policy: dict[str, Any] = {"clip_range": 0.5, "clip": clip, "kind": kind, "guidance_scale": 2.5}
    policy |= {"ref_output": ref_output, "kl_weight": torch.tensor([0.2, 0.7], dtype=torch.float64)}

    def loss(output, uncond):
        rows = (sample, output, prev_sample, coef, old_log_prob, advantage)
        return (scale * reference.transition_policy_loss(*rows, output_uncond=uncond, **policy)[0]).sum()

    rows = (sample, output, prev_sample, coef, old_log_prob, advantage)
    _, _, *grads = reference.transition_policy_grad(*rows, output_uncond=uncond, **policy, scale=scale)
    for grad, moved in zip(grads, (output, uncond), strict=True):
        assert grad is not None
        assert not grad.requires_grad
        for place in ((0, 1), (1, 2)):
            before, moved[place] = moved[place].item(), moved[place] + 1e-6
            above, moved[place] = loss(output, uncond), before - 1e-6
            below, moved[place] = loss(output, uncond), before
            assert grad[place].item() == pytest.approx(((above - below) / 2e-6).item(), rel=1e-6, abs=1e-8)


def test_wrong_choices_are_refused():
    rows, _, ref_output = _random(3, 8)
    with pytest.raises(ValueError, match="clip must be one of ppo, dpok, not 'grpo'"):
        reference.transition_policy_loss(*rows, clip_range=0.1, clip="grpo")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="kind must be one of gaussian, squared_error, not 'cps'"):
        reference.transition_policy_loss(*rows, clip_range=0.1, kind="cps")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"kl_weight must be a number or \[3\], one for each row, not \[2\]"):
        reference.transition_policy_loss(*rows, clip_range=0.1, ref_output=ref_output, kl_weight=torch.ones(2))
    with pytest.raises(ValueError, match=r"scale must be a number or \[3\], one for each row, not \[1\]"):
        reference.transition_policy_grad(*rows, clip_range=0.1, scale=torch.ones(1))
    with pytest.raises(ValueError, match="needs ref_output"):
        reference.transition_policy_grad(*rows, clip_range=0.1, kl_weight=0.1)
