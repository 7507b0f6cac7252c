"""What is told of each denoising step, worked by hand, and that the engine tells it of its own pairs."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adascope_fast.algorithms.policy_gradient import ddpo
from adascope_fast.engine.engine import Engine
from adascope_fast.engine.settings import Updates
from adascope_fast.engine.statistics import UpdateStatistics
from adascope_fast.rollout import EncodedPrompts, Trajectory
from adascope_fast.schedules import dance_sde
from adascope_fast.schedules.settings import Sampler
from adascope_fast.selectors.protocol import TimestepSelector
from adascope_fast.selectors.simple import RandomFraction, StaticRange
from adascope_fast.theory import measured_uncertainty

PROMPTS = ["a red one", "a red one", "the green", "see", "see"]
T = 6


def _microbatch(step: list[int], ratio: list[float], clipfrac: list[float], gradient: list[float]) -> dict[str, Tensor]:
    values = {"ratio": ratio, "clipfrac": clipfrac, "output_gradient": gradient, "loss": [0.0] * len(step)}
    return {name: torch.tensor(value) for name, value in values.items()} | {"step": torch.tensor(step)}


def test_sums_by_step():
    statistics = UpdateStatistics(4)
    first = _microbatch([0, 2, 2], [1.0, 1.5, 0.9], [0.0, 1.0, 0.0], [1.0, 2.0, 1.0])
    second = _microbatch([2], [1.0], [0.0], [4.0])
    statistics.add([first, second], torch.tensor(1.0))
    statistics.add([_microbatch([0], [torch.nan], [1.0], [2.0])], torch.tensor(1.0))
    found = statistics.by_step()
    assert found["pairs"] == [2, 0, 3, 0]
    assert found["ratio_deviation"] == [0, None, pytest.approx(0.6 / 3), None], "what is not finite counts as nothing"
    assert found["clipfrac"] == [0.5, None, pytest.approx(1 / 3), None]
    assert found["gradient_share"] == [pytest.approx(0.3), None, pytest.approx(0.7), None]
    assert json.loads(json.dumps(found)) == found


def _values(
    make_toy: Callable, selector: TimestepSelector, *, guidance_scale: float = 1.0, **settings: Any
) -> dict[str, Any]:
    toy = make_toy(torch.float64)
    optimizer = torch.optim.SGD(toy.trainable_parameters(), lr=1.0)
    made = Updates(**{"rollout_batch": 3, "microbatch": 4, **settings})
    schedule, sampler = toy.schedule(T), Sampler(guidance_scale=guidance_scale)
    score = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    algorithm = ddpo(clip_range=1e-4, min_count=2)
    engine = Engine(toy, schedule, algorithm, selector, score, optimizer, made, sampler=sampler)
    return engine.step(EncodedPrompts.of(toy, PROMPTS), PROMPTS, iteration=0, seed=0).values


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_an_iteration_tells_of_its_steps(make_toy: Callable, guidance_scale: float):
    values = _values(make_toy, StaticRange(start=1, end=4), updates_per_iteration=2, guidance_scale=guidance_scale)
    steps = values["steps"]
    assert steps["pairs"] == [0, 5, 5, 5, 0, 0]
    assert [share is None for share in steps["gradient_share"]] == [True, False, False, False, True, True]
    assert sum(steps["gradient_share"][1:4]) == pytest.approx(1, abs=1e-5)
    assert values["clipfrac"] == pytest.approx(sum(steps["clipfrac"][1:4]) / 3, abs=1e-5)
    assert values["ratio_max_deviation"] >= max(steps["ratio_deviation"][1:4]) > 0
    assert [0 < value < 1 for value in steps["uncertainty"]] == [True] * 6
    small = _values(
        make_toy, StaticRange(start=1, end=4), updates_per_iteration=2, guidance_scale=guidance_scale, microbatch=1
    )
    for name, found in small["steps"].items():
        assert found == [value if value is None else pytest.approx(value, rel=1e-4, abs=1e-8) for value in steps[name]]


def test_the_share_is_that_of_the_gradient_in_the_model_output(make_toy: Callable):
    """At ratio 1 the loss' gradient is -advantage * d log_prob / d output = -advantage * b * z / (std * d)."""
    selector = RandomFraction(fraction=1.0, last_step="train")
    toy = make_toy(torch.float64)
    schedule, seen = toy.schedule(T), {}
    optimizer = torch.optim.SGD(toy.trainable_parameters(), lr=1.0)
    score = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    algorithm = ddpo(clip_range=1e-4, min_count=2)
    made = Updates(rollout_batch=3, microbatch=4)
    engine = Engine(toy, schedule, algorithm, selector, score, optimizer, made)
    replay = engine._replay
    engine._replay = lambda *arguments: (seen.update(arguments=arguments), replay(*arguments))[1]  # type: ignore[method-assign]
    values = engine.step(EncodedPrompts.of(toy, PROMPTS), PROMPTS, iteration=0, seed=0).values
    fresh = make_toy(torch.float64)  # the policy that drew the rollout
    policy, rows, *_ = seen["arguments"]
    encoded, trajectory = policy.encoded, rows.trajectory
    advantages = torch.zeros(len(PROMPTS), T, dtype=torch.float64)
    advantages[rows.pairs[:, 0], rows.pairs[:, 1]] = rows.advantage.double()
    norms = torch.zeros(T, dtype=torch.float64)
    for step in range(T):
        sample = trajectory.latents[:, step].double()
        condition = {name: value[trajectory.prompt_index] for name, value in encoded.condition.items()}
        output = fresh.predict(sample, schedule.timesteps[step].expand(len(sample)), condition).detach()
        a, b, std = schedule.coef[step].double()
        z = (trajectory.latents[:, step + 1] - a * sample - b * output) / std
        gradient = advantages[:, step, None, None, None] * z * b / std / z[0].numel()
        norms[step] = gradient.flatten(1).norm(dim=1).sum()
    np.testing.assert_allclose(values["steps"]["gradient_share"], norms / norms.sum(), rtol=1e-3)


def test_one_pass_tells_what_it_knows(make_toy: Callable):
    steps = _values(make_toy, StaticRange(start=1, end=4), update="one_pass")["steps"]
    assert steps["pairs"] == [0, 5, 5, 5, 0, 0]
    assert steps["gradient_share"] == [None] * 6, "there is no gradient of its own for a step"


def test_uncertainty_is_of_the_samples_that_took_the_step():
    latents = torch.randn(3, 4, 2, 40, generator=torch.Generator().manual_seed(0)).cumsum(1)
    log_prob = torch.zeros(3, 3)
    log_prob[0, 1:] = torch.nan
    log_prob[:, 2] = torch.nan
    schedule = dance_sde(torch.linspace(1, 0, 4), eta=0.3)
    trajectory = Trajectory(latents, latents[:, 1:], log_prob, schedule, ["a"] * 3, torch.zeros(3, dtype=torch.int64))
    pearson = np.stack([np.corrcoef(rows.flatten(1).double().numpy()).diagonal(1) for rows in latents])
    want = [1 - pearson[:, 0].mean(), 1 - pearson[1:, 1].mean()]
    found = measured_uncertainty(trajectory)
    np.testing.assert_allclose(found[:2], want, atol=1e-6)
    assert found[2].isnan()
