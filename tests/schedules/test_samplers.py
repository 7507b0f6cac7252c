"""Sampler tables against values worked out elsewhere and against diffusers' own schedulers."""

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adascope_fast.schedules import Schedule
from adascope_fast.schedules import samplers as schedules

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())
RTOL = 2e-5  # float32 alphas_cumprod of diffusers alone cost this much
SD15: dict[str, Any] = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)


def _alphas_cumprod() -> np.ndarray:
    """SD1.5's, in float64."""
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def _apply(schedule: Schedule, i: int, sample: torch.Tensor, output: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    a, b, std = schedule.coef[i].double()
    return a * sample + b * output + std * noise


def _close(got: torch.Tensor, want: torch.Tensor, rtol: float = RTOL):
    """Relative to the largest element: a mean near 0 has no relative error to speak of."""
    assert (got - want).abs().max() <= rtol * want.abs().max().clamp(min=1)


@pytest.fixture
def latents() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, 5, 3, generator=generator, dtype=torch.float64) for _ in range(3))  # type: ignore


@pytest.mark.parametrize(
    "row", VECTORS["affine_coefficients"], ids=lambda row: f"{row['scheme']}-{row.get('pred', '')}"
)
def test_coefficients_are_the_known_ones(row):
    if row["scheme"] in ("ddim", "ddpm"):
        extra = {"eta": row["eta"]} if row["scheme"] == "ddim" else {}
        alphas = [row["alpha_bar_prev"], row["alpha_bar"]]
        build = getattr(schedules, row["scheme"])
        schedule = build(alphas, [1], stride=1, prediction_type=row["pred"], **extra)
    elif row["scheme"] == "flow_sde":
        schedule = schedules.flow_sde([row["t"], row["t_next"]], noise_level=row["a"])
    elif row["scheme"] == "dance_sde":
        schedule = schedules.dance_sde([row["t"], row["t_next"]], eta=row["eta"])
    else:
        schedule = schedules.flow_cps([row["t"], row["t_next"]], eta=row["eta"])
    np.testing.assert_allclose(schedule.coef[0].numpy(), row["coef"], rtol=2e-7, atol=1e-12)
    assert schedule.coef.dtype == torch.float32


def test_known_sd15_schedule():
    known = VECTORS["schedule_sd15_ddim50"]
    schedule = Schedule.from_diffusers(diffusers.DDIMScheduler(**SD15), 50)
    exact = schedules.ddim(_alphas_cumprod().tolist(), schedule.timesteps.long(), stride=20, eta=1.0)
    assert schedule.timesteps[:3].tolist() == known["first_timesteps"]
    assert schedule.timesteps[-3:].tolist() == known["last_timesteps"]
    assert schedule.num_steps == 50
    assert schedule.trainable.all()
    for row in known["rows"]:
        i, snr = row["i"], row["alpha_bar"] / (1 - row["alpha_bar"])
        assert exact.coef[i, 2].item() == pytest.approx(row["sigma_eta1"], rel=2e-7)
        assert schedule.coef[i, 2].item() == pytest.approx(row["sigma_eta1"], rel=2.2e-5)
        assert exact.log_snr[i].item() == pytest.approx(math.log(snr), rel=1e-6)
        # sensitivity b^2 / std^2 of the log_prob is SNR_next / SNR - 1
        kappa = row["alpha_bar_prev"] / (1 - row["alpha_bar_prev"]) / snr - 1
        assert (exact.coef[i, 1] / exact.coef[i, 2]).square().item() == pytest.approx(kappa, rel=1e-5)


@pytest.mark.parametrize("row", VECTORS["x0_prediction"], ids=lambda row: row["pred"])
def test_known_x0(row):
    if row["pred"] == "flow":
        schedule = schedules.flow_ode([row["t"], 0.0])
    else:
        schedule = schedules.ddim([0.9, row["alpha_bar"]], [1], stride=1, eta=0.0, prediction_type=row["pred"])
    weights = schedule.x0_coef[0].double()
    np.testing.assert_allclose(
        weights[0] * torch.tensor(row["x"]) + weights[1] * torch.tensor(row["m"]), row["x0"], 1e-6
    )


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_matches_diffusers(eta, prediction_type, spacing, latents):
    scheduler: Any = diffusers.DDIMScheduler(**SD15, prediction_type=prediction_type, timestep_spacing=spacing)
    schedule = Schedule.from_diffusers(scheduler, 50, eta=eta)
    assert scheduler.num_inference_steps is None, "the caller's scheduler must stay as it was"
    scheduler.set_timesteps(50)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    sample, output, noise = latents
    for i, t in enumerate(scheduler.timesteps):
        step = scheduler.step(output, int(t), sample, eta=eta, variance_noise=noise)
        _close(_apply(schedule, i, sample, output, noise), step.prev_sample)
        x0 = schedule.x0_coef[i, 0] * sample + schedule.x0_coef[i, 1] * output
        _close(x0, step.pred_original_sample)


@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("scheduler_class", [diffusers.DDIMScheduler, diffusers.DDPMScheduler])
def test_timesteps_match_diffusers_for_every_count(scheduler_class, spacing, steps_offset):
    """diffusers' arange has a value too many for 62 of the trailing counts, a timestep of -1, which is left out."""
    options = dict(clip_sample=False, steps_offset=steps_offset, timestep_spacing=spacing)
    scheduler, steps_past_the_end = scheduler_class(**options), 0
    for num_steps in range(1, 1001):
        scheduler.set_timesteps(num_steps)
        want = [float(step) for step in scheduler.timesteps if step >= 0]
        if max(want) > 999:
            steps_past_the_end += 1
            with pytest.raises(ValueError, match=f"^{num_steps} steps with .* steps_offset = 1 start at timestep 1000"):
                Schedule.from_diffusers(scheduler, num_steps, eta=0.0)
            continue
        schedule = Schedule.from_diffusers(scheduler, num_steps, eta=0.0)
        assert schedule.timesteps.tolist() == want
        assert schedule.num_steps == num_steps
    assert steps_past_the_end == (spacing == "leading" and steps_offset == 1)


ALPHAS = [0.999 - 0.0009 * step for step in range(1000)]
LONG = [float(step) for step in range(2000)]


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: schedules.ddim(ALPHAS, [int(step) for step in LONG], stride=1, eta=0.0), "got 1000 and 999 more"),
        (lambda: schedules.ddim(ALPHAS, [0] * 1000, stride=1, eta=[-1.0] * 1000), "got -1 and 999 more"),
        (lambda: schedules.flow_ode(LONG), "got 0 and then 1 at step 0"),
        (lambda: schedules.flow_ode([2.0, 1.0, 0.0]), "got 2 to 0"),
        (lambda: schedules.flow_ode([1.0]), "got 1; add the last"),
        (lambda: schedules.flow_cps([1 - step / 2000 for step in range(2001)], eta=[3.0] * 2000), "got 3;"),
        (
            lambda: Schedule.from_diffusers(diffusers.DDIMScheduler(**SD15), 1000),
            "1000 steps with the scheduler's steps_offset = 1 start at timestep 1000",
        ),
        (
            lambda: Schedule.from_diffusers(diffusers.DDIMScheduler(**SD15), 9, noise_level=LONG),
            "takes sampler.eta, got sampler.noise_level",
        ),
    ],
)
def test_an_error_about_many_numbers_is_one_short_line(build, told: str):
    with pytest.raises(ValueError, match=r"got|start at") as raised:
        build()
    assert told in str(raised.value)
    assert len(str(raised.value)) < 200
    assert "\n" not in str(raised.value)


def test_an_unknown_spacing_is_refused_by_name():
    scheduler = diffusers.DDIMScheduler(**SD15)
    scheduler.register_to_config(timestep_spacing="even")
    with pytest.raises(ValueError, match=r"timestep_spacing of the scheduler must be .*, got 'even'"):
        Schedule.from_diffusers(scheduler, 9)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddpm_matches_diffusers(prediction_type, variance_type, latents, monkeypatch):
    config = {**SD15, "prediction_type": prediction_type, "variance_type": variance_type, "timestep_spacing": "leading"}
    config.pop("set_alpha_to_one")
    scheduler: Any = diffusers.DDPMScheduler(**config)
    schedule = Schedule.from_diffusers(scheduler, 20, kind="ddpm")
    scheduler.set_timesteps(20)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    sample, output, noise = latents
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: noise)
    for i, t in enumerate(scheduler.timesteps):
        # float32 betas 1 - A / A' of diffusers cost more than those of DDIM
        _close(_apply(schedule, i, sample, output, noise), scheduler.step(output, int(t), sample).prev_sample, 1e-4)
    assert schedule.trainable.tolist() == [True] * 19 + [variance_type == "fixed_large"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddpm_is_ddim_with_eta_1(prediction_type):
    """Against the posterior of Ho et al. 2020, eq. 7, written out."""
    alphas, steps = _alphas_cumprod(), np.arange(981, 0, -20)
    now, after = alphas[steps], np.append(alphas[steps[1:]], alphas[0])
    beta = 1 - now / after
    x0_weight, sample_weight = np.sqrt(after) * beta / (1 - now), np.sqrt(1 - beta) * (1 - after) / (1 - now)
    arguments: dict[str, Any] = dict(stride=20, prediction_type=prediction_type)
    ddim = schedules.ddim(alphas.tolist(), steps.tolist(), eta=1.0, **arguments)
    ddpm = schedules.ddpm(alphas.tolist(), steps.tolist(), **arguments)
    x0 = ddim.x0_coef.double().numpy()
    want = np.stack(
        [x0_weight * x0[:, 0] + sample_weight, x0_weight * x0[:, 1], np.sqrt(beta * (1 - after) / (1 - now))]
    )
    np.testing.assert_allclose(ddpm.coef.numpy(), want.T, rtol=1e-6, atol=1e-7)
    assert torch.equal(ddim.coef, ddpm.coef)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (diffusers.PNDMScheduler, dict(skip_prk_steps=True)),
        (diffusers.EulerDiscreteScheduler, dict(timestep_spacing="leading")),
        (diffusers.EulerDiscreteScheduler, dict(timestep_spacing="trailing")),
        (diffusers.DPMSolverMultistepScheduler, dict()),
        (diffusers.DDPMScheduler, dict()),
    ],
)
def test_other_schedulers_become_the_ddim_of_their_config(scheduler, options):
    config = diffusers.DDIMScheduler(**SD15).config
    other = scheduler.from_config(config, **options)
    spacing = "trailing" if options.get("timestep_spacing") == "trailing" else "leading"
    want = Schedule.from_diffusers(diffusers.DDIMScheduler(**SD15, timestep_spacing=spacing), 50)
    got = Schedule.from_diffusers(other, 50)
    assert torch.equal(got.coef, want.coef)
    assert torch.equal(got.timesteps, want.timesteps)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "options",
    [
        dict(timestep_spacing="leading"),
        dict(timestep_spacing="trailing"),
        dict(timestep_spacing="linspace"),
        dict(timestep_spacing="leading", use_karras_sigmas=True),
        dict(timestep_spacing="leading", final_sigmas_type="sigma_min"),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_euler_matches_diffusers(prediction_type, options, latents):
    kept = {"beta_start", "beta_end", "beta_schedule", "steps_offset"}
    config = {name: value for name, value in SD15.items() if name in kept}
    scheduler: Any = diffusers.EulerDiscreteScheduler(**config, prediction_type=prediction_type, **options)
    schedule = Schedule.from_diffusers(scheduler, 20, kind="euler")
    scheduler.set_timesteps(20)
    scale = (1 + scheduler.sigmas.double().square()).sqrt()
    sample, output, noise = latents
    torch.testing.assert_close(schedule.timesteps, scheduler.timesteps.float(), rtol=0, atol=1e-4)
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(output, t, sample * scale[i])
        _close(_apply(schedule, i, sample, output, noise), theirs.prev_sample / scale[i + 1], 1e-6)
        x0 = schedule.x0_coef[i].double()
        _close(x0[0] * sample + x0[1] * output, theirs.pred_original_sample, 1e-6)
    assert not schedule.trainable.any()


def test_euler_of_sdxl_is_ddim_but_for_the_last_step_which_ends_clean():
    scheduler = diffusers.EulerDiscreteScheduler.from_config(dict(SD15, timestep_spacing="leading"))
    euler = Schedule.from_diffusers(scheduler, 25, kind="euler")
    ddim = Schedule.from_diffusers(scheduler, 25, eta=0.0)
    torch.testing.assert_close(euler.coef[:-1], ddim.coef[:-1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(euler.coef[-1, :2], euler.x0_coef[-1], rtol=0, atol=1e-6)
    assert Schedule.from_diffusers(scheduler, 25).trainable.all()


def test_flux_sigmas_are_shifted_by_the_resolution():
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    sigmas = [1.0, 0.75, 0.5, 0.25]
    schedule = Schedule.from_diffusers(scheduler, 4, kind="flow_ode", mu=1.15, sigmas=sigmas)
    want = [math.exp(1.15) / (math.exp(1.15) + 1 / sigma - 1) for sigma in sigmas]  # SD3's and FLUX' time shift
    np.testing.assert_allclose(schedule.timesteps / 1000, want, rtol=1e-6)
    scheduler.set_timesteps(sigmas=sigmas, mu=1.15)
    assert torch.equal(schedule.timesteps, scheduler.timesteps)


@pytest.mark.parametrize(
    "options",
    [
        dict(shift=3.0),
        dict(),
        dict(use_dynamic_shifting=True),
        dict(use_dynamic_shifting=True, time_shift_type="linear"),
        dict(shift_terminal=0.02),
        dict(use_karras_sigmas=True),
        dict(use_exponential_sigmas=True),
    ],
)
def test_flow_ode_matches_diffusers(options, latents):
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    mu = 1.15 if options.get("use_dynamic_shifting") else None
    before = scheduler.sigmas.clone()
    schedule = Schedule.from_diffusers(scheduler, 10, kind="flow_ode", mu=mu)
    assert torch.equal(scheduler.sigmas, before), "the caller's scheduler must stay as it was"
    scheduler.set_timesteps(10, mu=mu)
    assert torch.equal(schedule.timesteps, scheduler.timesteps)
    sample, output, noise = latents
    for i, t in enumerate(scheduler.timesteps):
        _close(_apply(schedule, i, sample, output, noise), scheduler.step(output, t, sample).prev_sample, 1e-6)
    assert not schedule.trainable.any()


def test_sd3_sigmas_are_shifted_twice():
    schedule = Schedule.from_diffusers(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 10)
    want = [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929]
    np.testing.assert_allclose(schedule.timesteps / 1000, want, atol=1e-6)
    assert schedule.kind == "flow_sde"
    assert schedule.log_snr[0] == -math.inf
    # at t = 1: sigma_t = 0.7 sqrt(1 / (1 - 0.960129)), std = sigma_t sqrt(1 - 0.960129) = 0.7; 1 - t = 0 leaves b = dt
    np.testing.assert_allclose(schedule.coef[0], [1 - 0.7**2 / 2, 0.960129 - 1, 0.7], atol=1e-6)


SIGMAS = st.lists(st.floats(0.01, 0.99), min_size=2, max_size=12, unique=True).filter(
    lambda sigmas: np.diff(sorted(sigmas)).min() > 1e-3
)


@settings(max_examples=30, deadline=None)
@given(SIGMAS, st.floats(0.05, 1.0))
def test_identities_of_flow_tables(sigmas, noise):
    sigmas = [*sorted(sigmas, reverse=True), 0.0]
    t, after = np.array(sigmas[:-1]), np.array(sigmas[1:])
    flow = schedules.flow_sde(sigmas, noise_level=noise).coef.double().numpy()
    np.testing.assert_allclose(flow[:, 1], (after - t) * (1 + noise**2 / 2), rtol=1e-6)
    np.testing.assert_allclose(flow[:, 0], 1 + noise**2 * (after - t) / (2 * (1 - t)), rtol=1e-5, atol=1e-6)
    cps = schedules.flow_cps(sigmas, eta=noise)
    kept = cps.coef[:, 0].double().numpy() - (1 - after)
    np.testing.assert_allclose(kept**2 + cps.coef[:, 2].double().numpy() ** 2, after**2, atol=1e-6)
    assert cps.trainable.tolist() == [True] * (len(t) - 1) + [False]


def _builders():
    sigmas = [1.0, 0.8, 0.55, 0.3, 0.1, 0.0]
    vp: dict[str, Any] = dict(alphas_cumprod=_alphas_cumprod().tolist(), timesteps=[801, 601, 401, 201, 1], stride=200)
    yield lambda noise: schedules.ddim(eta=noise, **vp)
    yield lambda noise: schedules.flow_sde(sigmas, noise_level=noise)
    yield lambda noise: schedules.dance_sde(sigmas, eta=noise)
    yield lambda noise: schedules.flow_cps(sigmas, eta=noise)


@pytest.mark.parametrize("build", list(_builders()), ids=["ddim", "flow_sde", "dance_sde", "flow_cps"])
def test_window_is_the_builder_with_noise_inside_alone(build):
    windowed = build(0.7).window(1, 3)
    assert torch.equal(windowed.coef, build([0.0, 0.7, 0.7, 0.0, 0.0]).coef)
    assert windowed.trainable.tolist() == [False, True, True, False, False]
    assert torch.equal(windowed.coef[3:], build(0.0).coef[3:])
    assert not torch.equal(windowed.coef[3:, :2], build(0.7).coef[3:, :2]), "the mean must change too"
    assert windowed.kind == build(0.7).kind


def test_ddpm_window_is_ddim_outside():
    arguments: dict[str, Any] = dict(alphas_cumprod=_alphas_cumprod().tolist(), timesteps=[801, 401, 1], stride=400)
    windowed = schedules.ddpm(**arguments).window(0, 1)
    assert torch.equal(windowed.coef, schedules.ddim(**arguments, eta=[1.0, 0.0, 0.0]).coef)


def test_final_alpha_of_1_makes_the_last_step_deterministic():
    alphas, timesteps = _alphas_cumprod().tolist(), range(901, 0, -100)
    schedule = schedules.ddim(alphas, list(timesteps), stride=100, eta=1.0, final_alpha_cumprod=1.0)
    assert schedule.trainable.tolist() == [True] * 9 + [False]


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_with_noise_ddim_ends_at_the_first_training_level(set_alpha_to_one: bool, eta: float):
    """As in ddpo-pytorch and TRL; the rows are Song et al.'s eq. 12 and 16 with alpha_bar[0] after the last step."""
    scheduler = diffusers.DDIMScheduler(**{**SD15, "set_alpha_to_one": set_alpha_to_one})
    schedule = Schedule.from_diffusers(scheduler, 10, eta=eta)
    assert schedule.trainable.all()
    alphas, steps = _alphas_cumprod(), np.arange(901, 0, -100)
    now, after = alphas[steps], np.append(alphas[steps[1:]], alphas[0])
    std = eta * np.sqrt((1 - after) / (1 - now) * (1 - now / after))
    sample = np.sqrt(after / now)
    output = np.sqrt(1 - after - std**2) - np.sqrt((1 - now) * after / now)
    np.testing.assert_allclose(schedule.coef, np.stack([sample, output, std], 1), rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize(("set_alpha_to_one", "final"), [(True, 1.0), (False, None)])
def test_without_noise_ddim_ends_where_diffusers_does(set_alpha_to_one: bool, final: float | None, latents):
    scheduler: Any = diffusers.DDIMScheduler(**{**SD15, "set_alpha_to_one": set_alpha_to_one})
    schedule = Schedule.from_diffusers(scheduler, 10, eta=0.0)
    alphas, timesteps = _alphas_cumprod().tolist(), range(901, 0, -100)
    by_hand = schedules.ddim(alphas, list(timesteps), stride=100, eta=0.0, final_alpha_cumprod=final)
    torch.testing.assert_close(schedule.coef, by_hand.coef, rtol=3e-5, atol=1e-6)
    scheduler.set_timesteps(10)
    sample, output, noise = latents
    theirs = scheduler.step(output, int(scheduler.timesteps[-1]), sample, eta=0.0).prev_sample
    _close(_apply(schedule, 9, sample, output, noise), theirs)


def test_to_moves_every_table():
    schedule = schedules.flow_sde([1.0, 0.5, 0.0], noise_level=0.7).to("meta")
    tables = (schedule.timesteps, schedule.coef, schedule.x0_coef, schedule.log_snr, schedule.ode_coef)
    assert all(table is not None and table.device.type == "meta" for table in tables)


def _from(scheduler: Any, **options: Any) -> Schedule:
    return Schedule.from_diffusers(scheduler, 10, **options)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: _from(diffusers.DDIMScheduler(**{**SD15, "clip_sample": True})), "clip_sample is True"),
        (lambda: _from(diffusers.DDIMScheduler(**SD15, thresholding=True)), "thresholding is True"),
        (lambda: _from(diffusers.DDIMScheduler(**{**SD15, "prediction_type": "score"})), "not 'score'"),
        (lambda: _from(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)), "mu is None"),
        (lambda: _from(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)), "sigmas must fall"),
        (lambda: _from(diffusers.FlowMatchEulerDiscreteScheduler(), kind="ddim"), "got 'ddim'"),
        (
            lambda: _from(diffusers.FlowMatchEulerDiscreteScheduler(), eta=1.0),
            "flow_sde takes sampler.noise_level, got sampler.eta = 1.0",
        ),
        (
            lambda: _from(diffusers.DDIMScheduler(**SD15), noise_level=0.7),
            "ddim takes sampler.eta, got sampler.noise_level = 0.7",
        ),
        (lambda: _from(diffusers.EDMEulerScheduler()), "not EDMEulerScheduler"),
        (lambda: _from(diffusers.LCMScheduler()), "not LCMScheduler"),
        (lambda: _from(diffusers.DDPMScheduler()), "clip_sample is True"),
        (lambda: _from(diffusers.DPMSolverMultistepScheduler(thresholding=True)), "thresholding is True"),
        (lambda: _from(diffusers.DDIMScheduler(**SD15), kind="euler"), "for DDIMScheduler, got 'euler'"),
        (
            lambda: _from(diffusers.EulerDiscreteScheduler(), kind="euler", eta=1.0),
            "euler takes no noise, got sampler.eta = 1.0",
        ),
        (lambda: Schedule.from_diffusers(diffusers.DDIMScheduler(**SD15), 1001), "1..1000"),
        (lambda: schedules.ddim([0.9, 0.5], [2], stride=1, eta=1.0), "0..1"),
        (lambda: schedules.ddim([0.9, 0.0], [1], stride=1, eta=1.0), "step 0 has no finite mean"),
        (lambda: schedules.ddim([0.9, 0.5], [1], stride=1, eta=3.0), "eta <= 1"),
        (lambda: schedules.flow_sde([1.0, 0.5, 0.0], noise_level=[0.7]), "one for each of 2 steps"),
        (lambda: schedules.flow_sde([1.0, 0.5, 0.0], noise_level=-1.0), "not negative"),
        (lambda: schedules.flow_cps([1.0, 0.5, 0.0], eta=1.5), "0.7 to 0.8"),
        (lambda: schedules.flow_ode([1.0, 0.5, 0.0]).window(1, 3), r"\[1, 3\)"),
    ],
)
def test_errors_name_the_rule_and_the_value(call, says):
    with pytest.raises(ValueError, match=says):
        call()
