"""The transition kernels, interpreted, against the reference in float64: value, gradient, and what must be exact."""

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
from adascope_fast.kernels import transition
from adascope_fast.kernels.rows import BLOCK, MAX_CHUNKS, arranged, split

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())
# A gradient is stored in the dtype of the output, and the interpreter truncates to bfloat16 where a GPU rounds.
RTOL = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
VALUE_RTOL = 5e-6
GUIDANCE = 3.5


def _random(n, d, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n * 1000 + d)
    latents = torch.randn(4, n, d, generator=generator).to(dtype).unbind(0)
    return *latents, 0.2 + torch.rand(n, 3, generator=generator)


def _run(operation, sample, output, uncond, prev_sample, coef, weight, *, kind="gaussian") -> tuple[Any, Any, Any]:
    """Value, and the gradient in both outputs of a weighted sum of the rows."""
    output = output.detach().clone().requires_grad_()
    uncond = None if uncond is None else uncond.detach().clone().requires_grad_()
    value = operation(sample, output, uncond, GUIDANCE, prev_sample, coef, kind=kind)
    (value * weight).sum().backward()
    return value.detach(), output.grad, None if uncond is None else uncond.grad


def _assert_equals_reference(sample, output, uncond, prev_sample, coef, kind="gaussian"):
    weight = torch.linspace(-1, 2, len(coef))
    got = _run(transition.guided_transition_log_prob, sample, output, uncond, prev_sample, coef, weight, kind=kind)
    double = [None if x is None else x.double() for x in (sample, output, uncond, prev_sample, coef, weight)]
    want = _run(reference.guided_transition_log_prob, *double, kind=kind)
    torch.testing.assert_close(got[0].double(), want[0], rtol=VALUE_RTOL, atol=1e-6)
    for result, exact, model in zip(got[1:], want[1:], (output, uncond), strict=True):
        if model is not None:
            assert result.dtype == model.dtype
            scale = exact.abs().max().item() if exact.numel() else 0.0
            smallest = torch.finfo(model.dtype).smallest_normal * torch.finfo(model.dtype).eps
            torch.testing.assert_close(result.double(), exact, rtol=RTOL[model.dtype], atol=2e-6 * scale + smallest)


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("is_guided", [False, True])
@pytest.mark.parametrize(("n", "d"), [(0, 5), (1, 1), (3, 1000), (2, 4 * 17 * 16)])
def test_log_prob_and_its_gradient(n, d, dtype, is_guided):
    sample, output, prev_sample, uncond, coef = _random(n, d, dtype)
    _assert_equals_reference(sample, output, uncond if is_guided else None, prev_sample, coef)


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("is_guided", [False, True])
def test_squared_error_and_its_gradient_where_there_is_noise_and_where_there_is_none(dtype, is_guided):
    sample, output, prev_sample, uncond, coef = _random(3, 700, dtype)
    coef[1, 2] = 0.0
    _assert_equals_reference(sample, output, uncond if is_guided else None, prev_sample, coef, "squared_error")


@pytest.mark.parametrize(
    "case",
    [case for case in VECTORS["logprob"] if case["reduce"] == "mean"],
    ids=lambda case: case["scheme"],
)
def test_log_prob_equals_the_known_answers(case):
    sample, output, prev_sample = (torch.tensor([case[name]]) for name in ("x", "model_output", "y"))
    coef = torch.tensor([[case["a_x"], case["b_m"], case["std"]]])
    output.requires_grad_()
    kind = "squared_error" if case["scheme"] == "cps_unnormalised" else "gaussian"
    log_prob = transition.transition_log_prob(sample, output, prev_sample, coef, kind=kind)
    log_prob.sum().backward()
    torch.testing.assert_close(log_prob.detach(), torch.tensor([case["logp"]]), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(output.grad, torch.tensor([case["dlogp_dm"]]), rtol=2e-5, atol=1e-6)


def test_log_prob_of_a_row_of_several_chunks():
    assert split(8200)[0] == 9
    sample, output, prev_sample, _, coef = _random(1, 8200)
    _assert_equals_reference(sample, output, None, prev_sample, coef)


def test_chunks_cover_every_row_length():
    for d in (1, 1023, 8192, 8193, 65536, 131073, 262144, 1_000_003):
        num_chunks, chunk, width = split(d)
        assert num_chunks <= width <= MAX_CHUNKS
        assert width < 2 * num_chunks
        assert chunk % BLOCK == 0
        assert (num_chunks - 1) * chunk < d <= num_chunks * chunk
    assert split(4 * 64 * 64)[:2] == (16, 1024), "8 rows are 128 programs"


def test_dtypes_may_differ():
    sample, output, prev_sample, uncond, coef = _random(2, 100)
    _assert_equals_reference(sample, output.bfloat16(), uncond.half(), prev_sample, coef)


def test_any_layout_of_the_latents():
    sample, output, prev_sample, uncond, coef = _random(3, 4 * 6 * 8)
    trajectory = torch.stack([sample, prev_sample], 1)  # [n, t, d]: rows are 2 d apart
    every_other = torch.stack([sample, prev_sample], 2).flatten(1)  # elements are 2 apart
    misaligned = torch.cat([torch.zeros(1), prev_sample.flatten()])[1:].view(3, -1)
    repeated = sample[:1].expand(3, -1)
    transposed = coef.t().contiguous().t()
    _assert_equals_reference(trajectory[:, 0], output, uncond, trajectory[:, 1], coef)
    _assert_equals_reference(every_other[:, ::2], output, uncond, every_other[:, 1::2], transposed)
    _assert_equals_reference(repeated, output, uncond, misaligned, coef)
    x, m, u, y = (
        x.view(3, 4, 6, 8).to(memory_format=torch.channels_last) for x in (sample, output, uncond, prev_sample)
    )
    _assert_equals_reference(x, m, u, y, coef)


def _copied(first, *others):
    """Which of the latents `arranged` has copied."""
    names = " ".join("sample" if number == 0 else "output" for number in range(1 + len(others)))
    *_, found = arranged(names, first, *others)
    for x, same in zip((first, *others), found, strict=True):
        assert torch.equal(x, same)
        assert same.stride()[1:] == found[0].stride()[1:]
    return [x.data_ptr() != same.data_ptr() for x, same in zip((first, *others), found, strict=True)]


def test_rows_are_copied_only_where_their_layout_needs_it():
    image = torch.randn(3, 4, 5, 6)
    last = image.contiguous(memory_format=torch.channels_last)
    table = torch.randn(3, 2, 5, 6, 4).permute(0, 1, 4, 2, 3)
    assert _copied(image, image) == [False, False]
    assert _copied(last, table[:, 1], table[:, 0]) == [False] * 3
    assert _copied(last, image, table[:, 1]) == [False, True, False]
    assert _copied(image, last) == [False, True]
    assert _copied(torch.randn(193)[1:].view(3, 64), torch.randn(3, 64)) == [False, False]  # wherever it begins
    assert _copied(torch.randn(3, 65)[:, :64], torch.randn(1, 64).expand(3, 64)) == [False, False]
    assert _copied(torch.randn(3, 128)[:, ::2], torch.randn(3, 64)) == [True, False]


def test_expanded_upstream_gradient():
    sample, output, prev_sample, _, coef = _random(3, 50)
    output.requires_grad_()
    transition.transition_log_prob(sample, output, prev_sample, coef).mean().backward()
    got, output.grad = output.grad, None
    reference.transition_log_prob(sample, output, prev_sample, coef).mean().backward()
    assert got is not None
    torch.testing.assert_close(got, output.grad)


def test_detached_unconditional_output_receives_no_gradient():
    sample, output, prev_sample, uncond, coef = _random(2, 30)
    output.requires_grad_()
    transition.guided_transition_log_prob(sample, output, uncond, GUIDANCE, prev_sample, coef).sum().backward()
    assert uncond.grad is None
    assert output.grad is not None
    assert output.grad.isfinite().all()


def test_a_row_does_not_depend_on_its_batch_nor_on_the_run():
    sample, output, prev_sample, uncond, coef = _random(64, 1100)
    rows = (sample, output, uncond, prev_sample, coef)
    weight = torch.ones(64)
    together = _run(transition.guided_transition_log_prob, *rows, weight)
    again = _run(transition.guided_transition_log_prob, *rows, weight)
    alone = _run(transition.guided_transition_log_prob, *[x[3:4] for x in (*rows, weight)])
    for whole, repeated, single in zip(together, again, alone, strict=True):
        assert torch.equal(whole, repeated)
        assert torch.equal(whole[3:4], single)


def test_nan_stays_in_its_row():
    sample, output, prev_sample, uncond, coef = _random(3, 40)
    output[1, 7] = math.nan
    rows = (sample, output, uncond, prev_sample, coef)
    value, grad, grad_uncond = _run(transition.guided_transition_log_prob, *rows, torch.ones(3))
    for result in (value[:, None], grad, grad_uncond):
        assert result.isnan().any(1).tolist() == [False, True, False]


def test_wrong_shapes_are_refused_by_name():
    sample, output, prev_sample, _, coef = _random(3, 8)
    with pytest.raises(ValueError, match=r"output \[3, 7\]"):
        transition.transition_log_prob(sample, output[:, :7], prev_sample, coef)
    with pytest.raises(ValueError, match=r"coef must be \[3, 3\]"):
        transition.transition_log_prob(sample, output, prev_sample, coef[:1])
    with pytest.raises(ValueError, match="kind must be one of gaussian, squared_error, not 'cps'"):
        transition.transition_log_prob(sample, output, prev_sample, coef, kind="cps")
