"""AdaScope on made-up trajectories: pooling, memory, masks decided beforehand, degenerate samplers, several ranks."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adascope_fast.adascope.interval_rule import IntervalRule, select_interval
from adascope_fast.adascope.selector import AdaScope
from adascope_fast.adascope.sensing import LatentSensor, latent_curves
from adascope_fast.rollout import Trajectory
from adascope_fast.schedules import Schedule
from adascope_fast.schedules import samplers as schedules
from adascope_fast.selectors.simple import Complement

SEEDS = st.integers(0, 10**6)


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


def test_latent_curves_are_pearson_correlations():
    trajectory = _trajectory(_settling(3, 9, 3), list("abc"))
    structure, preference = latent_curves(trajectory)
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


def test_a_fresh_one_has_the_same_settings_and_no_memory():
    x0, prompts = _two_prompts()
    sensor = LatentSensor(every=2)
    selector = AdaScope(rule="knee", kappa=0.3, memory_decay=0.5, latest_start=0.4, sensor=sensor)
    selector(_trajectory(x0, prompts), 0)
    fresh = selector.fresh(kappa=0.2)
    assert (fresh.kappa, fresh.memory_decay, fresh.latest_start, fresh.sensor) == (0.2, 0.5, 0.4, sensor)
    assert fresh.state_dict() == {"memory": {}} != selector.state_dict()
    assert fresh.telemetry() == {}
    assert [selector.senses(iteration) for iteration in range(4)] == [True, False, True, False]
    with pytest.raises(ValueError, match="kappa needs another rule"):
        selector.fresh(rule="literal")
    assert AdaScope(rule="literal", literal_epsilon=0.1).literal_epsilon == 0.1


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


@pytest.mark.parametrize("mask_source", ["current", "previous"])
def test_the_complement_of_adascope_senses_and_remembers_as_adascope_does(mask_source):
    alone, inner = (AdaScope(mask_source=mask_source) for _ in range(2))
    complement = Complement(inner, last_step="train")
    for seed in range(2):
        trajectory = _trajectory(_settling(4, 20, 5, seed), ["a", "a", "b", "b"])
        kept, ahead = alone(trajectory, seed), complement.ahead(trajectory.prompts, trajectory.schedule, seed)
        rest = complement(trajectory, seed)
        assert torch.equal(rest, ~kept & trajectory.schedule.trainable)
        assert (ahead is None) == (mask_source == "current")
        assert ahead is None or torch.equal(ahead, rest)
        assert complement.state_dict() == alone.state_dict() != {"memory": {}}
        told = complement.telemetry()
        assert told.pop("fraction") == pytest.approx(rest.double().mean().item())
        assert told.pop("is_complement")
        expected = alone.telemetry()
        del expected["fraction"]
        assert told == expected
    again = Complement(AdaScope(mask_source=mask_source))
    again.load_state_dict(json.loads(json.dumps(complement.state_dict())))
    assert again.state_dict() == complement.state_dict()


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
    assert previous.telemetry()["intervals"] == [list(IntervalRule().fallback_interval(40, a.schedule.log_snr))] * 2
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
    one, other = (selector.ahead(["z", "q"], b.schedule, 2) for selector in (again, previous))
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)
