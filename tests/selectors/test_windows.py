"""Windows that move: where they are in each iteration, worked by hand, and what the rollout does outside them."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adascope_fast.algorithms.policy_gradient import ddpo
from adascope_fast.engine.engine import Engine, Settings
from adascope_fast.rollout import EncodedPrompts
from adascope_fast.schedules import Schedule
from adascope_fast.schedules import samplers as schedules
from adascope_fast.selectors.protocol import TimestepSelector
from adascope_fast.selectors.simple import StaticRange
from adascope_fast.selectors.windows import FastWindow, Window


def _schedule(num_steps: int) -> Schedule:
    return schedules.dance_sde(torch.linspace(1, 0, num_steps + 1), eta=0.3)


def _begins(selector: Window, t: int, iterations: int) -> list[tuple[int, int]]:
    """(begin, how many iterations in a row) of a selector."""
    runs: list[tuple[int, int]] = []
    for iteration in range(iterations):
        begin, _ = selector.interval(t, iteration)
        if runs and runs[-1][0] == begin:
            runs[-1] = begin, runs[-1][1] + 1
        else:
            runs.append((begin, 1))
    return runs


def test_window_moves_every_period_and_rolls_back():
    selector = Window(size=3, period=2, shift=2)
    got = [selector.interval(7, iteration) for iteration in range(10)]
    once = [(0, 3), (2, 5), (4, 7), (6, 7)]
    assert got == [interval for interval in [*once, once[0]] for _ in range(2)]
    keep = selector.ahead(["a", "b"], _schedule(7), 2)
    assert keep.tolist() == [[False, False, True, True, True, False, False]] * 2
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
    assert selector.ahead(["a", "b"], _schedule(10), 3).nonzero()[:, 1].tolist() == 2 * list(range(start, end))


def test_windows_that_do_not_overlap():
    assert _begins(Window(size=4, period=3, shift=4), 10, 12) == [(0, 3), (4, 3), (8, 3), (0, 3)]


def test_the_linear_decay_of_the_period():
    # int(20 (1 - l / 10) + 4 l / 10): 20, 16.8, 13.6, 10.4, 7.2 at l = 0, 2, 4, 6, 8.
    selector = Window(size=4, period=20, shift=2, decay="linear", min_period=4)
    assert _begins(selector, 10, 66 + 20) == [(0, 20), (2, 16), (4, 13), (6, 10), (8, 7), (0, 20)]
    stays = Window(size=4, period=20, shift=2, decay="linear", min_period=4, at_limit="clamp")
    assert _begins(stays, 10, 200) == [(0, 20), (2, 16), (4, 13), (6, 151)]


def test_the_exponential_decay_of_the_period():
    # MixGRPO's: ceil(25 exp(-0.1 max(0, l - 13))), with T = 25 and windows of 4 moved by 1.
    selector = Window(period=25, decay="exponential")
    assert [selector.period_at(begin, 25) for begin in (0, 13, 14, 18, 23)] == [25, 25, 23, 16, 10]
    faster = Window(size=1, period=8, decay="exponential", decay_rate=0.5, decay_from=1)
    assert _begins(faster, 4, 8 + 8 + 5 + 3 + 8) == [
        (0, 8),
        (1, 8),
        (2, 5),
        (3, 3),
        (0, 8),
    ]  # 8 e^-0.5 = 4.85, 8/e = 2.9


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
    if options["order"] == "progressive":
        options["decay"] = data.draw(st.sampled_from(["none", "linear", "exponential"]))
    first, last = Window(start=start, limit=limit, **options).interval(t, data.draw(st.integers(0, 10**6)))
    assert start <= first < last <= limit
    assert last - first <= options["size"]


SELECTORS = [Window(size=2, period=1, start=1), FastWindow(2, 1, 5, seed=3)]
SELECTORS += [Window(size=2, start=2, order="random", limit=6)]
IDS = ["progressive", "fast", "random"]


@pytest.mark.parametrize("selector", SELECTORS, ids=IDS)
def test_outside_the_window_the_sampler_is_deterministic(selector: Any):
    whole = _schedule(6)
    schedule = selector.sampler(whole, 3)
    start, end = selector.interval(6, 3)
    assert schedule.trainable.nonzero()[:, 0].tolist() == list(range(start, end))
    assert torch.equal(schedule.coef[start:end], whole.coef[start:end])
    ode = schedules.flow_ode(torch.linspace(1, 0, 7)).coef
    assert torch.equal(schedule.coef[end:], ode[end:])
    assert torch.equal(schedule.coef[:start], ode[:start])
    selector.ode_outside = False
    assert selector.sampler(whole, 3) is whole
    selector.ode_outside = True


def _step(make_toy: Callable, selector: TimestepSelector, update: Any = "replay") -> tuple[Tensor, dict, Tensor]:
    toy, prompts, seen = make_toy(torch.float64), ["a", "a", "see"], []
    before = torch.cat([parameter.detach().flatten() for parameter in toy.trainable_parameters()])
    settings = Settings(guidance_scale=1.0, rollout_batch=2, microbatch=4, max_grad_norm=1e9, update=update)
    optimizer = torch.optim.SGD(toy.trainable_parameters(), lr=1.0)

    def score(images: Tensor, texts: list[str]) -> Tensor:
        seen.append(images)
        return images.mean((1, 2, 3))

    schedule = toy.schedule(6, eta=0.3, noise_level=0.7)
    engine = Engine(toy, schedule, ddpo(min_count=2), selector, score, optimizer, settings)
    values = engine.step(EncodedPrompts.of(toy, prompts), prompts, iteration=3, seed=1).values
    after = torch.cat([parameter.detach().flatten() for parameter in toy.trainable_parameters()])
    return torch.cat(seen), values, before - after


@pytest.mark.parametrize("selector", SELECTORS, ids=IDS)
@pytest.mark.parametrize("update", ["replay", "one_pass"])
def test_the_engine_trains_what_the_windowed_sampler_drew(make_toy: Callable, selector: Any, update: str):
    """The same as training a fixed range of a sampler that was windowed by hand."""
    toy_schedule = make_toy().schedule
    start, end = selector.interval(6, 3)
    pictures, values, moved = _step(make_toy, selector, update)
    assert values["pairs_trained"] == 3 * (end - start)

    def windowed(*arguments: Any) -> Any:
        toy = make_toy(*arguments)
        toy.schedule = lambda *args, **kwargs: toy_schedule(*args, **kwargs).window(start, end)
        return toy

    expected, _, moved_by_hand = _step(windowed, StaticRange(start, end), update)
    assert torch.equal(pictures, expected)
    assert torch.equal(moved, moved_by_hand)
    assert moved.norm() > 1e-6
    selector.ode_outside = False
    noisy, _, _ = _step(make_toy, selector, update)
    selector.ode_outside = True
    assert not torch.equal(noisy, pictures)


@pytest.mark.parametrize("selector", SELECTORS, ids=IDS)
def test_telemetry_and_state_are_json(selector: Any):
    selector.ahead(["a"], _schedule(6), 0)
    assert json.loads(json.dumps(selector.telemetry())) == selector.telemetry() != {}
    selector.load_state_dict(json.loads(json.dumps(selector.state_dict())))
    with pytest.raises(ValueError, match="memory"):
        selector.load_state_dict({"memory": {}})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Window(limit=9).interval(6, 0), "<= 6"),
        (lambda: Window(shift=0), "at least 1"),
        (lambda: FastWindow(5, 0, 4).interval(6, 0), "does not fit"),
        (lambda: Window(order="random", decay="linear"), "random window does not decay"),
        (lambda: Window(period=4, min_period=5), r"min_period lies in 1\.\.4"),
        (
            lambda: Window().ahead(["a"], schedules.flow_ode(torch.linspace(1, 0, 7)), 0),
            "every chosen step is deterministic",
        ),
    ],
)
def test_errors_name_the_rule_and_the_value(make: Callable, says: str):
    with pytest.raises(ValueError, match=says):
        make()
