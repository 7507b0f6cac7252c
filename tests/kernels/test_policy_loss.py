"""The policy-loss and KL kernels, interpreted, against the reference in float64 and the known answers."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run here under TRITON_INTERPRET=1 alone", allow_module_level=True)

from adascope_fast import reference
from adascope_fast.kernels import gaussian_kl, policy_loss, step, training_step

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())
# A gradient is stored in the dtype of the output, and the interpreter truncates to bfloat16 where a GPU rounds.
RTOL = {torch.float32: 5e-6, torch.bfloat16: 2**-7}
GUIDANCE = 2.5


def _random(n, d, dtype=torch.float32):
    """Latents (sample, output, uncond, prev_sample, ref_output), coef, and old_log_prob near the true one."""
    generator = torch.Generator().manual_seed(n * 1000 + d)
    latents = torch.randn(5, n, d, generator=generator).to(dtype).unbind(0)
    sample, output, uncond, prev_sample, _ = (x.double() for x in latents)
    coef = 0.5 + torch.rand(n, 3, generator=generator)
    log_prob = reference.guided_transition_log_prob(sample, output, uncond, GUIDANCE, prev_sample, coef)
    old_log_prob = log_prob.float() + 0.3 * torch.randn(n, generator=generator)
    return *latents, coef, old_log_prob, torch.randn(n, generator=generator)


def _run(operation, latents, coef, old_log_prob, advantage, *, dtype=None, kl_weight=0.0, with_ref=True) -> Any:
    """Loss, statistics and the gradients of both outputs, of a weighted sum of the rows."""
    sample, output, uncond, prev_sample, ref_output = (x.to(dtype or x.dtype) for x in latents)
    output, uncond = (x.detach().clone().requires_grad_() for x in (output, uncond))
    rows = (x.to(dtype or x.dtype) for x in (coef, old_log_prob, advantage))
    loss, stats = operation(
        sample, output, prev_sample, *rows, clip_range=0.1, clip_range_high=0.2, output_uncond=uncond,
        guidance_scale=GUIDANCE, ref_output=ref_output if with_ref else None, kl_weight=kl_weight,
    )  # fmt: skip
    (loss * torch.linspace(0.5, 2, len(loss), dtype=loss.dtype)).sum().backward()
    return loss.detach(), stats, output.grad, uncond.grad


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


def test_clipped_loss_of_many_rows_and_of_none():
    for n in (0, 1, 300):
        generator = torch.Generator().manual_seed(n)
        log_prob, old_log_prob, advantage = torch.randn(3, n, generator=generator).unbind(0)
        results = []
        for operation in (policy_loss.clipped_policy_loss, reference.clipped_policy_loss):
            leaf = log_prob.clone().requires_grad_()
            loss, ratio = operation(leaf, old_log_prob, advantage, clip_range=0.2)
            loss.sum().backward()
            results.append((loss.detach(), ratio, leaf.grad))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


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


def test_fused_training_step_equals_the_known_answers():
    case = VECTORS["fused_chain"]
    sample, output, prev_sample = (torch.tensor(case[name]) for name in "xmy")
    affine = next(entry for entry in VECTORS["logprob"] if entry["scheme"] == "ddim" and entry["eta"] == 1.0)
    coef = torch.tensor([[affine["a_x"], affine["b_m"], affine["std"]]]).expand(2, 3)
    output.requires_grad_()
    old_log_prob, advantage = torch.tensor(case["logp_old"]), torch.tensor(case["adv"])
    loss, stats = training_step.transition_policy_loss(
        sample, output, prev_sample, coef, old_log_prob, advantage, clip_range=case["clip"]
    )
    loss.mean().backward()
    torch.testing.assert_close(stats["log_prob"], torch.tensor(case["logp"]), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(loss.mean().detach(), torch.tensor(case["loss"]), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(output.grad, torch.tensor(case["dloss_dm"]), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize(
    ("n", "d", "kl_weight"), [(0, 3, 0.4), (1, 1, 0.4), (5, 700, 0.4), (5, 700, 0.0), (2, 8200, 0.4)]
)
def test_fused_training_step_equals_the_reference(n, d, kl_weight, dtype):
    *latents, coef, old_log_prob, advantage = _random(n, d, dtype)
    rows = (latents, coef, old_log_prob, advantage)
    loss, stats, *gradients = _run(training_step.transition_policy_loss, *rows, kl_weight=kl_weight)
    exact_loss, exact_stats, *exact_gradients = _run(
        reference.transition_policy_loss, *rows, kl_weight=kl_weight, dtype=torch.float64
    )
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-5)
    assert set(stats) == set(exact_stats)
    for name, exact in exact_stats.items():
        torch.testing.assert_close(stats[name].double(), exact.double(), rtol=1e-5, atol=1e-5, msg=name)
    for got, exact in zip(gradients, exact_gradients, strict=True):
        assert got.dtype == dtype
        scale = exact.abs().max().item() if n else 0.0
        torch.testing.assert_close(got.double(), exact, rtol=RTOL[dtype], atol=5e-6 * scale)


def test_statistics_are_named_alike_and_carry_no_gradient():
    *latents, coef, old_log_prob, advantage = _random(3, 20)
    results = [
        _run(operation, latents, coef, old_log_prob, advantage)[1]
        for operation in (training_step.transition_policy_loss, reference.transition_policy_loss)
    ]
    assert list(results[0]) == list(results[1])
    for name in results[0]:
        assert results[0][name].dtype == results[1][name].dtype, name
        assert results[0][name].shape == results[1][name].shape, name
        assert not results[0][name].requires_grad, name


def test_log_prob_of_the_fused_step_is_that_of_the_rollout():
    sample, output, uncond, noise, ref_output, coef, _, advantage = _random(3, 150, torch.bfloat16)
    guidance = {"output_uncond": uncond, "guidance_scale": GUIDANCE}
    prev_sample, old_log_prob = step.transition_step(sample, output, noise, coef, **guidance)
    _, stats = training_step.transition_policy_loss(
        sample, output, prev_sample, coef, old_log_prob, advantage, clip_range=1e-4, ref_output=ref_output, **guidance
    )
    assert torch.equal(stats["log_prob"], old_log_prob)
    assert stats["ratio"].tolist() == [1.0] * 3
    assert stats["clipfrac"].tolist() == [0.0] * 3


def test_a_row_does_not_depend_on_its_batch():
    *latents, coef, old_log_prob, advantage = _random(4, 1100)
    loss, stats, grad, _ = _run(training_step.transition_policy_loss, latents, coef, old_log_prob, advantage)
    alone, stats_alone, grad_alone, _ = _run(
        training_step.transition_policy_loss, [x[2:3] for x in latents], coef[2:3], old_log_prob[2:3], advantage[2:3]
    )
    assert torch.equal(loss[2:3], alone)
    assert torch.equal(stats["kl"][2:3], stats_alone["kl"])
    # The upstream weight of a lone row is 0.5 and of row 2 of 4 is 1.5.
    torch.testing.assert_close(grad[2:3], 3 * grad_alone)


def test_nan_stays_in_its_row_and_is_counted():
    *latents, coef, old_log_prob, advantage = _random(4, 12)
    latents[1][2, 5] = math.nan
    coef[0, 2] = 0.0  # a deterministic step has no log-probability
    latents = [x[1:] for x in latents]
    loss, stats, grad, _ = _run(
        training_step.transition_policy_loss, latents, coef[1:], old_log_prob[1:], advantage[1:], kl_weight=0.1
    )
    isolated = [False, True, False]
    for name in ("log_prob", "ratio", "approx_kl", "kl"):
        assert stats[name].isnan().tolist() == isolated, name
    assert loss.isnan().tolist() == isolated
    assert grad.isnan().any(1).tolist() == isolated
    assert stats["nonfinite"].tolist() == [0, 1, 0]


def test_kl_and_its_gradient():
    for n, d in ((0, 4), (3, 1000), (1, 8200)):
        _, output, _, _, ref_output, coef, _, _ = _random(n, d)
        leaf, exact_leaf = output.clone().requires_grad_(), output.double().requires_grad_()
        kl = gaussian_kl.gaussian_kl(leaf, ref_output, coef)
        exact = reference.gaussian_kl(exact_leaf, ref_output.double(), coef.double())
        kl.sum().backward()
        exact.sum().backward()
        torch.testing.assert_close(kl.double(), exact, rtol=2e-6, atol=1e-9)
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), exact_leaf.grad, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("case", [x for x in VECTORS["kl"] if x["reduce"] == "mean"], ids=lambda case: case["scheme"])
def test_kl_equals_the_known_answers(case):
    output, ref_output = (torch.tensor([case[name]]) for name in ("m", "m_ref"))
    output.requires_grad_()
    kl = gaussian_kl.gaussian_kl(output, ref_output, torch.tensor([[1.0, case["b_m"], case["std"]]]))
    kl.sum().backward()
    torch.testing.assert_close(kl.detach(), torch.tensor([case["kl"]]), rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(output.grad, torch.tensor([case["dkl_dm"]]), rtol=2e-5, atol=1e-7)


def test_operators_pass_torch_opcheck():
    sample, output, uncond, prev_sample, ref_output, coef, old_log_prob, advantage = _random(2, 12)
    bounds = (0.9, 1.1)
    torch.library.opcheck(policy_loss.clipped_op, (old_log_prob, old_log_prob + 0.1, advantage, *bounds, True))
    torch.library.opcheck(
        training_step.policy_loss_op,
        (
            sample,
            output,
            uncond,
            GUIDANCE,
            prev_sample,
            ref_output,
            0.1,
            None,
            coef,
            old_log_prob,
            advantage,
            *bounds,
            True,
            True,
        ),
    )
    torch.library.opcheck(
        training_step.policy_loss_backward_op,
        (advantage, advantage, sample, output, uncond, GUIDANCE, prev_sample, ref_output, 0.1, None, coef, True, False),
    )
    torch.library.opcheck(gaussian_kl.kl_op, (output, ref_output, coef))
    torch.library.opcheck(gaussian_kl.kl_backward_op, (advantage, output, ref_output, coef))


# torch.compile itself instantiates an autograd.Function, and deprecates that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break():
    *latents, coef, old_log_prob, advantage = _random(2, 12)
    compiled = torch.compile(training_step.transition_policy_loss, fullgraph=True, backend="aot_eager")
    loss, _, *gradients = _run(training_step.transition_policy_loss, latents, coef, old_log_prob, advantage)
    got, _, *got_gradients = _run(compiled, latents, coef, old_log_prob, advantage)
    for left, right in zip((got, *got_gradients), (loss, *gradients), strict=True):
        assert torch.equal(left, right)


def test_wrong_input_is_refused():
    sample, output, _, prev_sample, _, coef, old_log_prob, advantage = _random(3, 8)
    with pytest.raises(ValueError, match="needs ref_output"):
        training_step.transition_policy_loss(
            sample, output, prev_sample, coef, old_log_prob, advantage, clip_range=0.1, kl_weight=0.1
        )
    with pytest.raises(ValueError, match="must have one shape"):
        training_step.transition_policy_loss(
            sample, output, prev_sample, coef, old_log_prob[:1], advantage, clip_range=0.1
        )
    with pytest.raises(ValueError, match="must have one shape"):
        policy_loss.clipped_policy_loss(old_log_prob, old_log_prob, advantage[:1], clip_range=0.1)
