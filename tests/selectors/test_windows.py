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
from adascope_fast.engine.engine import Engine
from adascope_fast.engine.settings import Updates
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
        begin, _ = selector.interval(_schedule(t), iteration)
        if runs and runs[-1][0] == begin:
            runs[-1] = begin, runs[-1][1] + 1
        else:
            runs.append((begin, 1))
    return runs


def test_window_moves_every_period_and_rolls_back():
    selector = Window(window_size=3, shift_every=2, window_shift=2, last_step="train")
    got = [selector.interval(_schedule(7), iteration) for iteration in range(10)]
    once = [(0, 3), (2, 5), (4, 7), (6, 7)]
    assert got == [interval for interval in [*once, once[0]] for _ in range(2)]
    keep = selector.ahead(["a", "b"], _schedule(7), 2)
    assert keep.tolist() == [[False, False, True, True, True, False, False]] * 2
    assert selector.telemetry()["start"] == 2


def test_window_clamps_to_the_last_full_window():
    selector = Window(window_size=3, shift_every=1, window_shift=2, start=1, end=6, at_limit="clamp")
    assert [selector.interval(_schedule(9), iteration) for iteration in range(5)] == [
        (1, 4),
        (3, 6),
        (3, 6),
        (3, 6),
        (3, 6),
    ]


def test_random_windows_are_full_and_uniform():
    selector = Window(window_size=3, shift_every=2, window_order="random", start=1, end=8, seed=5)
    got = [selector.interval(_schedule(10), iteration) for iteration in range(1200)]
    assert got[::2] == got[1::2], "one window a period"
    counts = Counter(got)
    assert set(counts) == {(start, start + 3) for start in range(1, 6)}
    assert min(counts.values()) > 150, "240 expected"


def test_fast_window_is_uniform_and_the_same_for_the_batch():
    selector = FastWindow(window_size=2, start=1, end=5, seed=1)
    got = [selector.interval(_schedule(10), iteration) for iteration in range(900)]
    counts = Counter(got)
    assert set(counts) == {(1, 3), (2, 4), (3, 5)}
    assert min(counts.values()) > 220, "300 expected"
    assert got == [
        FastWindow(window_size=2, start=1, end=5, seed=1).interval(_schedule(10), iteration) for iteration in range(900)
    ]
    assert got != [
        FastWindow(window_size=2, start=1, end=5, seed=2).interval(_schedule(10), iteration) for iteration in range(900)
    ]
    start, end = selector.interval(_schedule(10), 3)
    assert selector.ahead(["a", "b"], _schedule(10), 3).nonzero()[:, 1].tolist() == 2 * list(range(start, end))


def test_windows_that_do_not_overlap():
    assert _begins(Window(window_size=4, shift_every=3, window_shift=4, last_step="train"), 10, 12) == [
        (0, 3),
        (4, 3),
        (8, 3),
        (0, 3),
    ]


def test_the_linear_decay_of_the_period():
    # int(20 (1 - l / 10) + 4 l / 10): 20, 16.8, 13.6, 10.4, 7.2 at l = 0, 2, 4, 6, 8.
    linear: dict[str, Any] = {"shift_decay": "linear", "shift_every_min": 4, "last_step": "train"}
    selector = Window(window_size=4, shift_every=20, window_shift=2, **linear)
    assert _begins(selector, 10, 66 + 20) == [(0, 20), (2, 16), (4, 13), (6, 10), (8, 7), (0, 20)]
    stays = Window(window_size=4, shift_every=20, window_shift=2, at_limit="clamp", **linear)
    assert _begins(stays, 10, 200) == [(0, 20), (2, 16), (4, 13), (6, 151)]


def test_the_exponential_decay_of_the_period():
    # MixGRPO's: ceil(25 exp(-0.1 max(0, l - 13))), with T = 25 and windows of 4 moved by 1.
    selector = Window(shift_every=25, shift_decay="exponential")
    assert [selector.period_at(begin, 25) for begin in (0, 13, 14, 18, 23)] == [25, 25, 23, 16, 10]
    decay: dict[str, Any] = {"shift_decay": "exponential", "decay_rate": 0.5, "decay_from": 1}
    faster = Window(window_size=1, shift_every=8, last_step="train", **decay)
    assert _begins(faster, 4, 8 + 8 + 5 + 3 + 8) == [
        (0, 8),
        (1, 8),
        (2, 5),
        (3, 3),
        (0, 8),
    ]  # 8 e^-0.5 = 4.85, 8/e = 2.9


@pytest.mark.parametrize(("last_step", "of_flow", "of_ddim"), [("auto", 6, 7), ("train", 7, 7), ("skip", 6, 6)])
@pytest.mark.parametrize("at_limit", ["roll_back", "clamp"])
def test_the_last_step_is_out_of_reach_on_flow_samplers_unless_told_otherwise(
    last_step: Any, of_flow: int, of_ddim: int, at_limit: Any
):
    ddim = schedules.ddim(torch.linspace(0.99, 0.05, 8), range(7, 0, -1), stride=1, eta=1.0)
    for schedule, end in ((_schedule(7), of_flow), (ddim, of_ddim)):
        selectors = [
            Window(window_size=2, shift_every=1, at_limit=at_limit, last_step=last_step),
            Window(window_size=2, shift_every=1, window_order="random", last_step=last_step),
            FastWindow(window_size=2, last_step=last_step),
        ]
        for selector in selectors:
            assert max(selector.interval(schedule, iteration)[1] for iteration in range(100)) == end
            keep = torch.stack([selector.ahead(["a"], schedule, iteration)[0] for iteration in range(100)])
            assert keep.any(0).tolist() == [step < end for step in range(7)]
    told = FastWindow(window_size=2, end=7, last_step=last_step)
    assert max(told.interval(_schedule(7), iteration)[1] for iteration in range(100)) == 7, "what is named is kept"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_windows_stay_inside_their_bounds(data):
    t = data.draw(st.integers(1, 30))
    limit = data.draw(st.integers(1, t))
    start = data.draw(st.integers(0, limit - 1))
    options: dict[str, Any] = dict(
        window_size=data.draw(st.integers(1, 8)),
        shift_every=data.draw(st.integers(1, 5)),
        window_order=data.draw(st.sampled_from(["progressive", "random"])),
    )
    if options["window_order"] == "progressive":
        options["window_shift"] = data.draw(st.integers(1, 9))
        options["at_limit"] = data.draw(st.sampled_from(["roll_back", "clamp"]))
        options["shift_decay"] = data.draw(st.sampled_from(["none", "linear", "exponential"]))
    first, last = Window(start=start, end=limit, **options).interval(_schedule(t), data.draw(st.integers(0, 10**6)))
    assert start <= first < last <= limit
    assert last - first <= options["window_size"]


SELECTORS = [Window(window_size=2, shift_every=1, start=1, last_step="train")]
SELECTORS += [FastWindow(window_size=2, start=1, end=5, seed=3)]
SELECTORS += [Window(window_size=2, start=2, window_order="random", end=6)]
IDS = ["progressive", "fast", "random"]


@pytest.mark.parametrize("selector", SELECTORS, ids=IDS)
def test_outside_the_window_the_sampler_is_deterministic(selector: Any):
    whole = _schedule(6)
    schedule = selector.sampler(whole, 3)
    start, end = selector.interval(_schedule(6), 3)
    assert schedule.trainable.nonzero()[:, 0].tolist() == list(range(start, end))
    assert torch.equal(schedule.coef[start:end], whole.coef[start:end])
    ode = schedules.flow_ode(torch.linspace(1, 0, 7)).coef
    assert torch.equal(schedule.coef[end:], ode[end:])
    assert torch.equal(schedule.coef[:start], ode[:start])
    assert selector.model_copy(update={"ode_outside": False}).sampler(whole, 3) is whole


def _step(make_toy: Callable, selector: TimestepSelector, update: Any = "replay") -> tuple[Tensor, dict, Tensor]:
    toy, prompts, seen = make_toy(torch.float64), ["a", "a", "see"], []
    before = torch.cat([parameter.detach().flatten() for parameter in toy.trainable_parameters()])
    settings = Updates(rollout_batch=2, microbatch=4, max_grad_norm=1e9, update=update)
    optimizer = torch.optim.SGD(toy.trainable_parameters(), lr=1.0)

    def score(images: Tensor, texts: list[str]) -> Tensor:
        seen.append(images)
        return images.mean((1, 2, 3))

    schedule = toy.schedule(6)
    engine = Engine(toy, schedule, ddpo(min_count=2), selector, score, optimizer, settings)
    values = engine.step(EncodedPrompts.of(toy, prompts), prompts, iteration=3, seed=1).values
    after = torch.cat([parameter.detach().flatten() for parameter in toy.trainable_parameters()])
    return torch.cat(seen), values, before - after


@pytest.mark.parametrize("selector", SELECTORS, ids=IDS)
@pytest.mark.parametrize("update", ["replay", "one_pass"])
def test_the_engine_trains_what_the_windowed_sampler_drew(make_toy: Callable, selector: Any, update: str):
    """The same as training a fixed range of a sampler that was windowed by hand."""
    toy_schedule = make_toy().schedule
    start, end = selector.interval(_schedule(6), 3)
    pictures, values, moved = _step(make_toy, selector, update)
    assert values["pairs_trained"] == 3 * (end - start)

    def windowed(*arguments: Any) -> Any:
        toy = make_toy(*arguments)
        toy.schedule = lambda *args, **kwargs: toy_schedule(*args, **kwargs).window(start, end)
        return toy

    expected, _, moved_by_hand = _step(windowed, StaticRange(start=start, end=end), update)
    assert torch.equal(pictures, expected)
    assert torch.equal(moved, moved_by_hand)
    assert moved.norm() > 1e-6
    noisy, _, _ = _step(make_toy, selector.model_copy(update={"ode_outside": False}), update)
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
        (lambda: Window(end=9).interval(_schedule(6), 0), "<= 6"),
        (lambda: Window(window_shift=0), "greater than or equal to 1"),
        (lambda: FastWindow(window_size=5, start=0, end=4).interval(_schedule(6), 0), "does not fit"),
        (lambda: Window(window_order="random", shift_decay="linear"), "shift_every does not decay with random windows"),
        (
            lambda: Window(shift_every=4, shift_every_min=5, shift_decay="linear"),
            "shift_every_min must not exceed selector.shift_every, got 5 and 4",
        ),
        (lambda: Window(window_order="random", window_shift=2), "window_shift needs another window_order"),
        (lambda: Window(shift_every_min=2), "shift_every_min needs another shift_decay"),
        (
            lambda: Window().ahead(["a"], schedules.flow_ode(torch.linspace(1, 0, 7)), 0),
            "every chosen step is deterministic",
        ),
    ],
)
def test_errors_name_the_rule_and_the_value(make: Callable, says: str):
    with pytest.raises(ValueError, match=says):
        make()
