"""Each step function against the formula of its original, written here from SPEC's sources in plain torch."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from adascope_fast.compat import dance_grpo, flow_grpo
from adascope_fast.compat.ddpo_pytorch import ddim_step_with_logprob

LOG_SQRT_TWO_PI = 0.5 * math.log(2 * math.pi)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gaussian(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (-((x - mean) ** 2) / (2 * std**2) - std.log() - LOG_SQRT_TWO_PI).mean((1, 2, 3))


def ddim_scheduler(**options: Any) -> Any:
    given = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False} | options
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **given)
    scheduler.set_timesteps(10)
    return scheduler


def ddim_by_hand(scheduler: Any, output: Tensor, timestep: Tensor, sample: Tensor, eta: float, clips_again: bool):
    """(mean, std) in float64: prev_timestep is cut at 0, so the final alpha is never used."""
    alphas, config = scheduler.alphas_cumprod.double(), scheduler.config
    before = (timestep - 100).clamp(min=0)
    now, following = (alphas[at].view(-1, 1, 1, 1) for at in (timestep, before))
    output, sample = output.double(), sample.double()
    if config.prediction_type == "epsilon":
        x0, noise = (sample - (1 - now).sqrt() * output) / now.sqrt(), output
    elif config.prediction_type == "sample":
        x0, noise = output, (sample - now.sqrt() * output) / (1 - now).sqrt()
    else:
        x0 = now.sqrt() * sample - (1 - now).sqrt() * output
        noise = now.sqrt() * output + (1 - now).sqrt() * sample
    if config.clip_sample:
        x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
    if clips_again:
        noise = (sample - now.sqrt() * x0) / (1 - now).sqrt()
    std = eta * ((1 - following) / (1 - now) * (1 - now / following)).sqrt()
    return following.sqrt() * x0 + (1 - following - std**2).sqrt() * noise, std


CASES = [
    ("epsilon", 1.0, {}, False),
    ("epsilon", 0.5, {}, False),
    ("v_prediction", 1.0, {}, False),
    ("sample", 0.3, {}, False),
    ("epsilon", 1.0, {"clip_sample": True, "clip_sample_range": 0.8}, False),
    ("v_prediction", 1.0, {"clip_sample": True, "clip_sample_range": 0.8}, True),
    ("epsilon", 1.0, {"set_alpha_to_one": True}, False),
]


@pytest.mark.parametrize(("prediction", "eta", "options", "clips_again"), CASES)
def test_ddim_is_ddpo_pytorchs_in_value_and_gradient(prediction: str, eta: float, options: dict, clips_again: bool):
    scheduler = ddim_scheduler(prediction_type=prediction, **options)
    timestep = torch.tensor([901, 501, 101, 1])
    sample, output, prev = (random(4, 4, 8, 8, seed=seed) for seed in range(3))
    output.requires_grad_()
    found, log_prob = ddim_step_with_logprob(
        scheduler, output, timestep, sample, eta=eta, use_clipped_model_output=clips_again, prev_sample=prev
    )
    assert torch.equal(found, prev)
    (gradient,) = torch.autograd.grad(log_prob.sum(), output)
    again = output.detach().double().requires_grad_()
    mean, std = ddim_by_hand(scheduler, again, timestep, sample, eta, clips_again)
    expected = gaussian(prev.double(), mean, std)
    (wanted,) = torch.autograd.grad(expected.sum(), again)
    torch.testing.assert_close(log_prob.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2e-4, atol=1e-6 * wanted.abs().max().item())


def test_ddim_draws_with_the_generator_and_one_timestep_for_all():
    scheduler = ddim_scheduler()
    sample, output = random(3, 4, 8, 8), random(3, 4, 8, 8, seed=1)
    drawn, log_prob = ddim_step_with_logprob(
        scheduler, output, torch.tensor(501), sample, eta=1.0, generator=torch.Generator().manual_seed(5)
    )
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    mean, std = ddim_by_hand(scheduler, output, torch.tensor([501] * 3), sample, 1.0, False)
    torch.testing.assert_close(drawn.double(), mean + std * noise.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_prob.double(), gaussian(drawn.double(), mean, std), rtol=1e-4, atol=1e-4)
    _, told = ddim_step_with_logprob(scheduler, output, torch.tensor(501), sample, eta=1.0, prev_sample=drawn)
    assert torch.equal(told, log_prob)


def test_half_precision_samples_stay_so_and_their_log_prob_does_not_round():
    scheduler = ddim_scheduler()
    sample, output = random(2, 4, 8, 8).half(), random(2, 4, 8, 8, seed=1).half()
    drawn, log_prob = ddim_step_with_logprob(scheduler, output, torch.tensor(501), sample, eta=1.0)
    assert (drawn.dtype, log_prob.dtype) == (torch.float16, torch.float32)


def test_ddim_refuses_what_the_original_refuses():
    scheduler = ddim_scheduler()
    sample = random(1, 4, 8, 8)
    with pytest.raises(ValueError, match="exclude each other"):
        ddim_step_with_logprob(
            scheduler, sample, torch.tensor(1), sample, generator=torch.Generator(), prev_sample=sample
        )
    with pytest.raises(ValueError, match="call set_timesteps first"):
        ddim_step_with_logprob(DDIMScheduler(), sample, torch.tensor(1), sample)


def test_other_settings_of_one_scheduler_are_other_tables():
    scheduler = ddim_scheduler()
    sample, output, prev = (random(1, 4, 8, 8, seed=seed) for seed in range(3))
    one = ddim_step_with_logprob(scheduler, output, torch.tensor(501), sample, eta=1.0, prev_sample=prev)[1]
    scheduler.set_timesteps(20)
    other = ddim_step_with_logprob(scheduler, output, torch.tensor(501), sample, eta=1.0, prev_sample=prev)[1]
    assert not torch.equal(one, other)


def flow_scheduler(num_steps: int = 10, **options: Any) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, **options)
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_a_flows_step_is_flow_grpos_in_value_and_gradient(sde_type: str):
    scheduler, level = flow_scheduler(), 0.7
    steps = torch.tensor([0, 4, 8])
    timestep = scheduler.timesteps[steps]
    sample, output, prev = (random(3, 4, 8, 8, seed=seed) for seed in range(3))
    output.requires_grad_()
    drawn, log_prob, mean, std, sqrt_dt = flow_grpo.sde_step_with_logprob(
        scheduler, output, timestep, sample, level, prev, sde_type=sde_type, return_sqrt_dt=True
    )
    (gradient,) = torch.autograd.grad(log_prob.sum(), output)
    again = output.detach().double().requires_grad_()
    x, sigmas = sample.double(), scheduler.sigmas.double()
    sigma, following = (sigmas[at].view(-1, 1, 1, 1) for at in (steps, steps + 1))
    dt = following - sigma
    if sde_type == "sde":
        noise = (sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))).sqrt() * level
        expected = x * (1 + noise**2 / (2 * sigma) * dt) + again * (1 + noise**2 * (1 - sigma) / (2 * sigma)) * dt
        wanted = gaussian(prev.double(), expected, noise * (-dt).sqrt())
    else:
        noise = following * math.sin(level * math.pi / 2)
        expected = (x - sigma * again) * (1 - following) + (x + again * (1 - sigma)) * (following**2 - noise**2).sqrt()
        wanted = -((prev.double() - expected) ** 2).mean((1, 2, 3))
    (slope,) = torch.autograd.grad(wanted.sum(), again)
    assert torch.equal(drawn, prev)
    for found, known in ((log_prob, wanted), (mean, expected), (std, noise), (sqrt_dt, (-dt).sqrt())):
        torch.testing.assert_close(found.double(), known, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-4, atol=1e-6 * slope.abs().max().item())


def test_a_flows_step_draws_where_it_is_not_told():
    scheduler = flow_scheduler()
    sample, output = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=1)
    at = scheduler.timesteps[3:4]
    torch.manual_seed(7)
    drawn, log_prob, mean, std = flow_grpo.sde_step_with_logprob(scheduler, output, at, sample)
    torch.manual_seed(7)
    sigma, following = scheduler.sigmas[3], scheduler.sigmas[4]
    expected = mean + std * (sigma - following).sqrt() * torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)
    again = flow_grpo.sde_step_with_logprob(scheduler, output, at, sample, prev_sample=drawn)[1]
    assert torch.equal(again, log_prob)


def test_a_timestep_that_is_none_of_the_schedulers_is_not_a_number():
    scheduler = flow_scheduler()
    sample = random(2, 4, 8, 8)
    _, log_prob, *_ = flow_grpo.sde_step_with_logprob(
        scheduler, sample, torch.stack([scheduler.timesteps[2], torch.tensor(3.3)]), sample, prev_sample=sample
    )
    assert log_prob.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("sde_solver", [True, False])
def test_dance_grpos_step_has_no_constants(sde_solver: bool):
    sigmas = dance_grpo.sd3_time_shift(3.0, torch.linspace(1, 0, 17))
    latents, output, prev = (random(2, 16, 8, seed=seed) for seed in range(3))
    output.requires_grad_()
    eta, index = 0.3, 5
    drawn, guess, log_prob = dance_grpo.flux_step(output, latents, eta, sigmas, index, prev, True, sde_solver)
    (gradient,) = torch.autograd.grad(log_prob.sum(), output)
    again, x = output.detach().double().requires_grad_(), latents.double()
    sigma, following = sigmas[index].double(), sigmas[index + 1].double()
    x0 = x - sigma * again
    mean = x + (following - sigma) * again
    if sde_solver:
        score = -(x - x0 * (1 - sigma)) / sigma**2
        mean = mean - 0.5 * eta**2 * score * (following - sigma)
    std = eta * (sigma - following).sqrt()
    wanted = (-((prev.double() - mean) ** 2) / (2 * std**2)).mean((1, 2))
    (slope,) = torch.autograd.grad(wanted.sum(), again)
    assert torch.equal(drawn, prev)
    torch.testing.assert_close(guess.double(), x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_prob.double(), wanted, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-4, atol=1e-6 * slope.abs().max().item())
    found, told = dance_grpo.flux_step(output.detach(), latents, eta, sigmas, index, None, False, sde_solver)
    torch.testing.assert_close(found.double(), mean.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(told, guess.detach())
