"""What only a GPU can show: the compiled kernels against float64, their capture in a graph, and a run on the device."""

import pytest
import torch

from adascope_fast import ops, reference
from adascope_fast.config import Config
from adascope_fast.train import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
RTOL = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def _rows(n: int, shape: tuple[int, ...], dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(n, *shape, generator=generator).to("cuda", dtype) for _ in range(count)]


def _coef(n: int) -> torch.Tensor:
    row = torch.tensor([1.01, -0.2, 0.3], device="cuda")
    return row + 0.01 * torch.arange(n, device="cuda")[:, None]


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("shape", [(4, 64, 64), (16, 33, 7)])
def test_log_prob_and_gradient_match_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sample, output, prev_sample = _rows(5, shape, dtype, 3)
    coef = _coef(5)
    output.requires_grad_()
    got = ops.transition_log_prob(sample, output, prev_sample, coef)
    (got_grad,) = torch.autograd.grad(got.sum(), output)
    exact = output.detach().double().requires_grad_()
    want = reference.transition_log_prob(sample.double(), exact, prev_sample.double(), coef.double())
    (want_grad,) = torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(got_grad.double(), want_grad, rtol=RTOL[dtype], atol=1e-6)


def test_a_row_does_not_depend_on_its_batch() -> None:
    sample, output, prev_sample = _rows(64, (16, 64, 64), torch.bfloat16, 3)
    coef = _coef(64)
    together = ops.transition_log_prob(sample, output, prev_sample, coef)
    alone = ops.transition_log_prob(sample[7:8], output[7:8], prev_sample[7:8], coef[7:8])
    assert torch.equal(together[7:8], alone)


def test_rollout_step_and_replay_agree_exactly() -> None:
    sample, output, noise = _rows(8, (4, 64, 64), torch.bfloat16, 3)
    prev_sample, log_prob = ops.transition_step(sample, output, noise, _coef(8))
    assert torch.equal(ops.transition_log_prob(sample, output, prev_sample, _coef(8)), log_prob)


def test_correlation_matches_float64() -> None:
    x, y = _rows(6, (4, 64, 64), torch.float32, 2)
    want = reference.correlation(x.double() + 100, (x + y).double())
    torch.testing.assert_close(ops.correlation(x + 100, x + y).double(), want, rtol=1e-4, atol=1e-5)


def test_rollout_step_replays_from_a_cuda_graph() -> None:
    sample, output, noise = _rows(8, (4, 64, 64), torch.float32, 3)
    coef = _coef(8)
    want = ops.transition_step(sample, output, noise, coef)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.transition_step(sample, output, noise, coef)
    graph.replay()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_a_run_uses_the_gpu_and_starts_on_policy(tmp_path) -> None:
    config = Config.load("configs/tiny.toml", [f"run.folder={tmp_path / 'run'}", 'train.device="cuda"'])
    trainer = Trainer(config, quiet=True)
    trainer.train()
    assert trainer.backbone.device.type == "cuda"
    assert set(ops.explain("cuda").values()) != {"reference"}
