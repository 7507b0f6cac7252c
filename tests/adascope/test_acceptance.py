"""What must hold of the selector as a whole, whatever the curves; the rules' own properties are with the rules.

Known intervals, bounds, affine invariance and monotony in phi_E: tests/test_interval_rule.py. Order of the samples:
there and in tests/test_adascope.py. Ranks: tests/test_ranks.py. Masks and the gradient: tests/test_mask_source.py.
"""

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adascope_fast.adascope.selector import AdaScope
from adascope_fast.adascope.sensing import Curves
from adascope_fast.adascope.settings import Rule
from adascope_fast.algorithms.policy_gradient import ddpo
from adascope_fast.engine.engine import Engine
from adascope_fast.engine.settings import Updates
from adascope_fast.rollout import EncodedPrompts, Trajectory
from adascope_fast.selectors.protocol import TimestepSelector
from adascope_fast.selectors.simple import EveryStep

RULES = get_args(Rule)
SENSED = [rule for rule in RULES if rule not in ("fixed", "schedule")]


class _Given:
    """A sensor that every rule takes and nobody asks: curves are given here, not sensed."""

    is_causal, every = True, 1

    def __call__(self, trajectory: Trajectory) -> Curves:
        raise AssertionError("curves are given")


def _curves(rng: np.random.Generator, b: int, t: int, *, is_wild: bool) -> tuple[Tensor, Tensor]:
    """(structure, preference) [b, t+1]: settling and saturating with noise, or nothing but noise."""
    if is_wild:
        both = torch.tensor(rng.normal(size=(2, b, t + 1)) * 10.0 ** rng.uniform(-3, 3))
        return both[0], both[1]
    i = np.arange(t + 1)
    decay, gain = rng.uniform(0.02, 0.10, (b, 1)) * t, rng.uniform(0.05, 0.4, (b, 1)) * t
    structure = 0.2 + 0.05 * np.exp(-i / decay) * (-1.0) ** i + rng.normal(0, 1e-3, (b, t + 1))
    return torch.tensor(structure), torch.tensor(1 - np.exp(-i / gain) + rng.normal(0, 1e-2, (b, t + 1)))


@settings(max_examples=60)
@given(
    st.integers(0, 10**6), st.integers(4, 40), st.sampled_from(SENSED), st.booleans(),
    st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.sampled_from(["prompt", "sample"]),
)  # fmt: skip
def test_what_is_not_finite_in_one_sample_never_moves_another_prompt(seed, t, rule, is_wild, bad, pooling):
    rng = np.random.default_rng(seed)
    prompts = ["a", "b", "a", "b", "c"]
    rounds = [_curves(rng, 5, t, is_wild=is_wild) for _ in range(3)]
    clean, spoiled = (AdaScope(rule=rule, pooling=pooling, sensor=_Given()) for _ in range(2))
    for number, (structure, preference) in enumerate(rounds):
        want = clean.decide(Curves(preference, structure=structure), prompts)
        hurt = [structure.clone(), preference.clone()]
        if number == 2:  # the memory of all prompts is one: only what is decided now is compared
            hurt[int(rng.integers(2))][0, int(rng.integers(t + 1))] = bad
        got = spoiled.decide(Curves(hurt[1], structure=hurt[0]), prompts)
        others = [1, 3, 4] if pooling == "prompt" else [1, 2, 3, 4]
        assert torch.equal(got[others], want[others])
        for start, end in spoiled.telemetry()["intervals"]:
            assert 0 <= start < end <= t


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from(RULES), st.sampled_from(["current", "previous"]))
def test_an_interval_has_steps_inside_the_rollout_whatever_was_seen(seed, t, rule, mask_source):
    """NaN, infinities, constants and noise, over several iterations with memory."""
    rng = np.random.default_rng(seed)
    selector = AdaScope(rule=rule, mask_source=mask_source, memory_decay=float(rng.uniform(0, 0.99)), sensor=_Given())
    for _ in range(4):
        structure, preference = _curves(rng, 4, t, is_wild=bool(rng.integers(2)))
        for curve in (structure, preference):
            spot = rng.random(curve.shape) < rng.choice([0.0, 0.02, 1.0], p=[0.6, 0.3, 0.1])
            curve[torch.tensor(spot)] = float(rng.choice([np.nan, np.inf, 0.0]))
        keep = selector.decide(Curves(preference, structure=structure), list("aabb"), log_snr=torch.linspace(-9, 9, t))
        assert keep.shape == (4, t)
        assert keep.any(1).all()
        for start, end in selector.telemetry()["intervals"]:
            assert 0 <= start < end <= t
        assert sum(selector.telemetry()["reasons"].values()) == 2


def _brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("update", ["replay", "one_pass"])
def test_an_interval_of_all_steps_is_the_host_bit_for_bit(make_toy: Callable, update: str):
    prompts = ["a red one", "a red one", "the green", "the green"]

    def trained(selector: TimestepSelector) -> Tensor:
        toy: Any = make_toy()
        optimizer = torch.optim.AdamW(toy.trainable_parameters(), lr=1e-2)
        settings = Updates(rollout_batch=3, microbatch=5, update=update)  # type: ignore[arg-type]
        schedule = toy.schedule(6)
        engine = Engine(
            toy,
            schedule,
            ddpo(clip_range=1e-4),
            selector,
            lambda images, _: images.mean((1, 2, 3)),
            optimizer,
            settings,
        )
        for iteration in range(3):
            engine.step(EncodedPrompts.of(toy, prompts), prompts, iteration=iteration, seed=iteration)
        return torch.cat([parameter.detach().flatten() for parameter in toy.trainable_parameters()])

    want = trained(EveryStep(last_step="train"))
    untrained = torch.cat([parameter.detach().flatten() for parameter in make_toy().trainable_parameters()])
    assert not torch.equal(want, untrained)
    assert torch.equal(trained(AdaScope(rule="fixed", fallback=(0.0, 1.0), mask_source="previous")), want)
