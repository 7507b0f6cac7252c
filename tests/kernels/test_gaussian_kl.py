"""The KL kernels, interpreted, against the reference in float64 and the known answers."""

import json
import os
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run here under TRITON_INTERPRET=1 alone", allow_module_level=True)

from adascope_fast import reference
from adascope_fast.kernels import gaussian_kl

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())
# A gradient is stored in the dtype of the output, and the interpreter truncates to bfloat16 where a GPU rounds.
RTOL = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def _random(n, d, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n * 1000 + d)
    output, ref_output = torch.randn(2, n, d, generator=generator).to(dtype).unbind(0)
    return output, ref_output, 0.5 + torch.rand(n, 3, generator=generator)


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize(("n", "d"), [(0, 4), (1, 1), (3, 1000), (1, 8200)])
def test_kl_and_its_gradient(n, d, dtype):
    output, ref_output, coef = _random(n, d, dtype)
    leaf, exact_leaf = output.clone().requires_grad_(), output.double().requires_grad_()
    kl = gaussian_kl.gaussian_kl(leaf, ref_output, coef)
    exact = reference.gaussian_kl(exact_leaf, ref_output.double(), coef.double())
    kl.sum().backward()
    exact.sum().backward()
    torch.testing.assert_close(kl.double(), exact, rtol=2e-6, atol=1e-9)
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    smallest = torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(leaf.grad.double(), exact_leaf.grad, rtol=RTOL[dtype], atol=max(1e-9, smallest))


@pytest.mark.parametrize("case", [x for x in VECTORS["kl"] if x["reduce"] == "mean"], ids=lambda case: case["scheme"])
def test_kl_equals_the_known_answers(case):
    output, ref_output = (torch.tensor([case[name]]) for name in ("m", "m_ref"))
    output.requires_grad_()
    kl = gaussian_kl.gaussian_kl(output, ref_output, torch.tensor([[1.0, case["b_m"], case["std"]]]))
    kl.sum().backward()
    torch.testing.assert_close(kl.detach(), torch.tensor([case["kl"]]), rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(output.grad, torch.tensor([case["dkl_dm"]]), rtol=2e-5, atol=1e-7)


def test_a_row_does_not_depend_on_its_batch_nor_on_its_layout():
    output, ref_output, coef = _random(64, 4 * 7 * 9)
    together = gaussian_kl.gaussian_kl(output, ref_output, coef)
    assert torch.equal(gaussian_kl.gaussian_kl(output[41:42], ref_output[41:42], coef[41:42]), together[41:42])
    image, ref_image = output.view(64, 4, 7, 9), ref_output.view(64, 4, 7, 9)
    moved = ref_image.to(memory_format=torch.channels_last)
    assert torch.equal(gaussian_kl.gaussian_kl(image, moved, coef), together)
    moved = image.to(memory_format=torch.channels_last)  # the first says in which order sums run
    torch.testing.assert_close(gaussian_kl.gaussian_kl(moved, ref_image, coef), together, rtol=2e-6, atol=0)
    repeated = gaussian_kl.gaussian_kl(output[:1].expand(64, -1), ref_output, coef)
    assert torch.equal(repeated[:1], together[:1])


def test_nan_stays_in_its_row():
    output, ref_output, coef = _random(3, 20)
    ref_output[1, 3] = float("nan")
    output.requires_grad_()
    kl = gaussian_kl.gaussian_kl(output, ref_output, coef)
    kl.sum().backward()
    assert kl.isnan().tolist() == [False, True, False]
    assert output.grad is not None
    assert output.grad.isnan().any(1).tolist() == [False, True, False]


def test_wrong_shapes_are_refused_by_name():
    output, ref_output, coef = _random(3, 8)
    with pytest.raises(ValueError, match=r"ref_output \[3, 7\]"):
        gaussian_kl.gaussian_kl(output, ref_output[:, :7], coef)
    with pytest.raises(ValueError, match=r"coef must be \[3, 3\]"):
        gaussian_kl.gaussian_kl(output, ref_output, coef[:1])
