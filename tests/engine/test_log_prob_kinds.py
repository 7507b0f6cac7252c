"""Flow-CPS is trained on -(x - mean)^2 by default: in the rollout's record, in the update and in one pass."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adascope_fast.algorithms.objectives import Clipped
from adascope_fast.algorithms.policy_gradient import ddpo
from adascope_fast.rollout import EncodedPrompts, StepBatch

T = 6


def _squared_error(toy: Any, rows: StepBatch, condition: dict[str, Tensor]) -> Tensor:
    """-mean (x - mean)^2 of each row, differentiable."""
    output = toy.predict(rows.sample.double(), rows.timestep, condition)
    a, b, _ = rows.coef.double()[:, :, None, None, None].unbind(1)
    return -(rows.prev_sample.double() - a * rows.sample.double() - b * output).square().mean((1, 2, 3))


def _rows(engine: Any, trajectory: Any, steps: range) -> tuple[StepBatch, dict[str, Tensor]]:
    keep = torch.zeros(len(trajectory.prompts), T, dtype=torch.bool)
    keep[:, steps.start : steps.stop] = True
    rows = trajectory.gather(trajectory.pairs(keep))
    return rows, engine.backbone.encode([trajectory.prompts[sample] for sample in rows.sample_index])


@pytest.mark.parametrize(
    ("kind", "log_prob", "is_squared_error"),
    [
        ("flow_cps", "auto", True),
        ("flow_cps", "gaussian", False),
        ("flow_sde", "auto", False),
        ("flow_sde", "squared_error", True),
    ],
)
def test_the_rollout_records_what_is_trained(
    make_toy: Callable,
    make_engine: Callable,
    sample: Callable,
    outputs: Callable,
    log_probs: Callable,
    kind: str,
    log_prob: Any,
    is_squared_error: bool,
):
    toy, seen = make_toy(torch.float64), []
    algorithm = ddpo(log_prob=log_prob)
    batch = algorithm.batch
    algorithm.batch = lambda samples, context: (seen.append(samples.trajectory), batch(samples, context))[1]
    engine = make_engine(toy, algorithm, kind=kind)
    plain = sample(engine)
    with torch.no_grad():
        rows, condition = _rows(engine, plain, range(0, 5))
        if is_squared_error:
            want = _squared_error(toy, rows, condition).view(-1, 5)
        else:
            want = log_probs(plain, outputs(toy, plain))[:, :5]
    values = engine.step(EncodedPrompts.of(toy, plain.prompts), plain.prompts, iteration=0, seed=7).values
    (trajectory,) = seen
    assert torch.equal(trajectory.latents, plain.latents)
    torch.testing.assert_close(trajectory.log_prob[:, :5].double(), want, rtol=1e-5, atol=1e-6)
    assert values["rollout_drift"] < 1e-5, "the update's log-probability is the recorded one"
    assert values["ratio_max_deviation"] == 0


@pytest.mark.parametrize("is_own", [False, True], ids=["fused", "own"])
def test_the_second_updates_ratio_is_that_of_the_squared_errors(
    make_toy: Callable, make_engine: Callable, move: Callable, is_own: bool
):
    algorithm = ddpo(clip_range=10.0)
    if is_own:
        algorithm = replace(algorithm, objective=Clipped(10.0).__call__)
    toy, found, loss_of = make_toy(torch.float64), [], algorithm.loss

    def loss(policy: Any, rows: Any, *, is_on_policy: bool, scale: float) -> Any:
        made = loss_of(policy, rows, is_on_policy=is_on_policy, scale=scale)
        condition = {"text": policy.condition()["text"][rows[0].prompt_index]}
        with torch.no_grad():
            by_hand = (_squared_error(toy, rows[0], condition) - rows[0].old_log_prob.double()).exp()
        found.append((is_on_policy, made.statistics["ratio"].double(), by_hand))
        return made

    algorithm.loss = loss  # type: ignore[method-assign]
    move(make_engine(toy, algorithm, kind="flow_cps", updates_per_iteration=2, microbatch=100))
    (first, ratio, _), (second, later, by_hand) = found
    assert (first, second) == (True, False)
    assert ratio.tolist() == [1.0] * 12
    assert (later - 1).abs().max() > 1e-4
    torch.testing.assert_close(later, by_hand, rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", ["fused", "own", "one_pass"])
def test_the_gradient_is_that_of_the_squared_errors(
    make_toy: Callable, make_engine: Callable, move: Callable, sample: Callable, gradient: Callable, way: str
):
    toy, rewards = make_toy(torch.float64), []
    score = lambda images, prompts: (rewards.append(images.mean((1, 2, 3))), rewards[-1])[1]  # noqa: E731
    algorithm, update = ddpo(advantage="batch"), "one_pass" if way == "one_pass" else "replay"
    if way == "own":
        algorithm = replace(algorithm, objective=algorithm.objective.__call__)
    engine = make_engine(toy, algorithm, kind="flow_cps", score=score, update=update)
    trajectory = sample(engine)
    rows, condition = _rows(engine, trajectory, range(1, 5))
    got, reward = move(engine).by, torch.cat(rewards).double()
    advantage = (reward - reward.mean()) / (reward.std(correction=0) + 1e-8)
    fresh = make_toy(torch.float64)
    want = gradient(-(advantage[rows.sample_index] * _squared_error(fresh, rows, condition)).mean(), fresh)
    assert want.norm() > 1e-5
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())
