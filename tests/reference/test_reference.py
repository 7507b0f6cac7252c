"""The plain PyTorch mathematics against known answers, in value and gradient, and its promises on batches and NaN."""

import json
import math
from pathlib import Path

import pytest
import torch

from adascope_fast import reference

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())
RTOL = {torch.float64: 1e-12, torch.float32: 2e-5}


def _mean(key):
    return [case for case in VECTORS[key] if case["reduce"] == "mean"]


def _close(got, want, dtype, name):
    want = torch.tensor(want, dtype=dtype)
    assert got.dtype == dtype, name
    torch.testing.assert_close(got, want, rtol=RTOL[dtype], atol=RTOL[dtype], msg=lambda text: f"{name}: {text}")


def _random(n, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sample, output, prev_sample, other = torch.randn(4, n, d, generator=generator, dtype=dtype).unbind(0)
    coef = 0.2 + torch.rand(n, 3, generator=generator, dtype=torch.float32)
    return sample, output, prev_sample, other, coef


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize(
    "case", [*_mean("logprob"), VECTORS["logprob_hand"]], ids=lambda case: case.get("scheme", "hand")
)
def test_log_prob_equals_the_known_answers(case, dtype):
    sample, output, prev_sample = (torch.tensor([case[name]], dtype=dtype) for name in ("x", "model_output", "y"))
    coef = torch.tensor([[case["a_x"], case["b_m"], case["std"]]], dtype=dtype)
    output.requires_grad_()
    kind = "squared_error" if case.get("scheme") == "cps_unnormalised" else "gaussian"
    log_prob = reference.transition_log_prob(sample, output, prev_sample, coef, kind=kind)
    log_prob.sum().backward()
    _close(log_prob.detach(), [case["logp"]], dtype, "log_prob")
    _close(output.grad, [case["dlogp_dm"]], dtype, "gradient")


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("case", _mean("kl"), ids=lambda case: case["scheme"])
def test_kl_equals_the_known_answers(case, dtype):
    output, ref_output = (torch.tensor([case[name]], dtype=dtype) for name in ("m", "m_ref"))
    output.requires_grad_()
    kl = reference.gaussian_kl(output, ref_output, torch.tensor([[1.0, case["b_m"], case["std"]]], dtype=dtype))
    kl.sum().backward()
    _close(kl.detach(), [case["kl"]], dtype, "kl")
    _close(output.grad, [case["dkl_dm"]], dtype, "gradient")


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("case", VECTORS["ppo"], ids=["branches", "ddpo-scale"])
def test_clipped_loss_equals_the_known_answers(case, dtype):
    log_prob, old_log_prob, advantage = (torch.tensor(case[name], dtype=dtype) for name in ("logp", "logp_old", "adv"))
    log_prob.requires_grad_()
    loss, ratio = reference.clipped_policy_loss(
        log_prob, old_log_prob, advantage, clip_range=case["clip_low"], clip_range_high=case["clip_high"]
    )
    loss.mean().backward()
    assert not ratio.requires_grad
    _close(loss.mean().detach(), case["loss"], dtype, "loss")
    _close(log_prob.grad, case["dloss_dlogp"], dtype, "gradient")
    clipfrac = ((ratio < 1 - case["clip_low"]) | (ratio > 1 + case["clip_high"])).to(dtype).mean()
    _close(clipfrac, case["clipfrac"], dtype, "clipfrac")


@pytest.mark.parametrize("dtype", RTOL)
def test_fused_training_step_equals_the_known_answers(dtype):
    case = VECTORS["fused_chain"]
    affine = next(
        entry
        for entry in _mean("logprob")
        if all(entry.get(key) == case[key] for key in ("scheme", "pred", "alpha_bar", "alpha_bar_prev", "eta"))
    )
    sample, output, prev_sample = (torch.tensor(case[name], dtype=dtype) for name in "xmy")
    old_log_prob, advantage = (torch.tensor(case[name], dtype=dtype) for name in ("logp_old", "adv"))
    coef = torch.tensor([[affine["a_x"], affine["b_m"], affine["std"]]], dtype=dtype).expand(2, 3)
    output.requires_grad_()
    loss, stats = reference.transition_policy_loss(
        sample, output, prev_sample, coef, old_log_prob, advantage, clip_range=case["clip"]
    )
    loss.mean().backward()
    _close(stats["log_prob"], case["logp"], dtype, "log_prob")
    _close(loss.mean().detach(), case["loss"], dtype, "loss")
    _close(output.grad, case["dloss_dm"], dtype, "gradient")
    assert stats["nonfinite"].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", RTOL)
def test_correlation_equals_the_known_answers(dtype):
    case = VECTORS["streaming"]["small"]
    x, y = (torch.tensor([case[name]], dtype=dtype) for name in "xy")
    state = reference.correlation_update(torch.zeros(1, 6, dtype=dtype), x, y)
    _close(state, [[case[key] for key in ("n", "mean_x", "mean_y", "sxx", "syy", "sxy")]], dtype, "state")
    _close(reference.correlation(x, y), [0.6], dtype, "correlation")
    _close(reference.correlation_from_state(state), [0.6], dtype, "correlation from state")
    _close(reference.correlation(x + 1e4, y + 1e4), [VECTORS["streaming"]["offset_1e4_corr"]], dtype, "with offset")
    assert reference.correlation(torch.full_like(x, 1e4), y).isnan().all()


@pytest.mark.parametrize("dtype", RTOL)
def test_streaming_correlation_equals_the_known_merge(dtype):
    case = VECTORS["streaming"]["merge"]
    x, y = (torch.tensor([case[name]], dtype=dtype) for name in "xy")
    state = torch.zeros(1, 6, dtype=dtype)
    for part in (slice(None, case["split"]), slice(case["split"], None)):
        state = reference.correlation_update(state, x[:, part], y[:, part])
    _close(state[0, 1:], [case[key] for key in ("mean_x", "mean_y", "sxx", "syy", "sxy")], dtype, "state")
    _close(reference.correlation_from_state(state), [case["corr"]], dtype, "correlation")


def test_channel_centering_ignores_the_offset_of_each_channel():
    x, y, *_ = _random(2, 3 * 40, torch.float64)
    shift = torch.tensor([100.0, -50.0, 7.0], dtype=torch.float64).repeat_interleave(40)
    got = reference.correlation(x + shift, y - 2 * shift, center="channel", num_channels=3)
    rows = [torch.cat([part - part.mean() for part in row.split(40)]) for row in (*x, *y)]
    want = [(u @ w / (u.norm() * w.norm())).item() for u, w in zip(rows[:2], rows[2:], strict=True)]
    assert got.tolist() == pytest.approx(want, rel=1e-11)
    assert reference.correlation(x + shift, y - 2 * shift).max() < -0.9


def test_correlation_is_nan_where_an_input_is_not_finite_and_exact_where_rows_are_equal():
    x, y, *_ = _random(3, 50)
    x[0, 7], y[1, 3] = math.inf, math.nan
    y[2] = -3 * x[2] + 5
    value = reference.correlation(x, y)
    assert value[:2].isnan().all()
    assert value[2] == pytest.approx(-1, abs=1e-6)
    assert value[2] >= -1


def test_gradients_agree_with_finite_differences():
    sample, output, prev_sample, other, coef = _random(3, 5, torch.float64)
    coef = coef.double()
    output.requires_grad_()
    uncond = other.clone().requires_grad_()

    def log_prob(output, uncond):
        return reference.guided_transition_log_prob(sample, output, uncond, 7.5, prev_sample, coef)

    def loss(output, uncond):
        old_log_prob = torch.tensor([-50.0, -60.0, -40.0], dtype=torch.float64)
        advantage = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
        return reference.transition_policy_loss(
            sample, output, prev_sample, coef, old_log_prob, advantage, clip_range=50.0,
            output_uncond=uncond, guidance_scale=1.5, ref_output=other, kl_weight=0.3,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(log_prob, (output, uncond))
    assert torch.autograd.gradcheck(loss, (output, uncond))
    assert torch.autograd.gradcheck(lambda output: reference.gaussian_kl(output, other, coef), (output,))


def test_only_the_outputs_receive_a_gradient():
    sample, output, prev_sample, uncond, coef = (x.requires_grad_() for x in _random(2, 6))
    reference.guided_transition_log_prob(sample, output, uncond, 3.0, prev_sample, coef).sum().backward()
    assert output.grad is not None
    assert uncond.grad is not None
    assert sample.grad is prev_sample.grad is coef.grad is None


def test_guidance_extrapolates_from_the_unconditional_output():
    sample, output, prev_sample, uncond, coef = _random(2, 9)
    want = reference.transition_log_prob(sample, uncond + 4.0 * (output - uncond), prev_sample, coef)
    got = reference.guided_transition_log_prob(sample, output, uncond, 4.0, prev_sample, coef)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    alone = reference.guided_transition_log_prob(sample, output, None, 4.0, prev_sample, coef)
    assert torch.equal(alone, reference.transition_log_prob(sample, output, prev_sample, coef))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_first_update_after_a_rollout_sees_a_ratio_of_exactly_one(dtype):
    sample, output, noise, uncond, coef = _random(7, 4 * 9 * 9)
    sample, output, noise, uncond = (x.to(dtype).view(7, 4, 9, 9) for x in (sample, output, noise, uncond))
    guidance = {"output_uncond": uncond, "guidance_scale": 5.0}
    prev_sample, old_log_prob = reference.transition_step(sample, output, noise, coef, **guidance)
    mean = coef[:, 0, None] * sample.flatten(1) + coef[:, 1, None] * (uncond + 5.0 * (output - uncond)).flatten(1)
    want = mean + coef[:, 2, None] * noise.flatten(1)
    torch.testing.assert_close(prev_sample.flatten(1).float(), want.float(), rtol=0.05, atol=0.05)
    assert prev_sample.dtype == dtype
    _, stats = reference.transition_policy_loss(
        sample, output, prev_sample, coef, old_log_prob, torch.ones(7), clip_range=1e-4, **guidance
    )
    assert stats["ratio"].tolist() == [1.0] * 7
    assert stats["approx_kl"].tolist() == stats["clipfrac"].tolist() == [0.0] * 7


def test_deterministic_step_is_its_mean_and_has_no_log_prob():
    sample, output, noise, _, coef = _random(3, 10)
    coef[1, 2] = 0.0
    prev_sample, log_prob = reference.transition_step(sample, output, noise, coef)
    torch.testing.assert_close(prev_sample[1], coef[1, 0] * sample[1] + coef[1, 1] * output[1])
    assert log_prob.isnan().tolist() == [False, True, False]
    _, log_prob = reference.transition_step(sample, output, noise, coef, kind="squared_error")
    assert log_prob[1].item() == pytest.approx(0, abs=1e-12)
    assert log_prob[0].item() == pytest.approx(-(coef[0, 2] * noise[0]).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("case", VECTORS["x0_prediction"], ids=lambda case: case["pred"])
def test_x0_of_a_step_equals_the_known_answers(case):
    x0_coef = {
        "epsilon": (2**0.5, -1.0),  # (x - sqrt(1 - 0.5) m) / sqrt(0.5)
        "v_prediction": (0.5**0.5, -(0.5**0.5)),
        "flow": (1.0, -0.5),
    }[case["pred"]]
    sample, output = (torch.tensor([case[name]], dtype=torch.float64) for name in "xm")
    rows = (sample, output, torch.zeros_like(sample), torch.tensor([[0.9, -0.1, 0.3]]))
    step = reference.transition_step_with_x0(*rows, torch.tensor([x0_coef], dtype=torch.float64))
    assert step.x0_correlation is None
    _close(step.x0, [case["x0"]], torch.float64, "x0")
    for got, want in zip(step[:2], reference.transition_step(*rows), strict=True):
        assert torch.equal(got, want)


def test_correlations_of_a_step_are_of_what_is_stored():
    sample, output, noise, prev_x0, coef = _random(3, 40)
    rows = (sample.bfloat16(), output, noise, coef, torch.tensor([[1.5, -0.5]]).expand(3, 2))
    step = reference.transition_step_with_x0(*rows, prev_x0=prev_x0)
    assert step.prev_sample.dtype == step.x0.dtype == torch.bfloat16
    assert step.x0_correlation is not None
    assert torch.equal(step.x0_correlation, reference.correlation(step.x0, prev_x0))
    assert torch.equal(step.sample_correlation, reference.correlation(rows[0], step.prev_sample))
    with pytest.raises(ValueError, match=r"x0_coef must be \[3, 2\]"):
        reference.transition_step_with_x0(*rows[:4], coef)


@pytest.mark.parametrize("d", [1, 7, 1000, 4096, 4097, 4 * 64 * 64, 40001, 16 * 64 * 64])
def test_a_row_does_not_depend_on_its_batch(d):
    n = 64 if d < 10_000 else 9
    sample, output, prev_sample, other, coef = _random(n, d)

    def results(rows):
        x, m, y, u, c = (value[rows] for value in (sample, output, prev_sample, other, coef))
        stepped, log_prob = reference.transition_step(x, m, u, c)
        correlation = reference.correlation(x, m).nan_to_num()
        guided = reference.guided_transition_log_prob(x, m, u, 7.5, y, c)
        return stepped, log_prob, correlation, guided, reference.gaussian_kl(m, u, c)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = results(slice(None))
        for row in (0, 3, n - 1):
            for whole, alone in zip(together, results(slice(row, row + 1)), strict=True):
                assert torch.equal(whole[row : row + 1], alone)
    finally:
        torch.set_num_threads(threads)


def test_nan_stays_in_its_row_and_is_counted():
    sample, output, prev_sample, _, coef = _random(4, 12)
    output[2, 5] = math.nan
    output.requires_grad_()
    old_log_prob = reference.transition_log_prob(sample, torch.zeros_like(output), prev_sample, coef)
    loss, stats = reference.transition_policy_loss(
        sample, output, prev_sample, coef, old_log_prob, torch.ones(4), clip_range=0.1
    )
    loss.sum().backward()
    isolated = [False, False, True, False]
    for name in ("log_prob", "ratio", "approx_kl"):
        assert stats[name].isnan().tolist() == isolated, name
    assert loss.isnan().tolist() == isolated
    assert output.grad is not None
    assert output.grad.isnan().any(1).tolist() == isolated
    assert stats["nonfinite"].tolist() == [0, 0, 1, 0]


def test_kl_is_zero_without_a_reference_and_measured_without_a_weight():
    sample, output, prev_sample, ref_output, coef = _random(3, 8)
    rows = (sample, output, prev_sample, coef, torch.zeros(3), torch.ones(3))
    plain, stats = reference.transition_policy_loss(*rows, clip_range=0.1)
    assert stats["kl"].tolist() == [0.0] * 3
    measured, stats = reference.transition_policy_loss(*rows, clip_range=0.1, ref_output=ref_output)
    assert torch.equal(measured, plain)
    assert torch.equal(stats["kl"], reference.gaussian_kl(output, ref_output, coef))
    assert (stats["kl"] > 0).all()
    with pytest.raises(ValueError, match=r"kl_weight = 0\.1 needs ref_output"):
        reference.transition_policy_loss(*rows, clip_range=0.1, kl_weight=0.1)


def test_an_empty_batch_is_served():
    sample, output, prev_sample, uncond, coef = _random(0, 6)
    assert reference.transition_log_prob(sample, output, prev_sample, coef).shape == (0,)
    assert reference.transition_step(sample, output, prev_sample, coef, output_uncond=uncond)[0].shape == (0, 6)
    assert reference.correlation(sample, output).shape == (0,)


def test_wrong_shapes_are_refused_by_name():
    sample, output, prev_sample, _, coef = _random(3, 8)
    with pytest.raises(ValueError, match=r"output \[3, 7\]"):
        reference.transition_log_prob(sample, output[:, :7], prev_sample, coef)
    with pytest.raises(ValueError, match=r"coef must be \[3, 3\]"):
        reference.transition_log_prob(sample, output, prev_sample, coef[:1])
    with pytest.raises(ValueError, match="must have one shape"):
        reference.clipped_policy_loss(coef[:, 0], coef[:1, 0], coef[:, 0], clip_range=0.1)
    with pytest.raises(ValueError, match='"sample" or "channel"'):
        reference.correlation(sample, output, center="row")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="num_channels that divides 8"):
        reference.correlation(sample, output, center="channel", num_channels=3)
    with pytest.raises(ValueError, match=r"state must be \[3, 6\]"):
        reference.correlation_update(torch.zeros(2, 6), sample, output)
