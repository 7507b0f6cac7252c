"""The rollout step, interpreted: its sample, its log-probability, its x0, and what must be exact."""

import math
import os
from typing import Any

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
    got = step.transition_step_with_x0(*rows, prev_x0=prev_x0, **guidance)
    want = reference.transition_step_with_x0(*rows, prev_x0=prev_x0, **guidance)
    assert got.prev_sample.dtype == got.x0.dtype == torch.float16
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


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
def test_x0_and_its_structure_cost_the_step_no_bit(n, d, dtype):
    rows, x0_coef, prev_x0, guidance = _random(n, d, dtype)
    got = step.transition_step_with_x0(*rows, x0_coef, prev_x0=prev_x0, **guidance)
    for one, other in zip(got[:2], step.transition_step(*rows, **guidance), strict=True):
        assert torch.equal(one, other)
    without = step.transition_step_with_x0(*rows, x0_coef, **guidance)
    assert torch.equal(without.x0, got.x0)
    assert torch.equal(without.sample_correlation, got.sample_correlation)
    assert without.x0_correlation is None
    want = reference.transition_step_with_x0(*rows, x0_coef, **guidance)
    assert got.x0.dtype == dtype
    torch.testing.assert_close(got.x0, want.x0, rtol=RTOL[dtype], atol=4e-6)
    pairs = ((got.x0_correlation, got.x0, prev_x0), (got.sample_correlation, rows[0], got.prev_sample))
    for found, x, y in pairs:
        assert found is not None
        exact = reference.correlation(x.double(), y.double())
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)
        torch.testing.assert_close(found, correlation.correlation(x, y), rtol=0, atol=1e-6)


def test_structure_by_hand_and_beside_a_large_offset():
    x, y = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), torch.tensor([[2.0, 1.0, 4.0, 3.0, 5.0]])
    coef, x0_coef, zero = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.zeros(1, 5)
    # means 3 and 3; deviations -2..2 and -1, -2, 1, 0, 2: squares 10 and 10, products 2 + 2 + 0 + 0 + 4
    for offset in (0.0, 1e4):
        found = step.transition_step_with_x0(x + offset, zero, y - x, coef, x0_coef, prev_x0=y - offset)
        assert found.prev_sample.tolist() == (y + offset).tolist()
        assert found.x0_correlation is not None
        for value in (found.x0_correlation, found.sample_correlation):
            assert value.tolist() == [pytest.approx(0.8, abs=1e-7)]


def _tables(shape, generator):
    """(states, guesses) [b, t, *latent], numbers [3, b, t]; a step writes its column of each."""
    states, guesses = torch.randn(2, 4, 3, *shape, generator=generator).unbind(0)
    return states, guesses, torch.full((3, 4, 3), -7.0)


@pytest.mark.parametrize("rows", [None, [3, 0]])
@pytest.mark.parametrize("is_channels_last", [False, True])
def test_a_step_writes_where_the_noise_lay(is_channels_last, rows):
    generator, shape = torch.Generator().manual_seed(7), (4, 15, 18)
    layout = (0, 1, 3, 4, 2) if is_channels_last else (0, 1, 2, 3, 4)
    back = (0, 1, 4, 2, 3) if is_channels_last else layout
    states, guesses, numbers = _tables(tuple((*shape[1:], shape[0]) if is_channels_last else shape), generator)
    states, guesses = states.permute(back), guesses.permute(back)
    n = 4 if rows is None else len(rows)
    output, uncond = torch.randn(2, n, *shape, generator=generator).to(memory_format=torch.preserve_format).unbind(0)
    if is_channels_last:
        output = output.contiguous(memory_format=torch.channels_last)
    coef = torch.tensor([[0.9, -0.3, 0.4]]).expand(n, 3)
    x0_coef = torch.tensor([[1.1, -0.6]]).expand(n, 2)
    places = torch.arange(4) if rows is None else torch.tensor(rows)
    tables = [x.clone() for x in (states, guesses, numbers)]
    step_of = {"output_uncond": uncond, "guidance_scale": GUIDANCE}
    exact = reference.transition_step_with_x0(
        states[places, 0], output, states[places, 1], coef, x0_coef, prev_x0=guesses[places, 0], **step_of
    )
    twins: list[Any] = [step.transition_step_with_x0, reference.transition_step_with_x0]
    for twin in twins:
        states, guesses, numbers = (x.clone(memory_format=torch.preserve_format) for x in tables)
        states, guesses = (
            states.permute(layout).contiguous().permute(back),
            guesses.permute(layout).contiguous().permute(back),
        )
        out = step.Step(states[:, 1], numbers[0, :, 1], guesses[:, 1], numbers[1, :, 0], numbers[2, :, 1])
        found = twin(
            states[:, 0], output, states[:, 1], coef, x0_coef, prev_x0=guesses[:, 0],
            rows=None if rows is None else places, out=out, **step_of,
        )  # fmt: skip
        assert found is out
        for table, want in zip(out, exact, strict=True):
            assert table is not None
            torch.testing.assert_close(table[places], want, rtol=1e-5, atol=1e-5)
        others = [row for row in range(4) if row not in places.tolist()]
        assert torch.equal(states[others], tables[0][others])
        assert torch.equal(states[:, [0, 2]], tables[0][:, [0, 2]])
        assert torch.equal(guesses[:, [0, 2]], tables[1][:, [0, 2]])
        assert (numbers[:, others] == -7).all()
        assert int((numbers != -7).sum()) == 3 * n


def test_a_gradient_of_tables_is_that_of_their_rows():
    (sample, _, prev, coef), *_ = _random(6, 300)
    rows, (output, uncond) = torch.tensor([5, 0, 5]), torch.randn(2, 3, 300).unbind(0)
    for twin in (transition, reference):
        of_tables = twin.guided_transition_log_prob(sample, output, uncond, 2.0, prev, coef[:3], rows=rows)
        of_rows = twin.guided_transition_log_prob(sample[rows], output, uncond, 2.0, prev[rows], coef[:3])
        assert torch.equal(of_tables, of_rows)
        weight, guidance = torch.tensor([1.0, -2.0, 0.5]), {"output_uncond": uncond, "guidance_scale": 2.0}
        found = twin.transition_log_prob_grad(sample, output, prev, coef[:3], weight, rows=rows, **guidance)
        leaves = [x.clone().double().requires_grad_() for x in (output, uncond)]
        exact = (sample[rows].double(), leaves[0], leaves[1], 2.0, prev[rows].double(), coef[:3].double())
        (reference.guided_transition_log_prob(*exact) * weight).sum().backward()
        for got, leaf in zip(found, leaves, strict=True):
            assert got is not None
            torch.testing.assert_close(got.double(), leaf.grad, rtol=1e-5, atol=1e-6)
        assert (
            twin.transition_log_prob_grad(
                sample, output, prev, coef[:3], weight, rows=rows, needs_uncond=False, **guidance
            )[1]
            is None
        )


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
        if shifted.dim() > 1:
            assert shifted.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(shifted.flatten(1), lone)
        else:  # sums run in the order of the memory
            torch.testing.assert_close(shifted, lone, rtol=2e-6, atol=1e-6)


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
    for result in step.transition_step_with_x0(*rows, x0_coef, prev_x0=prev_x0, **guidance):
        assert result is not None
        assert result.view(3, -1).isnan().any(1).tolist() == [False, True, False]


def test_wrong_input_is_refused():
    rows, x0_coef, prev_x0, _ = _random(3, 8)
    with pytest.raises(ValueError, match=r"x0_coef must be \[3, 2\], one \(c0, c1\) for each row, not \[3, 3\]"):
        step.transition_step_with_x0(*rows, rows[3])
    with pytest.raises(ValueError, match="out is None"):
        step.transition_step_with_x0(*rows, x0_coef, rows=torch.arange(3))
    with pytest.raises(ValueError, match=r"prev_x0 \[3, 7\]"):
        step.transition_step_with_x0(*rows, x0_coef, prev_x0=prev_x0[:, :7])
    with pytest.raises(ValueError, match="kind must be one of gaussian, squared_error, not 'cps'"):
        step.transition_step(*rows, kind="cps")
    good = step.transition_step_with_x0(*rows, x0_coef, prev_x0=prev_x0)
    twins: list[Any] = [step.transition_step_with_x0, reference.transition_step_with_x0]
    for twin in twins:
        for name in good._fields:
            short = getattr(good, name)[:2]
            with pytest.raises(ValueError, match=rf"out's {name} must be \[3(, 8)?\] on cpu"):
                twin(*rows, x0_coef, prev_x0=prev_x0, out=good._replace(**{name: short}))
        with pytest.raises(ValueError, match="no x0_correlation to write to"):
            twin(*rows, x0_coef, prev_x0=prev_x0, out=good._replace(x0_correlation=None))
