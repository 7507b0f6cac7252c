"""The rollout step, interpreted: its sample, its log-probability, its x0, and what must be exact."""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run here under TRITON_INTERPRET=1 alone", allow_module_level=True)

from adascope_fast import reference
from adascope_fast.kernels import correlation, step, transition

# The interpreter truncates to bfloat16 where a GPU rounds.
RTOL = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
GUIDANCE = 3.5


def _random(n, d, dtype=torch.float32):
    """(sample, output, noise, coef), then x0_coef, prev_x0 and output_uncond by name."""
    generator = torch.Generator().manual_seed(n * 1000 + d)
    sample, output, noise, uncond, other = torch.randn(5, n, d, generator=generator).to(dtype).unbind(0)
    coef, x0_coef = 0.2 + torch.rand(n, 3, generator=generator), 0.5 + torch.rand(n, 2, generator=generator)
    prev_x0 = (0.7 * sample + 0.7 * other).to(dtype)
    return (sample, output, noise, coef), x0_coef, prev_x0, {"output_uncond": uncond, "guidance_scale": GUIDANCE}


@pytest.mark.parametrize("kind", ["gaussian", "squared_error"])
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("is_guided", [False, True])
@pytest.mark.parametrize(("n", "d"), [(0, 5), (1, 1), (3, 220), (1, 8209)])
def test_step_equals_the_reference_and_its_ratio_is_exactly_one(n, d, is_guided, dtype, kind):
    rows, _, _, guidance = _random(n, d, dtype)
    uncond = guidance["output_uncond"] if is_guided else None
    guidance["output_uncond"] = uncond
    prev_sample, old_log_prob = step.transition_step(*rows, **guidance, kind=kind)
    want, _ = reference.transition_step(*rows, **guidance)
    assert prev_sample.dtype == dtype
    torch.testing.assert_close(prev_sample, want, rtol=RTOL[dtype], atol=1e-6)
    sample, output, _, coef = rows
    policy = (sample, output, uncond, GUIDANCE, prev_sample, coef)
    log_prob = transition.guided_transition_log_prob(*policy, kind=kind)
    assert torch.equal(log_prob, old_log_prob)
    uncond = None if uncond is None else uncond.double()
    exact = (sample.double(), output.double(), uncond, GUIDANCE, prev_sample.double(), coef.double())
    want = reference.guided_transition_log_prob(*exact, kind=kind)
    torch.testing.assert_close(old_log_prob.double(), want, rtol=5e-6, atol=1e-6)


def test_dtypes_may_differ():
    (sample, output, noise, coef), x0_coef, prev_x0, guidance = _random(2, 100)
    rows = (sample.half(), output.bfloat16(), noise, coef, x0_coef)
    prev_sample, log_prob, x0, moments = step.transition_step_with_x0(*rows, prev_x0=prev_x0, **guidance)
    want, want_log_prob, want_x0, want_moments = reference.transition_step_with_x0(*rows, prev_x0=prev_x0, **guidance)
    assert prev_sample.dtype == x0.dtype == torch.float16
    torch.testing.assert_close(prev_sample, want, rtol=2**-10, atol=1e-4)
    torch.testing.assert_close(log_prob, want_log_prob, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x0, want_x0, rtol=2**-10, atol=1e-4)
    torch.testing.assert_close(moments, want_moments, rtol=1e-3, atol=1e-3)


def test_deterministic_step_is_its_mean():
    (sample, output, noise, coef), *_ = _random(3, 20)
    coef[1, 2] = 0.0
    prev_sample, log_prob = step.transition_step(sample, output, noise, coef)
    torch.testing.assert_close(prev_sample[1], coef[1, 0] * sample[1] + coef[1, 1] * output[1])
    assert log_prob.isnan().tolist() == [False, True, False]
    _, log_prob = step.transition_step(sample, output, noise, coef, kind="squared_error")
    assert log_prob[1].item() == pytest.approx(0, abs=1e-12)
    assert log_prob[0].item() == pytest.approx(-(coef[0, 2] * noise[0]).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize(("n", "d"), [(0, 4), (1, 2), (3, 1030), (1, 8209)])
def test_x0_and_its_moments_cost_the_step_no_bit(n, d, dtype):
    rows, x0_coef, prev_x0, guidance = _random(n, d, dtype)
    prev_sample, log_prob, x0, moments = step.transition_step_with_x0(*rows, x0_coef, prev_x0=prev_x0, **guidance)
    for got, want in zip((prev_sample, log_prob), step.transition_step(*rows, **guidance), strict=True):
        assert torch.equal(got, want)
    without = step.transition_step_with_x0(*rows, x0_coef, **guidance)
    assert torch.equal(without[2], x0)
    assert without[3] is None
    _, _, want, _ = reference.transition_step_with_x0(*rows, x0_coef, **guidance)
    assert x0.dtype == dtype
    torch.testing.assert_close(x0, want, rtol=RTOL[dtype], atol=4e-6)
    assert moments is not None
    assert moments.shape == (n, 6)
    exact = reference.correlation_update(torch.zeros(n, 6).double(), x0.double(), prev_x0.double())
    torch.testing.assert_close(moments.double(), exact, rtol=2e-6, atol=2e-6 * d)
    torch.testing.assert_close(
        reference.correlation_from_state(moments), correlation.correlation(x0, prev_x0), rtol=0, atol=1e-6
    )


def test_moments_by_hand_and_beside_a_large_offset():
    x, y = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), torch.tensor([[2.0, 1.0, 4.0, 3.0, 5.0]])
    coef, x0_coef, zero = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.zeros(1, 5)
    *_, moments = step.transition_step_with_x0(x, zero, zero, coef, x0_coef, prev_x0=y)
    assert moments is not None
    # means 3 and 3; deviations -2..2 and -1, -2, 1, 0, 2: squares 10 and 10, products 2 + 2 + 0 + 0 + 4
    assert moments.tolist() == [[5, 3, 3, 10, 10, 8]]
    *_, moments = step.transition_step_with_x0(x + 1e4, zero, zero, coef, x0_coef, prev_x0=y - 1e4)
    assert moments is not None
    assert moments.tolist() == [[5, 10003, -9997, 10, 10, 8]]


def test_a_row_does_not_depend_on_its_batch_nor_on_its_layout():
    rows, x0_coef, prev_x0, guidance = _random(64, 4 * 15 * 18)
    together = step.transition_step_with_x0(*rows, x0_coef, prev_x0=prev_x0, **guidance)
    row = slice(29, 30)
    guidance["output_uncond"], alone = guidance["output_uncond"][row], [x[row] for x in (*rows, x0_coef)]
    single = step.transition_step_with_x0(*alone, prev_x0=prev_x0[row], **guidance)
    image = [x.view(1, 4, 15, 18).to(memory_format=torch.channels_last) for x in (*alone[:3], prev_x0[row])]
    guidance["output_uncond"] = guidance["output_uncond"].view(1, 4, 15, 18)
    moved = step.transition_step_with_x0(*image[:3], *alone[3:], prev_x0=image[3], **guidance)
    for whole, lone, shifted in zip(together, single, moved, strict=True):
        assert whole is not None
        assert lone is not None
        assert shifted is not None
        assert torch.equal(whole[row], lone)
        assert torch.equal(shifted.flatten(1) if shifted.dim() > 1 else shifted, lone)


def test_expanded_and_strided_latents():
    (sample, output, noise, coef), x0_coef, prev_x0, _ = _random(3, 50)
    want = step.transition_step(sample[:1].expand(3, -1), output, noise, coef)
    got = step.transition_step(
        sample[:1].expand(3, -1).contiguous(), torch.stack([output, noise], 1)[:, 0], noise, coef
    )
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    every_other = torch.stack([prev_x0, noise], 2).flatten(1)[:, ::2]
    got = step.transition_step_with_x0(sample, output, noise, coef, x0_coef, prev_x0=every_other)
    want = step.transition_step_with_x0(sample, output, noise, coef, x0_coef, prev_x0=prev_x0)
    for one, other in zip(got, want, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_nan_stays_in_its_row():
    rows, x0_coef, prev_x0, guidance = _random(3, 40)
    rows[1][1, 7] = math.nan
    prev_sample, log_prob, x0, moments = step.transition_step_with_x0(*rows, x0_coef, prev_x0=prev_x0, **guidance)
    assert moments is not None
    for result in (prev_sample, log_prob[:, None], x0, moments):
        assert result.isnan().any(1).tolist() == [False, True, False]


def test_wrong_input_is_refused():
    rows, x0_coef, prev_x0, _ = _random(3, 8)
    with pytest.raises(ValueError, match=r"x0_coef must be \[3, 2\], one \(c0, c1\) for each row, not \[3, 3\]"):
        step.transition_step_with_x0(*rows, rows[3])
    with pytest.raises(ValueError, match=r"prev_x0 \[3, 7\]"):
        step.transition_step_with_x0(*rows, x0_coef, prev_x0=prev_x0[:, :7])
    with pytest.raises(ValueError, match="kind must be one of gaussian, squared_error, not 'cps'"):
        step.transition_step(*rows, kind="cps")
