"""The fused training step, interpreted, against the reference in float64 and the known answers."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run here under TRITON_INTERPRET=1 alone", allow_module_level=True)

from adascope_fast import reference
from adascope_fast.kernels import step, training_gradient, training_step

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


def _run(
    operation, latents, coef, old_log_prob, advantage, *, dtype=None, kl_weight=0.0, with_ref=True, **choices
) -> Any:
    """Loss, statistics and the gradients of both outputs, of a weighted sum of the rows."""
    sample, output, uncond, prev_sample, ref_output = (x.to(dtype or x.dtype) for x in latents)
    output, uncond = (x.detach().clone().requires_grad_() for x in (output, uncond))
    rows = (x if x is None else x.to(dtype or x.dtype) for x in (coef, old_log_prob, advantage))
    loss, stats = operation(
        sample, output, prev_sample, *rows, clip_range=0.1, clip_range_high=0.2, output_uncond=uncond,
        guidance_scale=GUIDANCE, ref_output=ref_output if with_ref else None, kl_weight=kl_weight, **choices,
    )  # fmt: skip
    (loss * torch.linspace(0.5, 2, len(loss), dtype=loss.dtype)).sum().backward()
    return loss.detach(), stats, output.grad, uncond.grad


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
    ("n", "d", "kl_weight", "clip", "kind"),
    [
        (0, 3, 0.4, "ppo", "gaussian"),
        (1, 1, 0.4, "ppo", "gaussian"),
        (5, 700, 0.4, "ppo", "gaussian"),
        (5, 700, 0.0, "ppo", "squared_error"),
        (2, 8200, 0.4, "dpok", "squared_error"),
        (9, 33, "by row", "dpok", "gaussian"),
    ],
)
def test_fused_training_step_equals_the_reference(n, d, kl_weight, clip, kind, dtype):
    kl_weight = torch.linspace(0, 1, n) if kl_weight == "by row" else kl_weight
    choices = {"kl_weight": kl_weight, "clip": clip, "kind": kind}
    *latents, coef, old_log_prob, advantage = _random(n, d, dtype)
    rows = (latents, coef, old_log_prob, advantage)
    loss, stats, *gradients = _run(training_step.transition_policy_loss, *rows, **choices)
    exact_loss, exact_stats, *exact_gradients = _run(
        reference.transition_policy_loss, *rows, **choices, dtype=torch.float64
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


def _grad(latents, coef, old_log_prob, advantage, **choices) -> Any:
    """(loss, statistics, the gradients of both outputs), from the direct entry."""
    sample, output, uncond, prev_sample, ref_output = latents
    return training_gradient.transition_policy_grad(
        sample, output, prev_sample, coef, old_log_prob, advantage, clip_range=0.1, clip_range_high=0.2,
        output_uncond=uncond, guidance_scale=GUIDANCE, ref_output=ref_output, **choices,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize(
    ("n", "d", "clip", "kind"),
    [(0, 3, "ppo", "gaussian"), (4, 1100, "ppo", "gaussian"), (3, 9, "dpok", "squared_error")],
)
def test_direct_gradient_is_that_of_the_graph(n, d, clip, kind, dtype):
    *latents, coef, old_log_prob, advantage = _random(n, d, dtype)
    rows = (latents, coef, old_log_prob, advantage)
    choices = {"kl_weight": 0.3, "clip": clip, "kind": kind}
    want, want_stats, *want_gradients = _run(training_step.transition_policy_loss, *rows, **choices)
    loss, stats, *gradients = _grad(*rows, **choices, scale=torch.linspace(0.5, 2, n))
    assert not loss.requires_grad
    assert torch.equal(loss, want)
    assert list(stats) == list(want_stats)
    for name in stats:
        assert torch.equal(stats[name], want_stats[name]), name
    for got, graph in zip(gradients, want_gradients, strict=True):
        assert torch.equal(got, graph)


@pytest.mark.parametrize("scale", [1.0, 0.125, torch.tensor([0.5, 0.0, -2.0])], ids=["one", "eighth", "by-row"])
def test_direct_gradient_equals_the_reference(scale):
    sample, output, uncond, prev_sample, ref_output, *rows = _random(3, 50)
    rows[0][1, 2] = 0.4
    choices: dict[str, Any] = {
        "clip_range": 0.1,
        "guidance_scale": GUIDANCE,
        "kl_weight": torch.tensor([0.1, 0.0, 2.0]),
    }
    results = []
    for module, dtype in ((training_gradient, torch.float32), (reference, torch.float64)):
        latents = [x.to(dtype) for x in (sample, output, prev_sample, *rows)]
        others = {"output_uncond": uncond.to(dtype), "ref_output": ref_output.to(dtype)}
        results.append(module.transition_policy_grad(*latents, **others, **choices, scale=scale))
    (loss, _, *gradients), (exact_loss, _, *exact_gradients) = results
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-5)
    for got, exact in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=5e-6 * exact.abs().max().item())
    alone = training_gradient.transition_policy_grad(sample, output, prev_sample, *rows, clip_range=0.1, scale=scale)
    assert alone[3] is None


def test_squared_error_trains_a_step_without_noise():
    *latents, coef, _, advantage = _random(3, 40)
    coef[1, 2] = 0.0
    sample, output, uncond, prev_sample, _ = latents
    old_log_prob = reference.guided_transition_log_prob(
        sample, output, uncond, GUIDANCE, prev_sample, coef, kind="squared_error"
    )
    rows = (latents, coef, old_log_prob, advantage)
    loss, stats, grad, _ = _run(training_step.transition_policy_loss, *rows, with_ref=False, kind="squared_error")
    _, _, exact, _ = _run(
        reference.transition_policy_loss, *rows, with_ref=False, kind="squared_error", dtype=torch.float64
    )
    assert loss.isfinite().all()
    assert stats["nonfinite"].tolist() == [0, 0, 0]
    torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gaussian", "squared_error"])
def test_first_update_after_a_rollout_sees_a_ratio_of_exactly_one(dtype, kind):
    sample, output, uncond, noise, ref_output, coef, _, advantage = _random(3, 8201, dtype)
    guidance = {"output_uncond": uncond, "guidance_scale": GUIDANCE, "kind": kind}
    prev_sample, old_log_prob = step.transition_step(sample, output, noise, coef, **guidance)
    rows = (sample, output, prev_sample, coef, old_log_prob, advantage)
    _, stats = training_step.transition_policy_loss(*rows, clip_range=1e-4, ref_output=ref_output, **guidance)
    _, direct, *_ = training_gradient.transition_policy_grad(*rows, clip_range=1e-4, **guidance)
    for found in (stats, direct):
        assert torch.equal(found["log_prob"], old_log_prob)
        assert found["ratio"].tolist() == [1.0] * 3
        assert found["approx_kl"].tolist() == found["clipfrac"].tolist() == [0.0] * 3


def test_a_row_does_not_depend_on_its_batch():
    *latents, coef, old_log_prob, advantage = _random(64, 1030)
    together = _grad(latents, coef, old_log_prob, advantage, kl_weight=0.2)
    row = slice(37, 38)
    alone = _grad([x[row] for x in latents], coef[row], old_log_prob[row], advantage[row], kl_weight=0.2)
    for whole, single in zip((together[0], *together[2:]), (alone[0], *alone[2:]), strict=True):
        assert torch.equal(whole[row], single)
    for name in together[1]:
        assert torch.equal(together[1][name][row], alone[1][name]), name


def test_any_layout_of_the_latents():
    *latents, coef, old_log_prob, advantage = _random(2, 4 * 5 * 6)
    rows = (coef, old_log_prob, advantage)
    want = _grad(latents, *rows, kl_weight=0.2)
    channels_last = [x.view(2, 4, 5, 6).to(memory_format=torch.channels_last) for x in latents]
    trajectory = list(torch.stack(latents, 1).unbind(1))
    mixed = [latents[0].to(torch.float64).float().t().contiguous().t(), *trajectory[1:]]
    for moved in (channels_last, trajectory, mixed):
        got = _grad(moved, coef.expand(2, 3), *rows[1:], kl_weight=0.2)
        rtol = 2e-6 if moved is channels_last else 0  # sums run in the order of the memory
        for one, other in zip((got[0], *got[2:]), (want[0], *want[2:]), strict=True):
            torch.testing.assert_close(one.flatten(1) if one.dim() > 1 else one, other, rtol=rtol, atol=rtol)
    image = _grad(channels_last, *rows, kl_weight=0.2)[2]
    assert image.is_contiguous(memory_format=torch.channels_last)


def test_checkpointing_changes_no_bit():
    *latents, coef, old_log_prob, advantage = _random(3, 40)
    sample, _, uncond, prev_sample, ref_output = latents
    results = []
    for is_checkpointed in (False, True):
        weight = torch.linspace(-1, 1, 40).requires_grad_()

        def loss(weight):
            return training_step.transition_policy_loss(
                sample, sample * weight, prev_sample, coef, old_log_prob, advantage, clip_range=10.0,
                output_uncond=uncond, guidance_scale=GUIDANCE, ref_output=ref_output, kl_weight=0.1,
            )[0]  # fmt: skip

        value = checkpoint(loss, weight, use_reentrant=False) if is_checkpointed else loss(weight)
        value.sum().backward()
        results.append((value.detach(), weight.grad))
    assert results[0][1].abs().max() > 0
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


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
    loss, stats, grad, _ = _grad(latents, coef[1:], old_log_prob[1:], advantage[1:], kl_weight=0.1)
    assert loss.isnan().tolist() == grad.isnan().any(1).tolist() == isolated
    assert stats["nonfinite"].tolist() == [0, 1, 0]


def test_wrong_input_is_refused():
    sample, output, _, prev_sample, _, coef, old_log_prob, advantage = _random(3, 8)
    with pytest.raises(ValueError, match="needs ref_output"):
        training_step.transition_policy_loss(
            sample, output, prev_sample, coef, old_log_prob, advantage, clip_range=0.1, kl_weight=0.1
        )
    with pytest.raises(ValueError, match=r"old_log_prob must be \[3\] on cpu, one for each row, not \[1\]"):
        training_step.transition_policy_loss(
            sample, output, prev_sample, coef, old_log_prob[:1], advantage, clip_range=0.1
        )
    rows = (sample, output, prev_sample, coef, old_log_prob, advantage)
    with pytest.raises(ValueError, match="clip must be one of ppo, dpok, not 'grpo'"):
        training_step.transition_policy_loss(*rows, clip_range=0.1, clip="grpo")
    with pytest.raises(ValueError, match=r"kl_weight must be a number or \[3\], one for each row, not \[1\]"):
        training_step.transition_policy_loss(*rows, clip_range=0.1, ref_output=output, kl_weight=torch.ones(1))
    with pytest.raises(ValueError, match=r"scale must be a number or \[3\], one for each row, not \[\]"):
        training_gradient.transition_policy_grad(*rows, clip_range=0.1, scale=torch.tensor(1.0))


@pytest.mark.parametrize("clip", ["ppo", "dpok"])
def test_without_an_old_log_prob_the_policy_is_its_own(clip):
    *latents, coef, _, advantage = _random(5, 1100)
    latents[0][2, 3] = torch.nan
    choices = {"kl_weight": 0.3, "clip": clip}
    own = _run(training_step.transition_policy_loss, latents, coef, None, advantage, **choices)
    log_prob = own[1]["log_prob"]
    told = _run(training_step.transition_policy_loss, latents, coef, log_prob, advantage, **choices)
    direct = _grad(latents, coef, None, advantage, **choices, scale=torch.linspace(0.5, 2, 5))
    finite = log_prob.isfinite()
    assert finite.tolist() == [True, True, False, True, True]
    assert (own[1]["ratio"][finite] == 1).all()
    for got in (told, direct):
        torch.testing.assert_close(got[0], own[0], rtol=0, atol=0, equal_nan=True)
        for name, value in own[1].items():
            if name != "output_gradient" or got is direct:
                torch.testing.assert_close(got[1][name], value, rtol=0, atol=0, equal_nan=True)
        rows = finite if got is told else slice(None)  # of a ratio that is NaN the slope is, and so is all of the row
        for one, other in zip(got[2:], own[2:], strict=True):
            torch.testing.assert_close(one[rows], other[rows], rtol=0, atol=0, equal_nan=True)
    assert told[2][2].isnan().all()
    exact = _run(reference.transition_policy_loss, latents, coef, None, advantage, **choices)
    for one, other in zip((own[0], *own[2:]), (exact[0], *exact[2:]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert own[2][2].isnan().sum() == 1, "where the residual is"
