"""Pairs whose advantage is exactly 0 cost nothing and change nothing: the mean is over all pairs."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adascope_fast.algorithms.policy_gradient import ddpo, grpo

NUM_STEPS, ALL, CONSTANT = 6, 6 * 4, 2 * 4  # steps of the rollout, pairs, those of the two samples of "see"


def _constant_for_see(images: Tensor, prompts: list[str]) -> Tensor:
    plain = images.mean((1, 2, 3))
    return torch.where(torch.tensor([prompt == "see" for prompt in prompts]), 0.1, plain)


def _constant(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.full((len(images),), 0.1)


def _training_all(algorithm: Any) -> Any:
    """The same, but no pair is known to have no effect."""
    batch = algorithm.batch
    algorithm.batch = lambda samples, context: replace(batch(samples, context), is_live=None)
    return algorithm


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_skipping_them_changes_no_update(
    make_toy: Callable, make_engine: Callable, move: Callable, guidance_scale: float, updates: int
):
    toys = make_toy(torch.float64), make_toy(torch.float64)
    options = {"score": _constant_for_see, "guidance_scale": guidance_scale, "updates_per_iteration": updates}
    found = [
        move(make_engine(toy, algorithm, **options))
        for toy, algorithm in zip(toys, (grpo(), _training_all(grpo())), strict=True)
    ]
    (got, values), (want, others) = found
    assert want.norm() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * want.abs().max().item())
    rows = 1 if guidance_scale == 1 else 2
    assert toys[1].num_rows - toys[0].num_rows == rows * CONSTANT
    assert (values["pairs_skipped"], values["pairs_trained"]) == (CONSTANT, ALL - CONSTANT)
    assert (others["pairs_skipped"], others["pairs_trained"]) == (0, ALL)
    assert values["loss"] == pytest.approx(others["loss"], rel=1e-4, abs=1e-9)
    assert sum(values["steps"]["pairs"]) == ALL - CONSTANT


def test_with_a_kl_nothing_is_skipped(make_toy: Callable, make_engine: Callable, move: Callable):
    toy = make_toy()
    values = move(make_engine(toy, grpo(kl_weight=0.1), score=_constant_for_see)).values
    assert (values["pairs_skipped"], values["pairs_trained"]) == (0, ALL)
    assert toy.num_rows == 6 * NUM_STEPS + 2 * ALL, "the rollout, and each pair with its reference"


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("algorithm", [grpo(), ddpo(advantage="batch")], ids=lambda algorithm: algorithm.name)
def test_an_iteration_without_any_advantage_makes_no_forward(
    make_toy: Callable, make_engine: Callable, move: Callable, algorithm: Any, updates: int
):
    toy = make_toy()
    engine, steps = make_engine(toy, algorithm, score=_constant, updates_per_iteration=updates), []
    engine.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    by, values = move(engine)
    assert by.tolist() == [0.0] * len(by)
    assert toy.num_rows == 6 * NUM_STEPS, "the rollout's"
    assert len(steps) == updates, "the optimiser's own step, of a gradient of zero"
    assert (values["pairs_trained"], values["pairs_skipped"], values["updates_skipped"]) == (0, ALL, 0)
    assert (values["loss"], values["grad_norm"], values["fraction_trained"]) == (0, 0, 0)
    assert all(math.isfinite(value) for value in values.values() if isinstance(value, float))
    assert values["steps"]["pairs"] == [0] * NUM_STEPS
    json.dumps(values, allow_nan=False)


def test_momentum_goes_on_as_if_they_had_been_trained(make_toy: Callable, make_engine: Callable, move: Callable):
    """An iteration with advantages, then one without: the optimiser's moments must see a gradient of zero."""
    found = []
    for algorithm in (grpo(), _training_all(grpo())):
        toy, calls = make_toy(torch.float64), []

        def score(images: Tensor, prompts: list[str], calls: list[int] = calls) -> Tensor:
            calls.append(len(images))
            return (_constant_for_see if sum(calls) <= 6 else _constant)(images, prompts)

        engine = make_engine(toy, algorithm, score=score)
        engine.optimizer = torch.optim.AdamW(toy.trainable_parameters(), lr=0.01)
        found.append(move(engine, iterations=2))
    (got, values), (want, _) = found
    assert values["pairs_skipped"] == ALL
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * want.abs().max().item())
