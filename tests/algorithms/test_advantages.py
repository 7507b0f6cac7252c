"""Advantages against values worked out in float64 elsewhere, and what no estimator may do."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adascope_fast.algorithms.advantages import Advantage, GroupRelative, PerPromptTracker, Whiten

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())
SCALES = ("global", "group", "group_sample")


def _rewards(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _estimators() -> list[Advantage]:
    return [PerPromptTracker(), PerPromptTracker(min_count=2), *(GroupRelative(scale) for scale in SCALES), Whiten()]


def test_tracker_gives_the_known_advantages():
    known = VECTORS["adv_ddpo_tracker"]
    tracker = PerPromptTracker(buffer_size=known["buffer_size"], min_count=known["min_count"])
    for call in (known["call1"], known["call2"]):
        got = tracker(_rewards(call["rewards"]), call["prompts"], 3)
        assert got.shape == (4, 3)
        for step in range(3):
            np.testing.assert_allclose(got[:, step], call["adv"], rtol=1e-12, atol=1e-15)
    assert tracker.state_dict() == {"buffers": known["buffers"]}


def test_tracker_forgets_the_oldest_and_trusts_from_min_count_on():
    tracker = PerPromptTracker(buffer_size=2, min_count=2)
    tracker(_rewards([1.0, 2.0, 4.0]), ["a", "a", "a"], 1)
    # a: over [4, 6], mean 5, std 1; b, seen once: over the batch [6, 9], mean 7.5, std 1.5
    got = tracker(_rewards([6.0, 9.0]), ["a", "b"], 1)[:, 0]
    np.testing.assert_allclose(got, [1 / 1.000001, 1.5 / 1.500001], rtol=1e-12)
    assert tracker.state_dict() == {"buffers": {"a": [4.0, 6.0], "b": [9.0]}}


def test_tracker_continues_from_its_state():
    first, second = PerPromptTracker(buffer_size=3, min_count=2), PerPromptTracker(buffer_size=3, min_count=2)
    first(torch.tensor([0.1, 0.7, 0.3]), ["a", "a", "b"], 2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rewards, prompts = torch.tensor([0.2, 0.9, 0.4]), ["a", "b", "b"]
    assert torch.equal(first(rewards, prompts, 2), second(rewards, prompts, 2))
    assert first.state_dict() == second.state_dict()


@pytest.mark.parametrize(
    ("scale", "key"),
    [("global", "flow_grpo_global_std"), ("group", "flow_grpo_group_std"), ("group_sample", "dancegrpo_sample_std")],
)
def test_group_relative_gives_the_known_advantages(scale, key):
    known = VECTORS["adv_group"]
    got = GroupRelative(scale)(_rewards(known["rewards"]), known["prompts"], 2)
    np.testing.assert_allclose(got[:, 0], known[key], rtol=1e-12, atol=1e-15)
    assert torch.equal(got[:, 0], got[:, 1])


def test_whiten_by_hand():
    # mean 2.5, population std sqrt(5 / 4)
    want = (np.array([1.0, 2.0, 3.0, 4.0]) - 2.5) / (math.sqrt(1.25) + 1e-8)
    np.testing.assert_allclose(Whiten()(_rewards([1.0, 2.0, 3.0, 4.0]), list("aabc"), 1)[:, 0], want, rtol=1e-12)


@pytest.mark.parametrize("estimator", _estimators())
def test_a_constant_group_has_advantage_exactly_0(estimator):
    constant = torch.full((3,), 0.1)  # 3 * 0.1 / 3 is not 0.1 in floating point
    assert estimator(constant, ["a"] * 3, 2).tolist() == [[0.0, 0.0]] * 3
    assert estimator(constant[:1], ["b"], 1).abs().max() <= 5


@pytest.mark.parametrize("scale", SCALES)
def test_a_constant_group_is_0_beside_another(scale):
    advantage = GroupRelative(scale)(_rewards([0.1, 0.1, 0.1, 1.0, 2.0]), list("aaabb"), 1)[:, 0]
    assert advantage[:3].tolist() == [0.0] * 3
    assert (advantage[3:] != 0).all()


@pytest.mark.parametrize(
    "estimator",
    [PerPromptTracker(advantage_clip=1.5), GroupRelative("group", advantage_clip=1.5), Whiten(advantage_clip=1.5)],
)
def test_clip_bounds_the_advantage(estimator):
    rewards = torch.tensor([0.0] * 20 + [100.0])
    advantage = estimator(rewards, ["a"] * 21, 1)
    assert advantage.max() == 1.5
    assert estimator(-rewards, ["b"] * 21, 1).min() == -1.5


@pytest.mark.parametrize("estimator", _estimators())
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_names_its_prompt(estimator, bad):
    with pytest.raises(ValueError, match="'a cat'"):
        estimator(torch.tensor([1.0, bad]), ["a dog", "a cat"], 1)
    with pytest.raises(ValueError, match="prompts 1"):
        estimator(torch.tensor([1.0, 2.0]), ["a dog"], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_at_least_float32(dtype):
    advantage = Whiten()(torch.tensor([1.0, 2.0], dtype=dtype), ["a", "b"], 1)
    assert advantage.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("make", [GroupRelative, Whiten])
def test_stateless_estimators_refuse_the_state_of_others(make):
    make().load_state_dict(make().state_dict())
    with pytest.raises(ValueError, match="buffers"):
        make().load_state_dict({"buffers": {}})


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="'batch'"):
        GroupRelative("batch")  # type: ignore


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(range(6)))
def test_the_order_of_the_batch_changes_no_advantage(seed, which):
    rng = np.random.default_rng(seed)
    rewards, prompts = torch.from_numpy(rng.normal(size=17)), [f"prompt {i}" for i in rng.integers(0, 4, 17)]
    order = rng.permutation(17)
    straight = _estimators()[which](rewards, prompts, 1)[:, 0]
    shuffled = _estimators()[which](rewards[order], [prompts[i] for i in order], 1)[:, 0]
    assert torch.equal(straight[order], shuffled)
