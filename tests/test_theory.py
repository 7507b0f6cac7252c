"""Theorem 2 and its flow counterparts: worked answers, limits of fine samplers, and our own samplers by Monte Carlo.

Monte Carlo is on Gaussian data with the ideal denoiser, through `rollout` and the correlation operation. A correlation
r of n independent pairs has the standard error (1 - r^2) / sqrt(n); three of them are allowed.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from adascope_fast import ops
from adascope_fast.rollout import EncodedPrompts, OwnNoise, rollout
from adascope_fast.schedules import Schedule
from adascope_fast.schedules import samplers as schedules
from adascope_fast.theory import (
    flow_correlation,
    flow_cross_correlation,
    ideal_chain,
    measured_correlation,
    schedule_correlation,
    theoretical_correlation,
    theoretical_cross_correlation,
)

VECTORS = json.loads((Path(__file__).parent / "data" / "vectors.json").read_text())
COUPLINGS = {
    "straight": ("straight", 0.0),
    "markov": ("markov", 0.0),
    "flow_sde_a0_7": ("flow_sde", 0.7),
    "flow_sde_a_sqrt2": ("flow_sde", math.sqrt(2)),
    "dance_sde_eta0_3": ("dance_sde", 0.3),
    "ode": ("ode", 0.0),
}


@pytest.mark.parametrize("case", VECTORS["theorem2"], ids=lambda case: f"{case['alpha_bar_t']}-{case['i']}{case['j']}")
def test_theorem_2(case: dict[str, Any]):
    i, j, levels = case["i"], case["j"], (case["alpha_bar_t"], case["alpha_bar_t_plus_tau"])
    cross = theoretical_cross_correlation(*levels, torch.tensor(case["Sigma"], dtype=torch.float64))
    assert cross[i, j].item() == pytest.approx(case["corr"], rel=1e-12)
    if i == j:
        variance = case["Sigma"][i][i]
        for one, other in (levels, levels[::-1]):
            assert theoretical_correlation(one, other, variance).item() == pytest.approx(case["corr"], rel=1e-12)


@pytest.mark.parametrize("case", VECTORS["rf_correlation"], ids=lambda case: f"{case['t']}-{case['s']}")
@pytest.mark.parametrize("name", COUPLINGS)
def test_flow_couplings(case: dict[str, Any], name: str):
    coupling, noise = COUPLINGS[name]
    found = flow_correlation(case["t"], case["t_noisier"], case["s"], coupling=coupling, noise=noise)  # type: ignore[arg-type]
    assert found.item() == pytest.approx(case[name], rel=1e-12)


@pytest.mark.parametrize("case", VECTORS["rf_cross_component"], ids=lambda case: f"{case['i']}{case['j']}")
@pytest.mark.parametrize("coupling", ["straight", "markov"])
def test_components_of_flows(case: dict[str, Any], coupling: Any):
    covariance = torch.tensor(case["Sigma"], dtype=torch.float64)
    found = flow_cross_correlation(case["t"], case["t_noisier"], covariance, coupling=coupling)
    assert found[case["i"], case["j"]].item() == pytest.approx(case[coupling], rel=1e-12)


@pytest.mark.parametrize("case", VECTORS["ddim_ideal_chain"], ids=lambda case: f"eta{case['eta']}")
def test_samplers_of_few_steps(case: dict[str, Any]):
    schedule = schedules.ddim(case["alpha_bars"][::-1], [3, 2, 1], stride=1, eta=case["eta"])
    chain = ideal_chain(schedule, case["s"])
    assert chain.correlation.tolist() == pytest.approx(case["corr"], rel=1e-6)
    assert chain.variance[-1].item() == pytest.approx(case["final_var"], rel=1e-6)
    levels = torch.tensor(case["alpha_bars"], dtype=torch.float64)
    assert theoretical_correlation(levels[1:], levels[:-1], case["s"]).tolist() == pytest.approx(case["theorem2"])


def test_the_profile_of_stable_diffusion():
    beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    scheduler = DDIMScheduler(**beta, steps_offset=1, set_alpha_to_one=False)  # type: ignore[arg-type]
    schedule = Schedule.from_diffusers(scheduler, 50, eta=1.0)
    for variance in (0.5, 1.0, 2.0):
        uncertainty = 1 - schedule_correlation(schedule, variance)
        for row in VECTORS["lemma1_profile_sd15_50"]["rows"]:
            assert schedule.timesteps[row["i"]] == row["t"]
            want = row[f"one_minus_corr_s{variance}"]
            assert uncertainty[row["i"]].item() == pytest.approx(want, rel=2e-5), row["i"]
        assert (uncertainty[:-1].diff() < 0).all(), "Lemma 1, on this grid"


def _between(schedule: Schedule, variance: float, first: int, last: int) -> float:
    """Correlation of the states that enter steps first and last: the chain is Markov, so adjacent ones multiply."""
    return ideal_chain(schedule, variance).correlation[first:last].prod().item()


@pytest.mark.parametrize("variance", [0.5, 2.0])
def test_fine_samplers_approach_the_closed_forms(variance: float):
    sigmas, first, last = torch.linspace(1, 0, 2001, dtype=torch.float64), 400, 1600  # t = 0.8 to t = 0.2
    for kind, noise in (("flow_sde", 0.7), ("flow_sde", math.sqrt(2)), ("dance_sde", 0.3), ("ode", 0.0)):
        if kind == "flow_sde":
            schedule = schedules.flow_sde(sigmas, noise_level=noise)
        else:
            schedule = schedules.dance_sde(sigmas, eta=noise)
        want = flow_correlation(0.2, 0.8, variance, coupling=kind, noise=noise).item()  # type: ignore[arg-type]
        assert _between(schedule, variance, first, last) == pytest.approx(want, abs=2e-3), (kind, noise)
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()).cumprod(0)
    ancestral = schedules.ddpm(alphas, torch.arange(999, -1, -1), stride=1)
    want = theoretical_correlation(alphas[199].item(), alphas[799].item(), variance).item()
    assert _between(ancestral, variance, 200, 800) == pytest.approx(want, abs=2e-3)


class _Ideal:
    """The ideal denoiser of data N(0, variance I), in closed form, of epsilon or velocity."""

    latent_shape = (4, 32, 32)
    denoiser = nn.Identity()

    def __init__(self, variance: float, alphas: Tensor | None = None) -> None:
        self.variance, self.alphas = variance, alphas

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"text": torch.zeros(len(prompts), 1)}

    def predict(self, sample: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        s = self.variance
        if self.alphas is None:
            t = timestep.double() / 1000
            slope = (t - (1 - t) * s) / ((1 - t).square() * s + t.square())
        else:
            alpha = self.alphas[timestep.long()]
            slope = (1 - alpha).sqrt() / (alpha * s + 1 - alpha)
        return slope.float().view(-1, 1, 1, 1) * sample


SIGMAS = torch.linspace(1, 0, 9)
ALPHAS = torch.linspace(0.98, 0.02, 9, dtype=torch.float64)
SAMPLERS = {
    "ddpm": lambda: schedules.ddpm(ALPHAS, range(8, 0, -1), stride=1),
    "ddim": lambda: schedules.ddim(ALPHAS, range(8, 0, -1), stride=1, eta=0.5),
    "flow_sde": lambda: schedules.flow_sde(SIGMAS, noise_level=0.7),
    "dance_sde": lambda: schedules.dance_sde(SIGMAS, eta=0.6),
    "ode": lambda: schedules.flow_ode(SIGMAS),
}


@pytest.mark.parametrize("variance", [0.5, 2.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_our_samplers_have_the_correlation_of_the_ideal_chain(name: str, variance: float):
    schedule = SAMPLERS[name]()
    backbone: Any = _Ideal(variance, ALPHAS if name.startswith("dd") else None)
    trajectory = rollout(
        backbone,
        schedule,
        EncodedPrompts.of(backbone, ["a"]),
        ["a"] * 48,
        guidance_scale=1.0,
        noise=OwnNoise(3),
        batch=24,
    )
    found, chain = measured_correlation(trajectory.latents).double(), ideal_chain(schedule, variance)
    num = trajectory.latents[:, 0].numel()
    error = (1 - chain.correlation.square()) / math.sqrt(num)
    assert ((found - chain.correlation).abs() < 3 * error + 1e-6).all(), (found, chain.correlation)
    spread = trajectory.latents.double().square().mean((0, 2, 3, 4))
    assert (spread / chain.variance - 1).abs().max() < 5 * math.sqrt(2 / num)
    for over in ("sample", "component"):  # biased by O(1 / elements) of a row, here 4096 and 48
        other = measured_correlation(trajectory.latents, over=over)  # type: ignore[arg-type]
        torch.testing.assert_close(other.double(), found, atol=2e-2, rtol=0)


def _pearson(x: Tensor, y: Tensor) -> float:
    return ops.correlation(x.view(1, -1), y.view(1, -1)).item()


@pytest.mark.parametrize("coupling", ["straight", "markov"])
def test_training_pairs_and_the_forward_process(coupling: Any):
    """x0 ~ N(0, Sigma); `straight` shares its noise between both times, `markov` adds fresh noise to the cleaner."""
    generator, num, t, u = torch.Generator().manual_seed(0), 200_000, 0.3, 0.6
    covariance = torch.tensor([[2.0, 0.6], [0.6, 0.5]])
    x0 = torch.linalg.cholesky(covariance) @ torch.randn(2, num, generator=generator)
    noise, fresh = torch.randn(2, 2, num, generator=generator)
    cleaner = (1 - t) * x0 + t * noise
    if coupling == "straight":
        noisier = (1 - u) * x0 + u * noise
    else:
        kept = (1 - u) / (1 - t)
        noisier = kept * cleaner + math.sqrt(u**2 - (kept * t) ** 2) * fresh
    want = flow_cross_correlation(t, u, covariance, coupling=coupling)
    for i in range(2):
        assert want[i, i].item() == pytest.approx(
            flow_correlation(t, u, covariance[i, i].item(), coupling=coupling).item(), rel=1e-6
        )
        for j in range(2):
            r = want[i, j].item()
            assert abs(_pearson(cleaner[i], noisier[j]) - r) < 3 * (1 - r**2) / math.sqrt(num), (i, j)


def test_what_has_no_answer_is_refused():
    latents = torch.randn(4, 3, 2, 5, 5)
    with pytest.raises(ValueError, match="needs at least 8 of them, got 4"):
        measured_correlation(latents, over="component")
    with pytest.raises(ValueError, match="over is sample, pooled or component, not 'batch'"):
        measured_correlation(latents, over="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name the sampler"):
        flow_correlation(0.2, 0.4, 1.0, coupling="reverse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="known for the couplings straight and markov"):
        flow_cross_correlation(0.2, 0.4, torch.eye(2), coupling="ode")  # type: ignore[arg-type]
