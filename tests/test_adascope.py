"""The interval rule against worked answers and its invariances; the curves; the selector on made-up trajectories."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adascope_fast import schedules
from adascope_fast.adascope import (
    AdaScope,
    IntervalRule,
    select_interval,
    theoretical_correlation,
    theoretical_cross_correlation,
)
from adascope_fast.schedules import Schedule
from adascope_fast.sensing import latent_curves
from adascope_fast.trajectory import Trajectory

VECTORS = json.loads((Path(__file__).parent / "data" / "vectors.json").read_text())
SELECTION = VECTORS["selection"]
NUM_STATES = SELECTION["T"] + 1


def _known_curves(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(F, G) of a case; some rows are given by the name of another case's curve."""
    nominal, slow = SELECTION["cases"][:2]
    i = np.arange(NUM_STATES, dtype=np.float64)
    with_nan = np.array(nominal["F"][0])
    with_nan[7] = np.nan
    named = {
        "F": {
            "nominal with NaN at 7": with_nan,
            "curve 'nominal' with NaN at index 7": with_nan,
            "slow structure": slow["F"][0],
        },
        "G": {
            "nominal": nominal["G"][0],
            "fast reward": slow["G"][0],
            "20-0.01 i": 20 - 0.01 * i,
            "18.5+0.05 i": 18.5 + 0.05 * i,
        },
    }
    rows = {key: [case[key]] if isinstance(case[key], str) else case[key] for key in ("F", "G")}
    curves = {key: [named[key][row] if isinstance(row, str) else row for row in rows[key]] for key in rows}
    return np.array(curves["F"]), np.array(curves["G"])


@pytest.mark.parametrize("case", SELECTION["cases"], ids=lambda case: case["name"].replace(" ", "-"))
def test_known_intervals(case):
    structure, preference = _known_curves(case)
    want = (case["out"]["start"], case["out"]["end"], case["out"]["reason"])
    assert select_interval(torch.tensor(structure), torch.tensor(preference)) == want
    defaults = SELECTION["defaults"]
    assert select_interval(torch.tensor(structure), torch.tensor(preference), **defaults) == want
    if "literal" in case:
        assert select_interval(structure, preference, rule="literal")[:2] == tuple(case["literal"])  # type: ignore


def _curves(rng: np.random.Generator, p: int = 2, t: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Structure that settles and preference that saturates, both noisy."""
    i = np.arange(t + 1)
    decay, gain = rng.uniform(0.02, 0.10, (p, 1)) * t, rng.uniform(0.05, 0.4, (p, 1)) * t
    structure = 0.2 + 0.05 * np.exp(-i / decay) * (-1.0) ** i + rng.normal(0, 1e-3, (p, t + 1))
    return torch.tensor(structure), torch.tensor(1 - np.exp(-i / gain) + rng.normal(0, 1e-2, (p, t + 1)))


SEEDS = st.integers(0, 10**6)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(4, 60), st.sampled_from(["knee", "literal", "fixed"]), st.booleans())
def test_intervals_stay_inside_their_bounds(seed, p, t, rule, wild):
    rng = np.random.default_rng(seed)
    structure, preference = _curves(rng, p, t)
    if wild:
        structure, preference = torch.tensor(rng.normal(size=(2, p, t + 1))).unbind(0)
    shares = (
        dict(zip(("start_hi", "end_hi", "min_frac", "max_frac"), rng.uniform(0, 1, 4), strict=True)) if wild else {}
    )
    start, end, _ = select_interval(structure, preference, rule=rule, **shares)
    assert 0 <= start < end <= t
    if rule == "knee" and not wild and t >= 20:
        assert end - start >= int(0.2 * t + 0.5) or start == 0
        assert end - start <= int(0.8 * t + 0.5)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(["knee", "literal"]))
def test_the_order_of_the_samples_does_not_matter(seed, rule):
    rng = np.random.default_rng(seed)
    structure, preference = _curves(rng, 5)
    order = rng.permutation(5)
    assert select_interval(structure, preference, rule=rule) == select_interval(
        structure[order], preference[order], rule=rule
    )


def test_sums_do_not_depend_on_the_order_of_the_samples():
    """1e16 + c - 1e16 is c rounded to 0 or 2, 1e16 - 1e16 + c is c."""
    structure, preference = _curves(np.random.default_rng(0), 3)
    preference = 2 * preference[:1] + torch.tensor([[1e16], [-1e16], [0.0]], dtype=torch.float64)
    one, two = (select_interval(structure, preference[rows]) for rows in ([0, 1, 2], [0, 2, 1]))
    assert one == two


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.floats(0.1, 10), st.floats(-5, 5), st.floats(0.1, 10), st.floats(-5, 5))
def test_rescaling_the_scores_does_not_matter(seed, a, b, c, d):
    structure, preference = _curves(np.random.default_rng(seed))
    for rule in ("knee", "literal"):
        assert select_interval(structure, preference, rule=rule) == select_interval(
            a * structure + b, c * preference + d, rule=rule
        )


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.floats(0.0, 0.5), st.floats(0.0, 0.5))
def test_a_larger_phi_e_never_ends_later(seed, one, other):
    structure, preference = _curves(np.random.default_rng(seed))
    early = select_interval(structure, preference, phi_e=max(one, other))
    late = select_interval(structure, preference, phi_e=min(one, other))
    assert early.start == late.start
    assert early.end <= late.end


def test_more_samples_that_are_not_finite_change_nothing():
    structure, preference = _curves(np.random.default_rng(0), 3)
    bad = torch.full((1, 51), torch.nan)
    want = select_interval(structure, preference)
    assert select_interval(torch.cat([structure, bad]), torch.cat([preference, preference[:1]])) == want
    assert select_interval(torch.cat([structure, structure[:1]]), torch.cat([preference, bad / 0])) == want


def test_volatility_takes_the_place_of_second_differences():
    """q falls from 1 to 0.01 at step 5; smoothed over 3 it is below 0.01 + 0.25 (q_p - 0.01) from step 6 on."""
    volatility, preference = torch.full((2, 50), 0.01), torch.linspace(0, 1, 51).clamp(max=0.6).expand(2, 51)
    volatility[:, :5] = 1
    # gain from state 6 (0.12) to 0.6; 90 % of it is reached at 0.552, state 28 (0.56), which smoothing leaves at 28
    assert select_interval(None, preference, volatility=volatility) == (6, 28, "ok")
    assert select_interval(None, preference, volatility=volatility, rule="literal") == (5, 6, "ok")
    preference = preference.clone()
    preference[1] = torch.nan
    assert select_interval(None, preference, volatility=volatility) == (6, 28, "ok")


@pytest.mark.parametrize(
    ("volatility", "preference", "want"),
    [
        (torch.ones(1, 50), torch.linspace(0, 1, 51), (5, 32, "fallback:no_start")),
        (torch.linspace(1, 0.6, 50), torch.linspace(0, 1, 51), (5, 32, "fallback:no_start")),
        # the later half of q is 12 times 0.3 and 13 times 0: its median is 0, and 0.3 is above a quarter of the peak
        ((torch.arange(50) < 5) * 0.7 + (torch.arange(50) < 36) * 0.3, torch.arange(51), (5, 32, "fallback:no_start")),
        ((torch.arange(50) - 5).abs() < 3, torch.arange(51) > 10, (9, 19, "ok")),  # calm before the peak at 3..7
        (torch.arange(50) < 5, torch.linspace(1, 0, 51), (6, 32, "fallback:no_gain")),
        (torch.arange(50) < 5, torch.ones(51), (6, 32, "fallback:no_gain")),
        (torch.arange(50) < 5, torch.arange(51) > 48, (6, 45, "clamped:no_end")),
        (torch.arange(50) < 2, torch.arange(51) > 48, (3, 43, "clamped:no_end")),  # no longer than 40 steps
        (torch.arange(50) < 8, torch.arange(51) >= 47, (9, 45, "clamped:max_end")),
        (torch.arange(50) < 5, torch.arange(51) > 7, (6, 16, "ok")),  # no shorter than 10 steps
    ],
)
def test_degenerate_curves_have_reasons(volatility, preference, want):
    got = select_interval(None, preference.float().view(1, 51), volatility=volatility.float().view(1, 50))
    assert got == want


def test_short_and_fixed_and_other_grids():
    structure, preference = _curves(np.random.default_rng(0))
    assert select_interval(structure[:, :4], preference[:, :4]) == (0, 3, "fallback:short")
    assert select_interval(structure[:, :5], preference[:, :5])[2] != "fallback:short"
    assert select_interval(structure, preference, rule="fixed") == (5, 32, "fixed")
    assert select_interval(structure, preference, rule="fixed", fallback=(0.2, 0.5)) == (10, 25, "fixed")
    with pytest.raises(ValueError, match="'knees'"):
        select_interval(structure, preference, rule="knees")  # type: ignore
    with pytest.raises(ValueError, match="odd"):
        select_interval(structure, preference, smooth_g=4)


def test_the_fallback_is_placed_by_signal_to_noise():
    nan = torch.full((1, 51), torch.nan)
    alphas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0)
    sd15 = schedules.ddim(alphas, list(range(981, 0, -20)), stride=20, eta=1.0)
    assert select_interval(nan, nan, log_snr=sd15.log_snr) == (5, 32, "fallback:nonfinite")
    # SD3.5's sigmas with shift 3 and 10 steps: those in (0.489, 0.884] are steps 3..6
    sigmas = [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0]
    log_snr = schedules.flow_sde(sigmas, noise_level=0.7).log_snr
    assert select_interval(nan[:, :11], nan[:, :11], log_snr=log_snr) == (3, 7, "fallback:nonfinite")
    assert select_interval(nan[:, :11], nan[:, :11], log_snr=log_snr, fallback=(0.1, 0.64))[:2] == (1, 6)


@pytest.mark.parametrize(
    "known", VECTORS["theorem2"], ids=lambda known: f"{known['alpha_bar_t']}-{known['i']}{known['j']}"
)
def test_theorem_2(known):
    t, s, sigma = known["alpha_bar_t"], known["alpha_bar_t_plus_tau"], torch.tensor(known["Sigma"], dtype=torch.float64)
    cross = theoretical_cross_correlation(t, s, sigma)
    assert cross[known["i"], known["j"]].item() == pytest.approx(known["corr"], rel=1e-12)
    torch.testing.assert_close(theoretical_correlation(t, s, sigma.diagonal()), cross.diagonal(), rtol=1e-12, atol=0)
    assert torch.equal(theoretical_correlation(s, t, 2.0), theoretical_correlation(t, s, 2.0))


def test_theorem_2_along_sd15_and_rectified_flow():
    profile = VECTORS["lemma1_profile_sd15_50"]["rows"]
    alphas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0)
    for variance in (0.5, 1.0, 2.0):
        for row in profile:
            got = 1 - theoretical_correlation(alphas[row["t"]], alphas[row["t_next"]], variance)
            assert got.item() == pytest.approx(row[f"one_minus_corr_s{variance}"], rel=1e-11)
    steps = alphas[list(range(981, 0, -20))]
    assert (theoretical_correlation(steps[1:], steps[:-1], 1.0).diff() > 0).all(), "Lemma 1"
    for row in VECTORS["rf_correlation"]:  # Flow-SDE with a = sqrt 2 has Theorem 2's law at equal SNR
        clean, noisy = (((1 - t) / t) ** 2 for t in (row["t"], row["t_noisier"]))
        got = theoretical_correlation(clean / (1 + clean), noisy / (1 + noisy), row["s"])
        assert got.item() == pytest.approx(row["flow_sde_a_sqrt2"], rel=1e-12)


def _trajectory(x0: torch.Tensor, prompts: list[str], schedule: Schedule | None = None) -> Trajectory:
    """x0 [b, t+1, d]: the guesses and, at the end, the final latent."""
    b, t = x0.shape[0], x0.shape[1] - 1
    latents = torch.cat([torch.randn(b, t, *x0.shape[2:]), x0[:, -1:]], 1)
    schedule = schedule or schedules.dance_sde(torch.linspace(1, 0, t + 1), eta=0.3)
    index = torch.zeros(b, dtype=torch.int64)
    return Trajectory(latents, x0[:, :-1], torch.zeros(b, t), schedule, prompts, index)


def _settling(b: int, t: int, settles: int, seed: int = 0, decay: float = 0.1) -> torch.Tensor:
    """Guesses [b, t+1, 3, 40] that wander for `settles` steps and then approach the final latent."""
    generator = torch.Generator().manual_seed(seed)
    final, other = torch.randn(2, b, 1, 3, 40, generator=generator).unbind(0)
    noise = torch.randn(b, t + 1, 3, 40, generator=generator)
    i = torch.arange(t + 1).view(1, -1, 1, 1)
    return final + torch.exp(-i * decay) * other + torch.where(i < settles, 1.0, 0.02) * noise * (i < t)


@pytest.mark.parametrize("steps_per_chunk", [1, 4, 100])
def test_latent_curves_are_pearson_correlations(steps_per_chunk):
    trajectory = _trajectory(_settling(3, 9, 3), list("abc"))
    structure, preference = latent_curves(trajectory, steps_per_chunk=steps_per_chunk)
    assert structure.shape == (3, 9)
    assert preference.shape == (3, 10)
    states = torch.cat([trajectory.x0, trajectory.latents[:, -1:]], 1).flatten(2).double().numpy()
    for b in range(3):
        pearson = np.corrcoef(states[b])
        np.testing.assert_allclose(structure[b], 1 - pearson.diagonal(1), atol=1e-6)
        np.testing.assert_allclose(preference[b], pearson[:, -1], atol=1e-6)
    assert (preference[:, -1] == 1).all()


def test_latent_curves_are_nan_where_degenerate():
    x0 = _settling(2, 6, 2)
    x0[0, 3] = 1.0
    structure, preference = latent_curves(_trajectory(x0, ["a", "b"]))
    assert structure[0].isnan().tolist() == [False, False, True, True, False, False]
    assert preference[0].isnan().tolist() == [False, False, False, True, False, False, False]
    assert structure[1].isfinite().all()


def _two_prompts() -> tuple[torch.Tensor, list[str]]:
    early, late = _settling(4, 40, 3, seed=1, decay=0.25), _settling(4, 40, 8, seed=2, decay=0.1)
    return torch.stack([early, late], 1).flatten(0, 1), ["early", "late"] * 4


def test_each_prompt_has_its_own_interval():
    x0, prompts = _two_prompts()
    selector = AdaScope()
    keep = selector(_trajectory(x0, prompts), 0)
    told = selector.telemetry()
    assert told["prompts"] == ["early", "late"]
    assert told["reasons"] == {"ok": 2}
    (early_start, early_end), (late_start, late_end) = told["intervals"]
    assert 2 <= early_start <= 4 < 7 <= late_start <= 9
    assert early_end < late_end
    for b, prompt in enumerate(prompts):
        start, end = told["intervals"][told["prompts"].index(prompt)]
        assert keep[b].nonzero()[:, 0].tolist() == list(range(start, end))
    assert told["mean_start"] == (early_start + late_start) / 2
    assert told["mean_end"] == (early_end + late_end) / 2
    assert told["fraction"] == pytest.approx(keep.double().mean().item())
    assert json.loads(json.dumps(told)) == told
    structure, preference = latent_curves(_trajectory(x0, prompts))
    want = select_interval(None, preference[::2], volatility=structure[::2])
    assert want[:2] == (early_start, early_end)


def test_pooling():
    x0, prompts = _two_prompts()
    batch, sample = AdaScope(pooling="batch"), AdaScope(pooling="sample")
    assert (batch(_trajectory(x0, prompts), 0) == batch(_trajectory(x0, prompts), 0)[:1]).all()
    assert len(batch.telemetry()["intervals"]) == 1
    keep = sample(_trajectory(x0, prompts), 0)
    assert sample.telemetry()["prompts"] == prompts
    alone = AdaScope()(_trajectory(x0[5:6], ["late"]), 0)
    assert torch.equal(keep[5:6], alone)
    with pytest.raises(ValueError, match="'group'"):
        AdaScope(pooling="group")  # type: ignore


@settings(max_examples=10, deadline=None)
@given(SEEDS, st.sampled_from(["prompt", "sample", "batch"]))
def test_permuting_the_batch_permutes_what_is_kept(seed, pooling):
    x0, prompts = _two_prompts()
    order = np.random.default_rng(seed).permutation(8)
    shuffled = AdaScope(pooling=pooling)(_trajectory(x0[order], [prompts[i] for i in order]), 0)
    assert torch.equal(shuffled, AdaScope(pooling=pooling)(_trajectory(x0, prompts), 0)[order])


def test_nan_in_one_prompt_never_moves_another():
    x0, prompts = _two_prompts()
    clean = AdaScope()(_trajectory(x0, prompts), 0)
    x0[0::2, 5] = torch.nan
    selector = AdaScope()
    keep = selector(_trajectory(x0, prompts), 0)
    assert torch.equal(keep[1::2], clean[1::2])
    assert selector.telemetry()["reasons"] == {"fallback:nonfinite": 1, "ok": 1}
    assert selector.telemetry()["intervals"][0] == [5, 21]  # steps with t = 1 - i / 40 in (0.489, 0.884]


def _interval(selector: AdaScope, x0: torch.Tensor) -> list[int]:
    selector(_trajectory(x0, ["a"] * len(x0)), 0)
    return selector.telemetry()["intervals"][0]


def test_a_fallback_takes_the_moving_average_of_its_prompt():
    early, late = _settling(4, 40, 3, decay=0.25), _settling(4, 40, 8, decay=0.1)
    selector, restored = AdaScope(), AdaScope()
    first, second = np.array(_interval(selector, early)), np.array(_interval(selector, late))
    assert min(abs(first - second)) > 2
    average = 0.7 * first + 0.3 * second
    np.testing.assert_allclose(selector.state_dict()["memory"]["a"], average / 40, rtol=1e-12)
    restored.load_state_dict(json.loads(json.dumps(selector.state_dict())))
    for remembers in (selector, restored):
        assert _interval(remembers, torch.full_like(late, torch.nan)) == np.floor(average + 0.5).tolist()
        assert remembers.telemetry()["reasons"] == {"fallback:nonfinite:memory": 1}
        np.testing.assert_allclose(remembers.state_dict()["memory"]["a"], average / 40, rtol=1e-12)


@pytest.mark.parametrize(("away", "moves"), [(0.7, False), (-0.9, False), (1.2, True)])
def test_an_interval_within_a_step_of_its_average_does_not_move(away, moves):
    x0 = _settling(4, 40, 3, decay=0.25)
    selector = AdaScope()
    start, end = _interval(selector, x0)
    selector.load_state_dict({"memory": {"a": [(start + away) / 40, end / 40]}})
    assert _interval(selector, x0) == [start if moves else start + round(away), end]


def test_fixed_and_short_and_deterministic_steps():
    x0 = _settling(2, 20, 3)
    windowed = schedules.dance_sde(torch.linspace(1, 0, 21), eta=0.3).window(8, 20)
    selector = AdaScope(rule="fixed", fallback=(0.2, 0.5))
    keep = selector(_trajectory(x0, ["a", "b"], windowed), 0)
    assert [row.nonzero()[:, 0].tolist() for row in keep] == [[8, 9]] * 2, "steps 4..7 have no log_prob"
    assert selector.telemetry()["intervals"] == [[4, 10]] * 2
    assert selector.telemetry()["fraction"] == 0.1
    assert selector.state_dict() == {"memory": {}}
    short = AdaScope()
    assert short(_trajectory(x0[:, -4:], ["a", "b"]), 0).all()
    assert short.telemetry()["reasons"] == {"fallback:short": 2}
    with pytest.raises(ValueError, match="deterministic"):
        AdaScope(rule="fixed", fallback=(0.0, 0.3))(_trajectory(x0, ["a", "b"], windowed), 0)


def test_the_previous_rollouts_decide_where_they_are_asked_to():
    first, second = _settling(4, 40, 3, decay=0.25), _settling(4, 40, 8, decay=0.1)
    current, previous = AdaScope(), AdaScope(mask_source="previous")
    a, b = _trajectory(first, ["x", "x", "y", "y"]), _trajectory(second, ["y", "y", "z", "z"])
    assert previous.ahead(a.prompts, a.schedule, 0) is not None
    assert current.ahead(a.prompts, a.schedule, 0) is None
    guess = previous(a, 0)
    assert previous.telemetry()["intervals"] == [list(IntervalRule()._fallback(40, a.schedule.log_snr))] * 2
    current(a, 0)
    want = dict(zip(*(current.telemetry()[key] for key in ("prompts", "intervals")), strict=True))
    ahead = previous.ahead(b.prompts, b.schedule, 1)
    assert ahead is not None
    assert torch.equal(previous(b, 1), ahead), "the same before and after the rollout"
    told = dict(zip(*(previous.telemetry()[key] for key in ("prompts", "intervals")), strict=True))
    assert told["y"] == want["y"], "a prompt seen before: its own interval"
    mean = [sum(interval[i] for interval in want.values()) / 2 for i in (0, 1)]
    assert told["z"] == pytest.approx(mean, abs=0.5), "a new prompt: the mean of all so far"
    assert guess.shape == ahead.shape
    again = AdaScope(mask_source="previous")
    again.load_state_dict(previous.state_dict())
    assert torch.equal(again.ahead(["z", "q"], b.schedule, 2), previous.ahead(["z", "q"], b.schedule, 2))
