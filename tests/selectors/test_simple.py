"""What the baseline selectors keep, iteration by iteration."""

import json

import pytest
import torch

from adascope_fast.rollout import Trajectory
from adascope_fast.schedules import Schedule
from adascope_fast.schedules import samplers as schedules
from adascope_fast.selectors.protocol import TimestepSelector
from adascope_fast.selectors.simple import Complement, EveryStep, RandomFraction, StaticRange, Threshold
from adascope_fast.theory import schedule_correlation


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
    assert _steps(EveryStep(last_step="train"), 7, 6, _all_trainable(6)) == [0, 1, 2, 3, 4, 5]
    windowed = _all_trainable(6).window(2, 4)
    assert _steps(EveryStep(), 0, 6, windowed) == [2, 3]


def _ddim(t: int) -> Schedule:
    return schedules.ddim(torch.linspace(0.99, 0.05, t + 1), range(t, 0, -1), stride=1, eta=1.0)


@pytest.mark.parametrize(("last_step", "of_flow", "of_ddim"), [("auto", 5, 6), ("train", 6, 6), ("skip", 5, 5)])
def test_the_last_step_is_left_out_of_flow_samplers_unless_told_otherwise(last_step, of_flow: int, of_ddim: int):
    """Both samplers have noise in all of their 6 steps."""
    for schedule, kept in ((_all_trainable(6), of_flow), (_ddim(6), of_ddim)):
        assert schedule.trainable.all()
        assert _steps(EveryStep(last_step=last_step), 0, 6, schedule) == list(range(kept))
        rest = Complement(StaticRange(start=0, end=3), last_step=last_step)
        assert _steps(rest, 0, 6, schedule) == list(range(3, kept))
        ahead = rest.ahead(["a"], schedule, 0)
        assert ahead is not None
        assert ahead[0].nonzero()[:, 0].tolist() == list(range(3, kept))
        keep = RandomFraction(fraction=1.0, last_step=last_step)(_trajectory(2, 6, schedule), 0)
        assert keep.tolist() == [[step < kept for step in range(6)]] * 2
    assert _steps(StaticRange(start=0, end=6), 0, 6, _all_trainable(6)) == [0, 1, 2, 3, 4, 5], "what is named is kept"


def test_the_only_step_is_never_left_out():
    assert _steps(EveryStep(last_step="skip"), 0, 1, _all_trainable(1)) == [0]


def test_static_range_is_half_open_and_drops_deterministic_steps():
    selector = StaticRange(start=2, end=6)
    assert _steps(selector, 3, 6) == [2, 3, 4]
    assert selector.telemetry() == {"start": 2, "end": 6, "fraction": 0.5}


def test_random_fraction_keeps_as_many_steps_of_each_sample():
    selector = RandomFraction(fraction=0.5, seed=3)
    keep = selector(_trajectory(200, 10), 4)
    assert keep.sum(1).tolist() == [5] * 200
    assert not keep[:, -1].any(), "the last step is deterministic"
    assert len(set(map(tuple, keep.tolist()))) > 20, "each sample has its own steps"
    counts = keep.sum(0)[:9].double()  # 200 draws of 5 of 9: 111 each, standard deviation 7
    assert (counts - 200 * 5 / 9).abs().max() < 5 * 7
    assert torch.equal(keep, RandomFraction(fraction=0.5, seed=3)(_trajectory(200, 10), 4))
    assert not torch.equal(keep, selector(_trajectory(200, 10), 5))
    assert not torch.equal(keep, RandomFraction(fraction=0.5, seed=4)(_trajectory(200, 10), 4))
    assert selector.telemetry() == {"fraction": 0.5}


@pytest.mark.parametrize(("fraction", "kept"), [(0.99, 9), (1.0, 9), (0.58, 5), (0.01, 1)])
def test_random_fraction_rounds_down_to_no_less_than_one_step(fraction, kept):
    assert RandomFraction(fraction=fraction)(_trajectory(2, 10), 0).sum(1).tolist() == [kept] * 2


def test_a_threshold_on_theory_keeps_the_steps_of_that_uncertainty():
    # lambda = (t / (1 - t))^2 of t = 0.8, 0.6, 0.4, 0.2, 0 is 16, 2.25, 4/9, 1/16, 0, so the steps' uncertainties are
    # 1 - sqrt(3.25 / 17) = 0.563, 1 - sqrt(1.444 / 3.25) = 0.333, 0.142, 0.030.
    schedule = schedules.dance_sde(torch.tensor([0.8, 0.6, 0.4, 0.2, 0.0]), eta=0.3)
    assert (1 - schedule_correlation(schedule)).tolist() == pytest.approx([0.5628, 0.3333, 0.1423, 0.0299], abs=1e-4)
    assert _steps(Threshold(uncertainty_low=0.1, uncertainty_high=0.5), 0, 4, schedule) == [1, 2]
    assert _steps(Threshold(uncertainty_low=0.0, uncertainty_high=0.2), 3, 4, schedule) == [2, 3]
    assert _steps(Threshold(uncertainty_low=0.0, uncertainty_high=2.0), 3, 4, schedule) == [0, 1, 2, 3]
    with pytest.raises(
        ValueError, match=r"no step has an uncertainty in \[0.6, 0.7\): they reach from 0.0299 to 0.563"
    ):
        _steps(Threshold(uncertainty_low=0.6, uncertainty_high=0.7), 0, 4, schedule)


def test_the_complement_keeps_what_the_other_leaves_out():
    selector = Complement(StaticRange(start=2, end=4))
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


SELECTORS = [
    EveryStep(),
    StaticRange(start=0, end=4),
    RandomFraction(fraction=0.5),
    Threshold(uncertainty_low=0.0, uncertainty_high=2.0),
    Complement(StaticRange(start=0, end=4)),
]


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
    ("make", "says"),
    [
        (lambda: StaticRange(start=3, end=3), "start must be below selector.end, got start = 3 and end = 3"),
        (lambda: StaticRange(start=0, end=7), "<= 6"),
        (lambda: RandomFraction(fraction=0.0), "greater than 0"),
        (lambda: RandomFraction(fraction=1.5), "less than or equal to 1"),
        (lambda: EveryStep(last_step="no"), "'auto', 'train' or 'skip'"),  # type: ignore[arg-type]
        (lambda: Threshold(uncertainty_low=0.5, uncertainty_high=0.1), "must be below selector.uncertainty_high, got"),
    ],
)
def test_errors_name_the_rule_and_the_value(make, says):
    with pytest.raises(ValueError, match=says):
        make()(_trajectory(2, 6), 0)
