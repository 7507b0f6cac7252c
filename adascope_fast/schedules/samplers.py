"""Every sampler as a table: x_next ~ N(a * x + b * model_output, std^2 I), one row (a, b, std) a step.

Axes: `t` denoising steps, noisiest first. Rows are computed in float64, stored in float32. std = 0 means no log_prob.

diffusers keeps samplers as stateful objects, with an index search and a device transfer in every step; here DDIM, DDPM,
Flow-SDE, Dance-SDE and Flow-CPS differ only in their numbers, so one fused kernel serves them all.
"""

import copy
import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float32, Float64
from torch import Tensor

from adascope_fast.schedules.noise import (
    CLEAN,
    Alphas,
    PerStep,
    Process,
    Sigmas,
    per_step,
    rectified_flow,
    solver_rows,
    variance_exploding,
    variance_preserving,
)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The steps of one sampler. The builders `ddim`, `ddpm`, `flow_*`, `dance_sde` and `from_diffusers` make it."""

    timesteps: Float32[Tensor, " t"]
    """What the network is given: the training timestep, or sigma * 1000 for flow models."""
    coef: Float32[Tensor, "t 3"]
    """(sample weight, output weight, std) of each step."""
    x0_coef: Float32[Tensor, "t 2"]
    """The model's guess of the clean latent is x0_coef[i, 0] * x + x0_coef[i, 1] * model_output."""
    log_snr: Float32[Tensor, " t"]
    """Log signal-to-noise ratio of the state that enters each step; -inf for pure noise."""
    kind: str
    ode_coef: Float32[Tensor, "t 3"] | None = None
    """`coef` of the deterministic limit (eta or noise_level 0), for `window`."""
    multistep: Float32[Tensor, "t 3"] | None = None
    """(sample, output, last guess) weights of a deterministic solver that also looks at the guess of the step before;
    `coef` has the first two. None: x and the output are all that a step looks at."""
    is_noised: bool = False
    """Whether training noises the clean latents anew, so that a step needs no log_prob to be trained."""

    @property
    def num_steps(self) -> int:
        """Length t of the tables."""
        return self.coef.shape[0]

    @property
    def is_flow(self) -> bool:
        """Whether the steps are those of a rectified flow."""
        return self.kind.startswith(("flow", "dance"))

    @property
    def trainable(self) -> Bool[Tensor, " t"]:
        """Steps with std > 0: only they have a log_prob. All steps where training noises the clean latents anew."""
        return (self.coef[:, 2] > 0) | self.is_noised

    def levels(self) -> tuple[Float64[Tensor, " t"], Float64[Tensor, " t"]]:
        """Weights (signal, sigma) of clean latent and noise in the state that enters each step; on the CPU."""
        log_snr = self.log_snr.cpu().double()
        if self.kind in ("ddim", "ddpm", "dpm_solver"):
            return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        if self.is_flow:
            return torch.sigmoid(log_snr / 2), torch.sigmoid(-log_snr / 2)
        raise ValueError(f"signal and noise are known for all samplers but euler, not for {self.kind!r}")

    def to(self, device: torch.device | str) -> "Schedule":
        """The same tables on `device`."""
        tables = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tables)

    def window(self, start: int, end: int) -> "Schedule":
        """This sampler in steps start..end-1 and its deterministic limit elsewhere (MixGRPO).

        The mean changes too: outside the window it is the ODE's, not the SDE's without its noise. A multistep solver is
        its own limit.
        """
        if self.ode_coef is None and self.multistep is None:
            raise ValueError("a window needs the rows of the deterministic limit, but ode_coef is None; use a builder")
        if not 0 <= start < end <= self.num_steps:
            raise ValueError(f"a window has 0 <= start < end <= {self.num_steps} steps, but this is [{start}, {end})")
        if self.ode_coef is None:
            return self
        coef = self.ode_coef.clone()
        coef[start:end] = self.coef[start:end]
        return dataclasses.replace(self, coef=coef)

    @classmethod
    def from_diffusers(
        cls,
        scheduler: Any,
        num_steps: int,
        *,
        eta: PerStep | None = None,
        noise_level: PerStep | None = None,
        kind: str | None = None,
        mu: float | None = None,
        sigmas: Sequence[float] | None = None,
        shift: float | None = None,
    ) -> "Schedule":
        """The table of a diffusers scheduler, which is left as it was.

        Schedulers with betas become "ddim" (default, eta 1) or "ddpm". DDIMScheduler and DDPMScheduler stand as they
        are; the others (PNDM, Euler, DPM and their kin) give their betas and offset, at DDIM's "leading" timesteps
        ("trailing" if their config says so). EulerDiscreteScheduler also becomes "euler": its own deterministic steps,
        of unit-variance latents. FlowMatchEulerDiscreteScheduler becomes "flow_sde" (default, noise_level 0.7),
        "dance_sde" (eta 0.3), "flow_cps" (eta 0.7) or "flow_ode". All of them become "dpm_solver", which ends at the
        clean latent.

        With noise, "ddim" ends at alphas_cumprod[0] whatever `set_alpha_to_one` says, as in ddpo-pytorch and TRL: the
        last step then has noise and can be trained. Without noise it ends as diffusers' own sampler does.

        Args:
            mu: the shift that use_dynamic_shifting wants.
            sigmas: of the steps before the scheduler shifts them, where a pipeline has its own (FLUX).
            shift: of flows, whose sigmas are `shifted_sigmas` then, whatever the scheduler says; None: its own.
        """
        classes, name = {base.__name__ for base in type(scheduler).__mro__}, type(scheduler).__name__
        is_flow = FLOW_SCHEDULER in classes
        if not is_flow and not classes & BETA_SCHEDULERS:
            known = ", ".join(sorted(BETA_SCHEDULERS))
            raise ValueError(f"supported schedulers are {FLOW_SCHEDULER}, {known}, not {name}")
        kinds = _FLOW_KINDS if is_flow else _BETA_KINDS
        kind = kind or next(iter(kinds))
        if kind not in kinds or (kind == "euler" and "EulerDiscreteScheduler" not in classes):
            raise ValueError(f"sampler.kind is one of {', '.join(kinds)} for {name}, got {kind!r}; choose one of them")
        build, noise = kinds[kind]
        for given, value in (("eta", eta), ("noise_level", noise_level)):
            if value is not None and given not in noise:
                takes = ", ".join(f"sampler.{own}" for own in noise) or "no noise"
                raise ValueError(f"the sampler {kind} takes {takes}, got sampler.{given} = {value!s:.40}; remove it")
            noise = noise if value is None else {given: value}
        if is_flow:
            own = _sigmas_of(scheduler, num_steps, mu, sigmas) if shift is None else shifted_sigmas(num_steps, shift)
            if kind == "dpm_solver":
                return build(rectified_flow(own, scheduler.config["num_train_timesteps"]), "flow_dpm_solver")
            return build(own, num_train_timesteps=scheduler.config["num_train_timesteps"], **noise)
        if shift is not None:
            raise ValueError(
                f"sampler.shift is of flow samplers, got {shift:g} for the sampler {kind} of a {name}; remove it"
            )
        steps = _steps_of(scheduler, num_steps, stands=bool(classes & {"DDIMScheduler", "DDPMScheduler"}))
        if kind == "euler":
            return build(scheduler, num_steps)
        if kind == "dpm_solver":
            return build(variance_preserving(scheduler.alphas_cumprod, **steps), kind)
        if kind == "ddim" and bool((torch.as_tensor(noise["eta"]) > 0).any()):
            steps["final_alpha_cumprod"] = None
        if kind == "ddpm":
            noise = {"variance_type": scheduler.config.get("variance_type") or "fixed_small"}
        return build(scheduler.alphas_cumprod, **steps, **noise)


def shifted_sigmas(num_steps: int, shift: float) -> Float64[Tensor, " t+1"]:
    """linspace(1, 0, t + 1), shifted once: s x / (1 + (s - 1) x), as DanceGRPO and MixGRPO have them.

    diffusers shifts those of SD3 twice, between other ends.
    """
    even = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift * even / (1 + (shift - 1) * even)


def ddim(
    alphas_cumprod: Alphas,
    timesteps: Sequence[int] | Tensor,
    *,
    stride: int,
    eta: PerStep,
    prediction_type: str = "epsilon",
    final_alpha_cumprod: float | None = None,
) -> Schedule:
    """DDIM with eta (Song et al. 2021, eq. 12 and 16).

    Args:
        timesteps: indices into alphas_cumprod, noisiest first.
        stride: each step goes from timestep to timestep - stride, as in diffusers.
        eta: 0 deterministic, 1 ancestral.
        prediction_type: "epsilon", "v_prediction" or "sample".
        final_alpha_cumprod: of negative timesteps; alphas_cumprod[0] by default. 1 makes the last step deterministic.
    """
    process = variance_preserving(alphas_cumprod, timesteps, stride, prediction_type, final_alpha_cumprod)
    return _table(process, "ddim", process.rows(per_step(eta, process.sigma, "eta") * process.ancestral_std()))


def ddpm(
    alphas_cumprod: Alphas,
    timesteps: Sequence[int] | Tensor,
    *,
    stride: int,
    prediction_type: str = "epsilon",
    final_alpha_cumprod: float | None = None,
    variance_type: str = "fixed_small",
) -> Schedule:
    """DDPM's ancestral sampler (Ho et al. 2020); its mean, and "fixed_small" std, are DDIM's at eta = 1.

    Args:
        variance_type: "fixed_small" or "fixed_large"; the other arguments are those of `ddim`.
    """
    if variance_type not in ("fixed_small", "fixed_large"):
        raise ValueError(f"variance_type is fixed_small or fixed_large, not {variance_type!r}; use ddim() instead")
    process = variance_preserving(alphas_cumprod, timesteps, stride, prediction_type, final_alpha_cumprod)
    coef = process.rows(process.ancestral_std())
    if variance_type == "fixed_large":
        coef[:, 2] = (1 - (process.signal / process.next_signal).square()).sqrt()
    return _table(process, "ddpm", coef)


def flow_sde(sigmas: Sigmas, *, noise_level: PerStep, num_train_timesteps: int = 1000) -> Schedule:
    """Flow-GRPO's SDE, sigma_t = noise_level * sqrt(t / (1 - t)) (2505.05470).

    At t = 1 the 1 - t under the root is that of the next sigma, as in their code.

    Args:
        sigmas: t of x_t = (1 - t) x0 + t noise: falling, one more than there are steps, the last usually 0.
    """
    flow = rectified_flow(sigmas, num_train_timesteps)
    below_one = torch.where(flow.sigma > 1 - 1e-6, flow.next_sigma, flow.sigma)
    noise = per_step(noise_level, flow.sigma, "noise_level")
    return _table(flow, "flow_sde", flow.sde_rows(noise * (flow.sigma / (1 - below_one)).sqrt()))


def dance_sde(sigmas: Sigmas, *, eta: PerStep, num_train_timesteps: int = 1000) -> Schedule:
    """DanceGRPO's SDE, sigma_t = eta at every step (2505.07818)."""
    flow = rectified_flow(sigmas, num_train_timesteps)
    return _table(flow, "dance_sde", flow.sde_rows(per_step(eta, flow.sigma, "eta")))


def flow_cps(sigmas: Sigmas, *, eta: PerStep, num_train_timesteps: int = 1000) -> Schedule:
    """Flow-CPS, which keeps the weights of x0 and noise: kept^2 + std^2 = t_next^2 (2509.05952).

    Args:
        eta: in [0, 1]; std = t_next sin(eta pi / 2). A last sigma of 0 makes the last step deterministic.
    """
    flow = rectified_flow(sigmas, num_train_timesteps)
    angle = per_step(eta, flow.sigma, "eta") * (math.pi / 2)
    if (angle > math.pi / 2).any():
        highest = float(angle.max() / (math.pi / 2))
        raise ValueError(f"eta of Flow-CPS must lie in [0, 1], got {highest:g}; 0.7 to 0.8 is usual")
    return _table(flow, "flow_cps", flow.rows(flow.next_sigma * angle.sin()))


def flow_ode(sigmas: Sigmas, *, num_train_timesteps: int = 1000) -> Schedule:
    """Euler steps of the flow: no step is trainable."""
    schedule = dance_sde(sigmas, eta=0.0, num_train_timesteps=num_train_timesteps)
    return dataclasses.replace(schedule, kind="flow_ode")


def dpm_solver(process: Process, kind: str) -> Schedule:
    """DPM-Solver++(2M) between a process's levels, its last step to the clean image: no step is trainable.

    The second order needs the guess of the step before, see `Schedule.multistep`. (Lu et al., 2211.01095; diffusers'
    DPMSolverMultistepScheduler.)
    """
    signal, sigma = (torch.cat([level, end]) for level, end in zip((process.signal, process.sigma), CLEAN, strict=True))
    of_x, of_guess, of_last = solver_rows(signal, sigma).unbind(1)
    guess_of_x, guess_of_output = process.x0
    rows = [of_x + of_guess * guess_of_x, of_guess * guess_of_output]
    schedule = _table(process, kind, torch.stack([*rows, torch.zeros_like(of_x)], 1))
    return dataclasses.replace(schedule, ode_coef=None, multistep=torch.stack([*rows, of_last], 1).float())


def _table(process: Process, kind: str, coef: Tensor) -> Schedule:
    if not coef.isfinite().all():
        step = int((~coef.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"step {step} has no finite mean (signal {process.signal[step]:g}); try v_prediction")
    log_snr = 2 * (process.signal.log() - process.sigma.log())
    tables = (process.timesteps, coef, torch.stack(process.x0, 1), log_snr)
    ode_coef = process.rows(torch.zeros_like(process.sigma))
    return Schedule(*[table.float() for table in tables], kind=kind, ode_coef=ode_coef.float())


def _steps_of(scheduler: Any, num_steps: int, *, stands: bool) -> dict[str, Any]:
    config = scheduler.config
    for option in ("clip_sample", "thresholding"):
        if config.get(option):
            raise ValueError(f"steps must be affine in the output, but {option} is True; set {option}=False")
    train_steps, spacing = config["num_train_timesteps"], config.get("timestep_spacing", "leading")
    if spacing not in ("leading", "trailing", "linspace"):
        raise ValueError(
            f"timestep_spacing of the scheduler must be leading, trailing or linspace, got {spacing!r}; correct it in "
            f"scheduler_config.json"
        )
    if not 1 <= num_steps <= train_steps:
        raise ValueError(f"num_steps lies in 1..{train_steps}, the training steps of the scheduler, not {num_steps}")
    stride, remaining = train_steps // num_steps, torch.arange(num_steps - 1, -1, -1, dtype=torch.float64)
    if spacing == "trailing":
        timesteps = _trailing(train_steps, num_steps)
    elif spacing == "linspace" and stands:
        timesteps = (remaining * ((train_steps - 1) / max(num_steps - 1, 1))).round()
    else:
        offset = config.get("steps_offset", 0)
        if not 0 <= stride * (num_steps - 1) + offset < train_steps:
            raise ValueError(
                f"{num_steps} steps with the scheduler's steps_offset = {offset} start at timestep "
                f"{stride * (num_steps - 1) + offset}, and it was trained at 0..{train_steps - 1}; "
                f"set sampler.num_steps lower, or steps_offset to 0"
            )
        timesteps = remaining * stride + offset
    final = 1.0 if config.get("set_alpha_to_one", True) else None
    return dict(
        timesteps=timesteps, stride=stride, prediction_type=config["prediction_type"], final_alpha_cumprod=final
    )


def _trailing(train_steps: int, num_steps: int) -> Tensor:
    """`np.arange(train_steps, 0, -train_steps / num_steps).round() - 1`, as diffusers has it, to the last bit.

    numpy adds multiples of the rounded difference of its first two values, which decides where a half is rounded to.
    For 62 of the 1..1000 steps that makes one value too many in diffusers, a timestep of -1; it is not in here.
    """
    difference = (train_steps - train_steps / num_steps) - train_steps
    return (train_steps + difference * torch.arange(num_steps, dtype=torch.float64)).round() - 1


def _euler(scheduler: Any, num_steps: int) -> Schedule:
    """Euler's ODE of x0 + sigma * noise is DDIM at eta = 0 between its own levels; the last one is clean."""
    scheduler = copy.deepcopy(scheduler)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # numpy's, on diffusers' part
        scheduler.set_timesteps(num_steps)
    process = variance_exploding(scheduler.sigmas, scheduler.timesteps, scheduler.config["prediction_type"])
    return _table(process, "euler", process.rows(torch.zeros_like(process.sigma)))


def _sigmas_of(scheduler: Any, num_steps: int, mu: float | None, sigmas: Sequence[float] | None) -> Tensor:
    if scheduler.config.get("use_dynamic_shifting") and mu is None:
        raise ValueError("with use_dynamic_shifting the sigmas depend on the resolution, but mu is None; pass mu=...")
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_steps, mu=mu, sigmas=sigmas)
    return scheduler.sigmas


FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
BETA_SCHEDULERS = {
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
}
_BETA_KINDS: dict[str, Any] = {"ddim": (ddim, {"eta": 1.0}), "ddpm": (ddpm, {}), "dpm_solver": (dpm_solver, {})}
_BETA_KINDS |= {"euler": (_euler, {})}
_FLOW_KINDS: dict[str, Any] = {"flow_sde": (flow_sde, {"noise_level": 0.7}), "dance_sde": (dance_sde, {"eta": 0.3})}
_FLOW_KINDS |= {"flow_cps": (flow_cps, {"eta": 0.7}), "flow_ode": (flow_ode, {}), "dpm_solver": (dpm_solver, {})}
