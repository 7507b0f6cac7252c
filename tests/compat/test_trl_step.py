"""DDIM's step and its log-probability against Song et al.'s formulas, written out here in float64."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from adascope_fast.compat.trl.step import scheduler_step

SETTINGS: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def _scheduler(prediction_type: str = "epsilon", **settings: Any) -> Any:
    scheduler = DDIMScheduler(**SETTINGS | {"clip_sample": False} | settings, prediction_type=prediction_type)  # type: ignore[arg-type]
    scheduler.set_timesteps(10)
    return scheduler


def _expected(
    scheduler: Any, output: Tensor, timestep: Tensor, sample: Tensor, eta: float, after: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, std, log_prob), one sample after another."""
    alphas = scheduler.alphas_cumprod.double()
    means, stds, log_probs = [], [], []
    for e, t, x, y in zip(output.double(), timestep.tolist(), sample.double(), after.double(), strict=True):
        a, b = alphas[t], alphas[max(t - 100, 0)]
        kind = scheduler.config.prediction_type
        if kind == "epsilon":
            x0, noise = (x - (1 - a) ** 0.5 * e) / a**0.5, e
        elif kind == "v_prediction":
            x0, noise = a**0.5 * x - (1 - a) ** 0.5 * e, a**0.5 * e + (1 - a) ** 0.5 * x
        else:
            x0, noise = e, (x - a**0.5 * e) / (1 - a) ** 0.5
        if scheduler.config.clip_sample:
            x0 = x0.clamp(-1, 1)
        std = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        mean = b**0.5 * x0 + (1 - b - std**2) ** 0.5 * noise
        density = -((y - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
        means.append(mean)
        stds.append(std)
        log_probs.append(density.mean())
    return torch.stack(means), torch.stack(stds), torch.stack(log_probs)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_step_and_log_prob_are_those_of_the_formulas(prediction_type: str, clips: bool, eta: float):
    torch.manual_seed(0)
    scheduler = _scheduler(prediction_type, clip_sample=clips)
    sample, output, after = torch.randn(3, 3, 2, 5, 5).unbind(0)
    output.requires_grad_()
    timestep = torch.tensor([1, 401, 801])
    _, _, want = _expected(scheduler, output.detach(), timestep, sample, eta, after)
    step = scheduler_step(scheduler, output, timestep, sample, eta, prev_sample=after)
    assert torch.equal(step.latents, after)
    torch.testing.assert_close(step.log_probs.double(), want, rtol=2e-4, atol=1e-4)
    doubled = output.detach().double().requires_grad_()
    _expected(scheduler, doubled, timestep, sample, eta, after)[2].sum().backward()
    step.log_probs.sum().backward()
    assert output.grad is not None
    assert doubled.grad is not None
    torch.testing.assert_close(
        output.grad.double(), doubled.grad, rtol=1e-3, atol=1e-4 * doubled.grad.abs().max().item()
    )


def test_a_drawn_step_is_the_mean_and_its_noise():
    torch.manual_seed(0)
    scheduler = _scheduler()
    sample, output = torch.randn(2, 3, 2, 5, 5).unbind(0)
    timestep = torch.tensor([901, 501, 1])
    mean, std, _ = _expected(scheduler, output, timestep, sample, 1.0, sample)
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    step = scheduler_step(scheduler, output, timestep, sample, 1.0, generator=torch.Generator().manual_seed(5))
    want = mean + std.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(step.latents.double(), want, rtol=1e-4, atol=1e-4)
    one = scheduler_step(scheduler, output[:1], 901, sample[:1], 1.0, prev_sample=step.latents[:1])
    torch.testing.assert_close(one.log_probs, step.log_probs[:1], rtol=1e-5, atol=1e-5)


def test_what_a_step_cannot_be_is_refused():
    scheduler, x = _scheduler(), torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match="exclude each other"):
        scheduler_step(scheduler, x, 1, x, generator=torch.Generator(), prev_sample=x)
    scheduler.num_inference_steps = None
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler_step(scheduler, x, 1, x)
