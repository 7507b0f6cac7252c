"""The Gaussian processes behind the samplers: x = signal * x0 + sigma * noise before and after each of `t` steps.

Everything here is float64 on the CPU; `schedules` turns it into tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

PerStep = float | Sequence[float] | Tensor  # one value for every step, or t of them
Alphas = Sequence[float] | Float[Tensor, " train_steps"]
Sigmas = Sequence[float] | Float[Tensor, " t+1"]


CLEAN = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
"""Signal and sigma of a picture."""


@dataclass(frozen=True)
class Process:
    """Levels before and after each step; x0 and noise as weights of (sample, output)."""

    timesteps: Tensor
    signal: Tensor
    sigma: Tensor
    next_signal: Tensor
    next_sigma: Tensor
    x0: tuple[Tensor, Tensor]
    noise: tuple[Tensor, Tensor]

    def rows(self, std: Tensor) -> Tensor:
        """Mean next_signal * x0 + sqrt(next_sigma^2 - std^2) * noise: DDIM, Flow-CPS and, at std = 0, Euler's ODE."""
        remaining = self.next_sigma.square() - std.square()
        if (remaining < -1e-12).any():
            raise ValueError(f"eta leaves step {int(remaining.argmin())} no variance for its mean; use eta <= 1")
        kept = remaining.clamp(min=0).sqrt()
        mean = [self.next_signal * x0 + kept * noise for x0, noise in zip(self.x0, self.noise, strict=True)]
        return torch.stack([*mean, std], 1)

    def ancestral_std(self) -> Tensor:
        """Std of the posterior: DDIM's at eta = 1."""
        return self.next_sigma / self.sigma * (1 - (self.signal / self.next_signal).square()).clamp(min=0).sqrt()

    def sde_rows(self, diffusion: Tensor) -> Tensor:
        """Euler-Maruyama rows of dx = [v + diffusion^2 / (2t) (x + (1 - t) v)] dt + diffusion dw, t = sigma."""
        dt = self.next_sigma - self.sigma
        drift = diffusion.square() / (2 * self.sigma)
        return torch.stack([1 + drift * dt, dt * (1 + drift * self.signal), diffusion * (-dt).sqrt()], 1)


def solver_rows(signal: Float64[Tensor, " t+1"], sigma: Float64[Tensor, " t+1"]) -> Float64[Tensor, "t 3"]:
    """Weights of (x, guess, last guess) in each step of DPM-Solver++(2M) from one level to the next (2211.01095).

    As in diffusers the first step is of first order, and so is the last: with the last level clean it is the guess.
    """
    log_ratio = signal.log() - sigma.log()
    change = log_ratio.diff()
    of_guess = signal[1:] * -torch.expm1(-change)
    last = torch.zeros_like(of_guess)
    last[1:-1] = (-of_guess[1:] * change[1:] / (2 * change[:-1]))[:-1]
    return torch.stack([sigma[1:] / sigma[:-1], of_guess - last, last], 1)


def variance_preserving(alphas_cumprod, timesteps, stride, prediction_type, final_alpha_cumprod) -> Process:
    """x = sqrt(alpha) x0 + sqrt(1 - alpha) noise; each step goes from a timestep to that less `stride`."""
    alphas = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
    timesteps = torch.as_tensor(timesteps, dtype=torch.int64, device="cpu")
    outside = timesteps[(timesteps < 0) | (timesteps >= len(alphas))]
    if len(outside):
        raise ValueError(
            f"timesteps must lie in 0..{len(alphas) - 1}, got {int(outside[0])}{_and_more(len(outside))}; "
            f"take fewer steps, or a smaller offset"
        )
    final = alphas[0] if final_alpha_cumprod is None else alphas.new_tensor(final_alpha_cumprod)
    following = torch.where(timesteps >= stride, alphas[(timesteps - stride).clamp(min=0)], final)
    now = alphas[timesteps]
    levels = (now.sqrt(), (1 - now).sqrt(), following.sqrt(), (1 - following).sqrt())
    return _predicting(prediction_type, timesteps, levels)


def variance_exploding(sigmas: Sigmas, timesteps: Tensor, prediction_type: str) -> Process:
    """x0 + sigma * noise, divided by sqrt(1 + sigma^2): Euler's latents as the network sees them."""
    table = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    scale = (1 + table.square()).sqrt()
    signal, sigma = 1 / scale, table / scale
    levels = (signal[:-1], sigma[:-1], signal[1:], sigma[1:])
    return _predicting(prediction_type, torch.as_tensor(timesteps, dtype=torch.float64, device="cpu"), levels)


def _predicting(prediction_type: str, timesteps: Tensor, levels: tuple[Tensor, Tensor, Tensor, Tensor]) -> Process:
    signal, sigma = levels[:2]
    zero, one = torch.zeros_like(signal), torch.ones_like(signal)
    parts = {
        "epsilon": ((1 / signal, -sigma / signal), (zero, one)),
        "v_prediction": ((signal, -sigma), (sigma, signal)),
        "sample": ((zero, one), (1 / sigma, -signal / sigma)),
    }
    if prediction_type not in parts:
        raise ValueError(f"prediction_type is one of {', '.join(parts)}, not {prediction_type!r}; or use flow_sde()")
    return Process(timesteps, *levels, *parts[prediction_type])


def rectified_flow(sigmas: Sigmas, num_train_timesteps: int) -> Process:
    """x = (1 - t) x0 + t noise with sigmas t; the output is noise - x0."""
    table = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    if len(table) < 2:
        raise ValueError(f"sigmas must be one more than there are steps, got {len(table)}; add the last, usually 0")
    if not (table.diff() < 0).all():
        step = int((~(table.diff() < 0)).nonzero()[0])
        raise ValueError(
            f"sigmas must fall from each step to the next, got {table[step]:g} and then {table[step + 1]:g} at step "
            f"{step}; take fewer steps, or another shift"
        )
    if table[0] > 1 or table[-1] < 0:
        raise ValueError(f"sigmas must lie within [1, 0], got {table[0]:g} to {table[-1]:g}; correct the scheduler")
    t, one = table[:-1], torch.ones(len(table) - 1, dtype=torch.float64)
    return Process(t * num_train_timesteps, 1 - t, t, 1 - table[1:], table[1:], (one, -t), (one, 1 - t))


def per_step(value: PerStep, like: Tensor, name: str) -> Tensor:
    """`value` for each step, in float64; ValueError unless finite and not negative."""
    noise = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    if noise.ndim and noise.shape != like.shape:
        raise ValueError(f"{name} is one number or one for each of {len(like)} steps, but it has {noise.numel()}")
    if not (noise.isfinite() & (noise >= 0)).all():
        wrong = noise.reshape(-1)[~(noise.isfinite() & (noise >= 0)).reshape(-1)]
        raise ValueError(
            f"{name} must be finite and not negative, got {float(wrong[0]):g}{_and_more(len(wrong))}; "
            f"0 is deterministic"
        )
    return noise.expand(like.shape)


def _and_more(count: int) -> str:
    return "" if count == 1 else f" and {count - 1} more"
