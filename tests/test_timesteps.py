"""What the baseline selectors keep, iteration by iteration."""

import json
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adascope_fast import schedules
from adascope_fast.schedules import Schedule
from adascope_fast.timesteps import (
    Complement,
    EveryStep,
    FastWindow,
    RandomFraction,
    StaticRange,
    TimestepSelector,
    Window,
)
from adascope_fast.trajectory import Trajectory


def _schedule(num_steps: int) -> Schedule:
    """Every step but the last is trainable, as with a final sigma of 0 under Flow-CPS."""
    return schedules.flow_cps(torch.linspace(1, 0, num_steps + 1), eta=0.7)


def _trajectory(b: int, t: int, schedule: Schedule | None = None) -> Trajectory:
    latents, index = torch.zeros(b, t + 1, 2), torch.zeros(b, dtype=torch.int64)
    return Trajectory(latents, latents[:, 1:], torch.zeros(b, t), schedule or _schedule(t), ["a"] * b, index)


def _steps(selector: TimestepSelector, iteration: int, t: int, schedule: Schedule | None = None) -> list[int]:
    keep = selector(_trajectory(3, t, schedule), iteration)
    assert keep.dtype == torch.bool
    assert torch.equal(keep, keep[:1].expand(3, t)), "the same steps for the whole batch"
    return keep[0].nonzero()[:, 0].tolist()


def _all_trainable(t: int) -> Schedule:
    return schedules.dance_sde(torch.linspace(1, 0, t + 1), eta=0.3)


def test_every_step_keeps_all_that_have_a_log_prob():
    assert _steps(EveryStep(), 0, 6) == [0, 1, 2, 3, 4]
    assert _steps(EveryStep(), 7, 6, _all_trainable(6)) == [0, 1, 2, 3, 4, 5]
    windowed = _all_trainable(6).window(2, 4)
    assert _steps(EveryStep(), 0, 6, windowed) == [2, 3]


def test_static_range_is_half_open_and_drops_deterministic_steps():
    selector = StaticRange(2, 6)
    assert _steps(selector, 3, 6) == [2, 3, 4]
    assert selector.telemetry() == {"start": 2, "end": 6, "fraction": 0.5}


def test_random_fraction_keeps_as_many_steps_of_each_sample():
    selector = RandomFraction(0.5, seed=3)
    keep = selector(_trajectory(200, 10), 4)
    assert keep.sum(1).tolist() == [5] * 200
    assert not keep[:, -1].any(), "the last step is deterministic"
    assert len(set(map(tuple, keep.tolist()))) > 20, "each sample has its own steps"
    counts = keep.sum(0)[:9].double()  # 200 draws of 5 of 9: 111 each, standard deviation 7
    assert (counts - 200 * 5 / 9).abs().max() < 5 * 7
    assert torch.equal(keep, RandomFraction(0.5, seed=3)(_trajectory(200, 10), 4))
    assert not torch.equal(keep, selector(_trajectory(200, 10), 5))
    assert not torch.equal(keep, RandomFraction(0.5, seed=4)(_trajectory(200, 10), 4))
    assert selector.telemetry() == {"fraction": 0.5}


@pytest.mark.parametrize(("fraction", "kept"), [(0.99, 9), (1.0, 9), (0.58, 5), (0.01, 1)])
def test_random_fraction_rounds_down_to_no_less_than_one_step(fraction, kept):
    assert RandomFraction(fraction)(_trajectory(2, 10), 0).sum(1).tolist() == [kept] * 2


def test_window_moves_every_period_and_rolls_back():
    selector = Window(size=3, period=2, shift=2)
    got = [selector.interval(7, iteration) for iteration in range(10)]
    once = [(0, 3), (2, 5), (4, 7), (6, 7)]
    assert got == [interval for interval in [*once, once[0]] for _ in range(2)]
    assert _steps(selector, 2, 7) == [2, 3, 4]
    assert selector.telemetry()["start"] == 2


def test_window_clamps_to_the_last_full_window():
    selector = Window(size=3, period=1, shift=2, start=1, limit=6, at_limit="clamp")
    assert [selector.interval(9, iteration) for iteration in range(5)] == [(1, 4), (3, 6), (3, 6), (3, 6), (3, 6)]


def test_random_windows_are_full_and_uniform():
    selector = Window(size=3, period=2, order="random", start=1, limit=8, seed=5)
    got = [selector.interval(10, iteration) for iteration in range(1200)]
    assert got[::2] == got[1::2], "one window a period"
    counts = Counter(got)
    assert set(counts) == {(start, start + 3) for start in range(1, 6)}
    assert min(counts.values()) > 150, "240 expected"


def test_fast_window_is_uniform_and_the_same_for_the_batch():
    selector = FastWindow(size=2, low=1, high=5, seed=1)
    got = [selector.interval(10, iteration) for iteration in range(900)]
    counts = Counter(got)
    assert set(counts) == {(1, 3), (2, 4), (3, 5)}
    assert min(counts.values()) > 220, "300 expected"
    assert got == [FastWindow(2, 1, 5, seed=1).interval(10, iteration) for iteration in range(900)]
    assert got != [FastWindow(2, 1, 5, seed=2).interval(10, iteration) for iteration in range(900)]
    start, end = selector.interval(10, 3)
    assert _steps(selector, 3, 10) == list(range(start, end))


def test_the_complement_keeps_what_the_other_leaves_out():
    selector = Complement(StaticRange(2, 4))
    assert _steps(selector, 0, 7) == [0, 1, 4, 5], "the last step is deterministic"
    ahead = selector.ahead(["a", "b"], _schedule(7), 0)
    assert ahead is not None
    assert ahead.tolist() == [[True, True, False, False, True, True, False]] * 2
    telemetry = selector.telemetry()
    assert (telemetry["start"], telemetry["end"], telemetry["is_complement"]) == (2, 4, True)
    assert telemetry["fraction"] == pytest.approx(4 / 7)


def test_the_complement_of_every_step_is_refused():
    with pytest.raises(ValueError, match="EveryStep leaves out, and it leaves out no step"):
        Complement(EveryStep())(_trajectory(2, 6), 0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_windows_stay_inside_their_bounds(data):
    t = data.draw(st.integers(1, 30))
    limit = data.draw(st.integers(1, t))
    start = data.draw(st.integers(0, limit - 1))
    options: dict[str, Any] = dict(
        size=data.draw(st.integers(1, 8)),
        period=data.draw(st.integers(1, 5)),
        shift=data.draw(st.integers(1, 9)),
        order=data.draw(st.sampled_from(["progressive", "random"])),
        at_limit=data.draw(st.sampled_from(["roll_back", "clamp"])),
    )
    first, last = Window(start=start, limit=limit, **options).interval(t, data.draw(st.integers(0, 10**6)))
    assert start <= first < last <= limit
    assert last - first <= options["size"]


SELECTORS = [EveryStep(), StaticRange(0, 4), RandomFraction(0.5), Window(), FastWindow(2, 0, 4)]
SELECTORS += [Complement(StaticRange(0, 4))]


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: type(selector).__name__)
def test_nothing_is_kept_of_a_deterministic_sampler(selector):
    with pytest.raises(ValueError, match="deterministic"):
        selector(_trajectory(2, 6, schedules.flow_ode(torch.linspace(1, 0, 7))), 0)


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: type(selector).__name__)
def test_telemetry_and_state_are_json(selector):
    selector(_trajectory(2, 6), 0)
    assert json.loads(json.dumps(selector.telemetry())) == selector.telemetry() != {}
    selector.load_state_dict(json.loads(json.dumps(selector.state_dict())))
    with pytest.raises(ValueError, match="memory"):
        selector.load_state_dict({"memory": {}})


@pytest.mark.parametrize(
    ("selector", "says"),
    [
        (StaticRange(3, 3), r"\[3, 3\)"),
        (StaticRange(0, 7), "<= 6"),
        (RandomFraction(0.0), r"\(0, 1\]"),
        (Window(limit=9), "<= 6"),
        (Window(shift=0), "at least 1"),
        (FastWindow(5, 0, 4), "does not fit"),
    ],
)
def test_errors_name_the_rule_and_the_value(selector, says):
    with pytest.raises(ValueError, match=says):
        selector(_trajectory(2, 6), 0)
