"""How much of a latent survives a step: Theorem 2 and its counterparts for flows, in closed form and measured.

Axes: `b` samples, `t` steps, noisiest first, `d` components. Everything is for Gaussian data of a given variance, where
the ideal denoiser is known; float64. "Uncertainty" of a step is 1 - correlation of the latents around it.

Theorem 2 is about the forward Markov process, whose law only its exact reversal shares. A flow has many samplers with
the same marginals and other correlations, so the coupling has to be named: with Flow-SDE at a = 0.7 the uncertainty is
about a quarter of Theorem 2's, with an ODE it is 0. Thresholds on it do not carry over from one sampler to another.
"""

import itertools
import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from adascope_fast import ops
from adascope_fast.rollout import Trajectory
from adascope_fast.schedules import Schedule

Coupling = Literal["straight", "markov", "flow_sde", "dance_sde", "ode"]
Number = float | Tensor


def theoretical_correlation(
    alphas_cumprod_t: Number, alphas_cumprod_s: Number, variance: Number
) -> Float64[Tensor, "..."]:
    """Correlation of one latent component at two noise levels of the forward process (Theorem 2).

    sqrt((variance + 1/SNR) / (variance + 1/SNR of the noisier)): the law of ancestral sampling, not of ODE or Flow-SDE.
    The levels come in either order; variance is that of the component in the data, 1 for SD's latents.
    """
    alphas = (torch.as_tensor(alpha, dtype=torch.float64) for alpha in (alphas_cumprod_t, alphas_cumprod_s))
    clean, noisy = (variance + (1 - alpha) / alpha for alpha in alphas)
    return (torch.minimum(clean, noisy) / torch.maximum(clean, noisy)).sqrt()


def theoretical_cross_correlation(
    alphas_cumprod_t: float, alphas_cumprod_s: float, covariance: Float[Tensor, "d d"]
) -> Float64[Tensor, "d d"]:
    """Correlation of component i at level t with component j at the noisier level s (Theorem 2)."""
    noise = math.sqrt(alphas_cumprod_s / alphas_cumprod_t) * (1 - alphas_cumprod_t)
    signal = math.sqrt(alphas_cumprod_t * alphas_cumprod_s)
    marginals = ((alphas_cumprod_t, 1 - alphas_cumprod_t), (alphas_cumprod_s, 1 - alphas_cumprod_s))
    return _cross(covariance, signal, noise, marginals)


def flow_correlation(
    t: Number, t_noisier: Number, variance: Number, *, coupling: Coupling, noise: float = 0.0
) -> Float64[Tensor, "..."]:
    """Correlation of one component at times t < t_noisier of a rectified flow, x_t = (1 - t) x0 + t eps.

    Args:
        variance: of the component in the data.
        coupling: "straight": the same x0 and eps (training pairs); "markov": the forward process, Theorem 2 at equal
            SNR; "flow_sde", "dance_sde": sampling with that noise and the exact velocity, in continuous time; "ode": 1.
        noise: noise_level a of "flow_sde", eta of "dance_sde".
    """
    if coupling not in ("straight", "markov", "flow_sde", "dance_sde", "ode"):
        raise ValueError(
            f"coupling is straight, markov, flow_sde, dance_sde or ode, not {coupling!r}; name the sampler"
        )
    t, u, s = (torch.as_tensor(value, dtype=torch.float64) for value in (t, t_noisier, variance))
    if coupling == "straight":
        return ((1 - t) * (1 - u) * s + t * u) / (_flow_variance(t, s) * _flow_variance(u, s)).sqrt()
    if coupling == "dance_sde":
        return (-(noise**2) / 2 * (_dance_integral(u, s) - _dance_integral(t, s))).exp()
    exponent = {"markov": 0.5, "flow_sde": noise**2 / 4, "ode": 0.0}[coupling]
    ratio = (s + (t / (1 - t)).square()) / (s + (u / (1 - u)).square())
    return ratio**exponent


def flow_cross_correlation(
    t: float, t_noisier: float, covariance: Float[Tensor, "d d"], *, coupling: Literal["straight", "markov"]
) -> Float64[Tensor, "d d"]:
    """Correlation of component i at time t with component j at t_noisier, of training pairs or the forward process."""
    if coupling not in ("straight", "markov"):
        raise ValueError(f"components are known for the couplings straight and markov, not {coupling!r}; choose one")
    signal = (1 - t) * (1 - t_noisier)
    noise = t * t_noisier if coupling == "straight" else (1 - t_noisier) / (1 - t) * t**2
    return _cross(covariance, signal, noise, (((1 - t) ** 2, t**2), ((1 - t_noisier) ** 2, t_noisier**2)))


class IdealChain(NamedTuple):
    """A sampler on Gaussian data with the ideal denoiser: one step is x' = gain * x + std * noise."""

    correlation: Float64[Tensor, " t"]
    """Of the latent that enters each step with the one that leaves it."""
    variance: Float64[Tensor, " t_plus_1"]
    """Of the latents, from pure noise (1) to the last."""
    gain: Float64[Tensor, " t"]


def ideal_chain(schedule: Schedule, variance: float) -> IdealChain:
    """What a sampler of finitely many steps does to Gaussian data of that variance, whatever its kind.

    Unlike the closed forms, which are for infinitely small steps, this is exact for the table at hand.
    """
    gain = ideal_gain(schedule, variance)
    std = schedule.coef[:, 2].cpu().double()
    variances = [torch.ones((), dtype=torch.float64)]
    for c, s in zip(gain, std, strict=True):
        variances.append(c.square() * variances[-1] + s.square())
    values = torch.stack(variances)
    return IdealChain(gain * (values[:-1] / values[1:]).sqrt(), values, gain)


def ideal_gain(schedule: Schedule, variance: float) -> Float64[Tensor, " t"]:
    """Weight of x in the mean of the next latent when the model's guess is E[x0 | x] = signal * variance / V * x."""
    signal, sigma = schedule.levels()
    guess = signal * variance / (signal.square() * variance + sigma.square())
    a, b, _ = schedule.coef.cpu().double().unbind(1)
    of_x, of_output = schedule.x0_coef.cpu().double().unbind(1)
    return a + b * (guess - of_x) / of_output


def schedule_correlation(schedule: Schedule, variance: float = 1.0) -> Float64[Tensor, " t"]:
    """Theorem 2 along a schedule, by its log-SNR alone and so the same for every sampler; the last step ends clean."""
    noise = (-schedule.log_snr.cpu().double()).exp()
    clean = torch.cat([noise[1:], torch.zeros(1, dtype=torch.float64)])
    return ((variance + clean) / (variance + noise)).sqrt()


def successive_correlations(latents: Float[Tensor, "b k *latent"]) -> Float[Tensor, "b k-1"]:
    """Correlation of each of k latents with the next one, one after another: nothing of latent size is copied."""
    if latents.shape[1] == 1:
        return latents.new_empty(len(latents), 0, dtype=torch.float32)
    return torch.stack([ops.correlation(x, y) for x, y in itertools.pairwise(latents.unbind(1))], 1)


@torch.no_grad()
def measured_uncertainty(trajectory: Trajectory) -> Float32[Tensor, " t"]:
    """1 - correlation of the latents before and after each step, mean over the samples that took it with noise.

    NaN where none did. A rollout tells the correlations on its way; without them they are taken from its latents.
    """
    told = trajectory.sample_correlation
    uncertainty = 1 - (successive_correlations(trajectory.latents) if told is None else told)
    return uncertainty.masked_fill(~trajectory.log_prob.isfinite(), torch.nan).nanmean(0)


def measured_correlation(
    latents: Float[Tensor, "b t+1 *latent"], *, over: Literal["sample", "pooled", "component"] = "pooled"
) -> Float[Tensor, " t"]:
    """Correlation of successive latents of a rollout; NaN where degenerate.

    Args:
        over: "sample": Pearson over each sample's elements, averaged over samples; "pooled": the same with the
            co-moments summed over samples first, of lower variance; "component": Pearson over the samples for each
            element, averaged over elements, which needs 8 samples or more.
    """
    if over not in ("sample", "pooled", "component"):
        raise ValueError(f"over is sample, pooled or component, not {over!r}")
    b, t = latents.shape[0], latents.shape[1] - 1
    now, after = (x.flatten(2) for x in (latents[:, :-1], latents[:, 1:]))  # [b, t, d]
    if over == "component":
        if b < 8:
            raise ValueError(f"a correlation over samples needs at least 8 of them, got {b}; use over='pooled'")
        rows = [x.permute(1, 2, 0).flatten(0, 1).contiguous() for x in (now, after)]  # [t * d, b]
        return ops.correlation(*rows).view(t, -1).mean(1)
    rows = [x.transpose(0, 1).flatten(0, 1) for x in (now, after)]  # [t * b, d]
    if over == "sample":
        return ops.correlation(*rows).view(t, b).mean(1)
    state = ops.correlation_update(torch.zeros(t * b, 6, device=latents.device), *rows).view(t, b, 6)
    return ops.correlation_from_state(torch.cat([state[..., :1], state[..., 1:3] * 0, state[..., 3:]], 2).sum(1))


def _flow_variance(t: Tensor, s: Tensor) -> Tensor:
    return (1 - t).square() * s + t.square()


def _dance_integral(t: Tensor, s: Tensor) -> Tensor:
    """Integral of 1 / V over time."""
    return torch.atan(((1 + s) * t - s) / s.sqrt()) / s.sqrt()


def _cross(
    covariance: Tensor, signal: float, noise: float, marginals: tuple[tuple[float, float], tuple[float, float]]
) -> Float64[Tensor, "d d"]:
    """(signal * Sigma + noise * I), divided by the standard deviations of both sides."""
    covariance = torch.as_tensor(covariance, dtype=torch.float64)
    cross = signal * covariance + noise * torch.eye(len(covariance), dtype=torch.float64)
    deviations = [(weight * covariance.diagonal() + own).sqrt() for weight, own in marginals]
    return cross / torch.outer(*deviations)
