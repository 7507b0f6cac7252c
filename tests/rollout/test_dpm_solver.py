"""Rollouts with the second-order solver: diffusers' own latents step by step, and every table of a trajectory."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from adascope_fast import ops
from adascope_fast.adascope.sensing import LatentSensor, curves_of_guesses
from adascope_fast.rollout import EncodedPrompts, OwnNoise, Trajectory, rollout
from adascope_fast.schedules import Schedule
from adascope_fast.schedules.tail import tail

PROMPTS = ["a red one", "see", "the green", "see"]
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
T = 7


def _diffusion(prediction: str, num_steps: int = T) -> tuple[Schedule, Any]:
    """Ours, and diffusers' scheduler at the same levels."""
    betas: dict[str, Any] = BETAS | {"prediction_type": prediction}
    given = DDIMScheduler(**betas, clip_sample=False, steps_offset=1)
    schedule = Schedule.from_diffusers(given, num_steps, kind="dpm_solver")
    scheduler: Any = DPMSolverMultistepScheduler(**betas)
    _prepare(scheduler, timesteps=schedule.timesteps.long().tolist())
    return schedule, scheduler


def _prepare(scheduler: Any, **steps: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # numpy's, on diffusers' part
        scheduler.set_timesteps(**steps)


def _flow(shift: float, num_steps: int = T) -> tuple[Schedule, Any]:
    given: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = Schedule.from_diffusers(given, num_steps, kind="dpm_solver")
    _prepare(given, num_inference_steps=num_steps)
    scheduler: Any = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction"
    )
    _prepare(scheduler, num_inference_steps=num_steps)
    scheduler.sigmas, scheduler.timesteps = given.sigmas, given.timesteps  # from pure noise on
    return schedule, scheduler


SAMPLERS: dict[str, Callable[[], tuple[Schedule, Any]]] = {
    "epsilon": lambda: _diffusion("epsilon"),
    "v": lambda: _diffusion("v_prediction"),
    "sample": lambda: _diffusion("sample"),
    "many": lambda: _diffusion("epsilon", 21),
    "flow": lambda: _flow(1.0),
    "shifted flow": lambda: _flow(3.0, 16),
    "two steps": lambda: _flow(3.0, 2),
    "one step": lambda: _flow(3.0, 1),
}


def _rollout(toy: Any, schedule: Schedule, guidance_scale: float = 1.0, **options: Any) -> Trajectory:
    encoded = EncodedPrompts.of(toy, PROMPTS)
    shared: dict[str, Any] = {"guidance_scale": guidance_scale, "noise": OwnNoise(3), "batch": 4} | options
    return rollout(toy, schedule, encoded, PROMPTS, **shared)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_latents_are_those_of_diffusers_scheduler(make_toy: Callable, name: str, guidance_scale: float):
    toy = make_toy()
    schedule, scheduler = SAMPLERS[name]()
    trajectory = _rollout(toy, schedule, guidance_scale)
    x = trajectory.latents[:, 0].double()
    condition, negative = toy.encode(PROMPTS), toy.encode([""] * len(PROMPTS))
    for step, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            timestep = t.float().expand(len(x))
            output, without = (toy.predict(x, timestep, text).double() for text in (condition, negative))
        output = without + guidance_scale * (output - without)
        (x,) = scheduler.step(output, t, x, return_dict=False)
        torch.testing.assert_close(trajectory.latents[:, step + 1].double(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gaussian", "squared_error"])
@pytest.mark.parametrize("name", ["epsilon", "flow"])
def test_every_table_is_filled_as_by_the_other_samplers(make_toy: Callable, name: str, kind: Any):
    """But for the log-probabilities, of whatever kind: there are none."""
    toy = make_toy()
    schedule, _ = SAMPLERS[name]()
    trajectory = _rollout(toy, schedule, kind=kind)
    assert trajectory.log_prob.isnan().all()
    assert not schedule.trainable.any()
    for step in range(T):
        with torch.no_grad():
            sample = trajectory.latents[:, step]
            output = toy.predict(sample, schedule.timesteps[step].expand(4), toy.encode(PROMPTS))
        of_x, of_output = schedule.x0_coef[step]
        torch.testing.assert_close(trajectory.x0[:, step], of_x * sample + of_output * output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trajectory.x0[:, -1], trajectory.latents[:, -1])  # it ends at its guess
    assert trajectory.x0_correlation is not None
    assert trajectory.sample_correlation is not None
    for step in range(T - 1):
        likeness = ops.correlation(trajectory.x0[:, step].contiguous(), trajectory.x0[:, step + 1].contiguous())
        torch.testing.assert_close(trajectory.x0_correlation[:, step], likeness)
    assert trajectory.x0_correlation[:, -1].isnan().all()
    states = [trajectory.latents[:, step].contiguous() for step in range(T + 1)]
    told = torch.stack([ops.correlation(x, y) for x, y in itertools.pairwise(states)], 1)
    torch.testing.assert_close(trajectory.sample_correlation, told)
    want = curves_of_guesses(trajectory.x0, trajectory.latents[:, -1])
    sensed = LatentSensor()(trajectory)
    assert sensed.volatility is not None
    assert want.volatility is not None
    torch.testing.assert_close(sensed.preference, want.preference.cpu(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sensed.volatility, want.volatility.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["v", "flow"])
def test_a_sample_does_not_depend_on_its_batch(make_toy: Callable, name: str):
    toy, (schedule, _) = make_toy(), SAMPLERS[name]()
    whole, single = _rollout(toy, schedule, 2.0), _rollout(toy, schedule, 2.0, batch=1)
    torch.testing.assert_close(whole.latents, single.latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.x0, single.x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["epsilon", "v", "flow", "shifted flow"])
def test_it_is_the_tail_from_the_first_step_on(name: str):
    schedule, _ = SAMPLERS[name]()
    assert schedule.multistep is not None
    whole = tail(schedule, 0, 1.0)
    assert whole.step.tolist() == list(range(schedule.num_steps))
    of_x, of_guess, of_last = whole.coef.unbind(1)
    guess_of_x, guess_of_output = schedule.x0_coef.double().unbind(1)
    want = torch.stack([of_x + of_guess * guess_of_x, of_guess * guess_of_output, of_last], 1)
    torch.testing.assert_close(schedule.multistep.double(), want, rtol=1e-5, atol=2e-6)
    assert torch.equal(schedule.coef[:, :2], schedule.multistep[:, :2])


def test_the_solver_is_its_own_deterministic_limit():
    schedule, _ = SAMPLERS["flow"]()
    assert schedule.window(2, 4) is schedule
    with pytest.raises(ValueError, match=r"a window has 0 <= start < end <= 7 steps, but this is \[4, 9\)"):
        schedule.window(4, 9)
