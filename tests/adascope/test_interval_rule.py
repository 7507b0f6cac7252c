"""The interval rules against worked answers, and what must hold on any curves: bounds, invariances, isolation."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adascope_fast.adascope.interval_rule import Scale, select_interval
from adascope_fast.adascope.settings import BOUNDED, Rule
from adascope_fast.schedules import samplers as schedules

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())
SELECTION: dict[str, Any] = VECTORS["selection"]
RULES = get_args(Rule)
NAMES = {
    "kappa_s": "kappa",
    "persist": "persistence",
    "phi_e": "phi_end",
    "smooth_s": "smoothing_structure",
    "smooth_g": "smoothing_preference",
    "start_lo": "earliest_start",
    "start_hi": "latest_start",
    "end_hi": "latest_end",
    "min_frac": "min_fraction",
    "max_frac": "max_fraction",
    "range_eps": "smallest_range",
}
"""What the worked answers' parameters are called here."""
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
    given: dict[str, Any] = SELECTION["defaults"]
    defaults = {NAMES.get(name, name): value for name, value in given.items()}
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
SENSED = ("knee", "knee_causal", "literal", "fraction")
_SCALE = Scale(floor=0.004, peak=0.2, gain=1.0)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(1, 60), st.sampled_from(RULES), st.booleans())
@example(seed=8, p=1, t=9, rule="fraction", wild=True)
def test_intervals_stay_inside_their_bounds(seed, p, t, rule, wild):
    rng = np.random.default_rng(seed)
    structure, preference = _curves(rng, p, t)
    if wild:
        structure, preference = torch.tensor(rng.normal(size=(2, p, t + 1))).unbind(0)
    shares: dict[str, Any] = {}
    if wild:
        shares |= dict(zip(("latest_start", "latest_end"), rng.uniform(0, 1, 2).tolist(), strict=True))
        if rule in BOUNDED:
            shares |= dict(zip(("min_fraction", "max_fraction"), sorted(rng.uniform(0, 1, 2).tolist()), strict=True))
    log_snr = torch.linspace(-10, 10, t)
    start, end, _ = select_interval(structure, preference, rule=rule, log_snr=log_snr, scale=_SCALE, **shares)
    assert 0 <= start < end <= t
    if rule == "knee" and not wild and t >= 20:
        assert end - start >= int(0.2 * t + 0.5) or start == 0
        assert end - start <= int(0.8 * t + 0.5)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(SENSED))
def test_the_order_of_the_samples_does_not_matter(seed, rule):
    rng = np.random.default_rng(seed)
    structure, preference = _curves(rng, 5)
    order = rng.permutation(5)
    one = select_interval(structure, preference, rule=rule, scale=_SCALE)
    assert one == select_interval(structure[order], preference[order], rule=rule, scale=_SCALE)


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
    scaled = Scale(a * _SCALE.floor, a * _SCALE.peak, c * _SCALE.gain)
    for rule in SENSED:
        want = select_interval(structure, preference, rule=rule, scale=_SCALE)
        assert select_interval(a * structure + b, c * preference + d, rule=rule, scale=scaled) == want


@settings(max_examples=60, deadline=None)
@given(
    SEEDS,
    st.floats(0.0, 0.5, exclude_min=True),
    st.floats(0.0, 0.5, exclude_min=True),
    st.sampled_from(["knee", "fraction", "knee_causal"]),
)
def test_a_larger_phi_end_never_ends_later(seed, one, other, rule):
    structure, preference = _curves(np.random.default_rng(seed))
    shared = {"rule": rule, "scale": _SCALE}
    early = select_interval(structure, preference, phi_end=max(one, other), **shared)
    late = select_interval(structure, preference, phi_end=min(one, other), **shared)
    assert early.start == late.start
    assert early.end <= late.end


def test_more_samples_that_are_not_finite_change_nothing():
    structure, preference = _curves(np.random.default_rng(0), 3)
    bad = torch.full((1, 51), torch.nan)
    for rule in SENSED:
        shared = {"rule": rule, "scale": _SCALE}
        want = select_interval(structure, preference, **shared)
        assert select_interval(torch.cat([structure, bad]), torch.cat([preference, preference[:1]]), **shared) == want
        more = torch.cat([structure, structure[:1]])
        assert select_interval(more, torch.cat([preference, bad / 0]), **shared) == want


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
    with pytest.raises(ValueError, match="kappa needs another rule"):
        select_interval(structure, preference, rule="literal", kappa=0.5)
    with pytest.raises(ValueError, match="odd"):
        select_interval(structure, preference, smoothing_preference=4)


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


def test_curves_without_structure_fall_back():
    _, preference = _curves(np.random.default_rng(0))
    for rule in ("knee", "literal", "fraction"):
        assert select_interval(torch.full((2, 51), 0.3), preference, rule=rule) == (5, 32, "fallback:constant_f")


def test_fraction_starts_when_most_of_the_structure_is_there():
    structure = torch.arange(51.0).clamp(max=10).expand(2, 51)  # 8 of 10 at state 8
    preference = torch.arange(51.0).clamp(max=30).expand(2, 51)  # from 8 to 30; 2.2 of 22 are left at 27.8
    assert select_interval(structure, preference, rule="fraction") == (8, 28, "ok")
    assert select_interval(-structure, preference, rule="fraction") == (8, 28, "ok"), "a falling similarity too"
    assert select_interval(structure, preference, rule="fraction", formed=0.5)[0] == 5
    late = torch.arange(51.0).expand(2, 51)  # 80 % at state 40, beyond 0.3 t
    assert select_interval(late, preference, rule="fraction") == (5, 32, "fallback:no_start")
    there_and_back = (25 - torch.arange(51.0)).abs().expand(2, 51)
    assert select_interval(there_and_back, preference, rule="fraction") == (5, 32, "fallback:no_start")
    volatility = (torch.arange(50) < 10).float().expand(2, 50)
    assert select_interval(None, preference, volatility=volatility, rule="fraction") == (8, 28, "ok")


def test_schedule_goes_by_the_signal_to_noise_alone():
    nan = torch.full((1, 51), torch.nan)
    log_snr = torch.linspace(-8, 8, 50)
    steps = [i for i, value in enumerate(log_snr.tolist()) if -4.05 <= value < 0.086]
    got = select_interval(nan, nan, rule="schedule", log_snr=log_snr, fallback=(0.5, 0.6))
    assert got == (steps[0], steps[-1] + 1, "schedule")
    assert select_interval(nan, nan, rule="schedule", log_snr=torch.full((50,), 9.0)) == (5, 32, "fallback:no_snr")
    with pytest.raises(ValueError, match="log_snr"):
        select_interval(nan, nan, rule="schedule")


def _causal_case() -> tuple[torch.Tensor, torch.Tensor]:
    """Volatility 0, 1, 1, 1 and then 0.1; preference rises by 1 a step until state 25, then by 0.05."""
    volatility = torch.full((2, 50), 0.1)
    volatility[:, 0], volatility[:, 1:4] = 0, 1
    rise = torch.where(torch.arange(50) < 25, 1.0, 0.05)
    return volatility, torch.cat([torch.zeros(1), rise.cumsum(0)]).expand(2, 51)


def test_the_causal_knee_by_hand():
    """Floor 0.1, peak 1: calm is up to 0.325. Steps 4 and 5 are the first two calm ones after the rise, known at 6.

    Over 4 steps the rise falls to a tenth of its steepest when all but 0.2 / 3.8 of the four are slow: at state 29 it
    is 0.05, at 28 0.2875. State 30 is the second slow one.
    """
    volatility, preference = _causal_case()
    scale = Scale(0.1, 1.0, 25.0)
    got = select_interval(None, preference, volatility=volatility, rule="knee_causal", scale=scale)
    assert got == (6, 30, "ok")
    assert select_interval(None, preference, volatility=volatility, rule="knee_causal") == (5, 32, "fallback:first")
    flat = select_interval(None, preference, volatility=volatility, rule="knee_causal", scale=Scale(0.1, 1.0, 0.0))
    assert flat == (6, 32, "fallback:no_gain")
    higher = select_interval(None, preference, volatility=volatility, rule="knee_causal", scale=Scale(0.1, 9.0, 25.0))
    # Structure never began, judged by the peaks of the past. This is known at 0.3 t: what was not trained stays so.
    assert higher == (15, 32, "fallback:no_start")
    straight = torch.arange(51.0).expand(2, 51)
    late = select_interval(None, straight, volatility=volatility, rule="knee_causal", scale=scale)
    assert late == (6, 45, "clamped:no_end")


@settings(max_examples=80, deadline=None)
@given(SEEDS, st.integers(6, 60), st.booleans())
def test_the_causal_knee_never_looks_ahead(seed, t, is_volatility):
    """With everything after state i replaced, whether step i is trained stays the same, for each i."""
    rng = np.random.default_rng(seed)
    (s, g), (other_s, other_g) = _curves(rng, 3, t), _curves(rng, 3, t)
    if is_volatility:
        s, other_s = (f.diff(dim=1).abs() for f in (s, other_s))
    scale = Scale(0.004, float(rng.uniform(0.01, 0.2)), float(rng.uniform(0.2, 2)))

    def trained(s: torch.Tensor, g: torch.Tensor) -> list[bool]:
        curves = (None, g) if is_volatility else (s, g)
        volatility = s if is_volatility else None
        start, end, _ = select_interval(*curves, rule="knee_causal", scale=scale, volatility=volatility)
        return [start <= i < end for i in range(t)]

    whole = trained(s, g)
    for i in range(t):
        known = i if is_volatility else i + 1  # a step's volatility is known when the step is done
        changed = torch.cat([s[:, :known], other_s[:, known:]], 1), torch.cat([g[:, : i + 1], other_g[:, i + 1 :]], 1)
        assert trained(*changed)[i] == whole[i], i
