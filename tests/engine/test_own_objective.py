"""An objective of one's own is what is trained, in replay and in one pass."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adascope_fast.algorithms.objectives import Clipped
from adascope_fast.algorithms.policy_gradient import ddpo

CLIP_RANGE = 1e-4


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_an_objective_without_a_fused_operation_is_differentiated_as_it_stands(
    make_toy: Callable, make_engine: Callable, move: Callable, guidance_scale: float, kl_weight: float
):
    """The same loss, once with its fused operation and once as a function that nothing is known of."""
    fused = ddpo(clip_range=CLIP_RANGE, min_count=2, kl_weight=kl_weight)
    found = []
    for algorithm in (fused, replace(fused, objective=Clipped(CLIP_RANGE).__call__)):
        same: dict[str, Any] = {"guidance_scale": guidance_scale, "updates_per_iteration": 2}
        found.append(move(make_engine(make_toy(torch.float64), algorithm, **same)))
    want, got = found
    torch.testing.assert_close(got.by, want.by, rtol=1e-9, atol=1e-12)
    assert want.values.pop("clipfrac") > 0
    assert got.values.pop("clipfrac") == 0, "nobody knows where a function of one's own clips"
    for name in ("steps", "selector", "ranks"):
        del want.values[name], got.values[name]
    assert got.values == pytest.approx(want.values, rel=1e-5, abs=1e-9)


def _zero(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    return 0 * log_prob, torch.ones_like(log_prob)


@pytest.mark.parametrize("update", ["replay", "one_pass"])
def test_an_objective_that_is_zero_moves_nothing(
    make_toy: Callable, make_engine: Callable, move: Callable, update: str
):
    toy = make_toy()
    moved = move(make_engine(toy, replace(ddpo(), objective=_zero), update=update))
    assert moved.by.tolist() == [0.0] * len(moved.by)
    assert (moved.values["loss"], moved.values["grad_norm"]) == (0, 0)
    assert moved.values["pairs_trained"] == 6 * 4


def _score_function(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    return -advantage * log_prob, (log_prob - old_log_prob).exp()


@pytest.mark.parametrize("update", ["replay", "one_pass"])
@pytest.mark.parametrize("objective", [_score_function, lambda *x: (3 * _score_function(*x)[0], x[0])])
def test_the_gradient_is_that_of_a_plain_loop_with_the_objective(
    make_toy: Callable,
    make_engine: Callable,
    move: Callable,
    sample: Callable,
    outputs: Callable,
    log_probs: Callable,
    gradient: Callable,
    objective: Any,
    update: str,
):
    """-A log p and three times that, averaged over steps 1..4 of the six samples."""
    toy, rewards = make_toy(torch.float64), []
    score = lambda images, prompts: (rewards.append(images.mean((1, 2, 3))), rewards[-1])[1]  # noqa: E731
    engine = make_engine(toy, replace(ddpo(advantage="batch"), objective=objective), score=score, update=update)
    trajectory, moved = sample(engine), move(engine)
    reward = torch.cat(rewards).double()
    advantage = (reward - reward.mean()) / (reward.std(correction=0) + 1e-8)
    factor = 1 if objective is _score_function else 3
    fresh = make_toy(torch.float64)
    log_prob = log_probs(trajectory, outputs(fresh, trajectory))[:, 1:5]
    loss = -factor * (advantage[:, None] * log_prob).mean()
    want = gradient(loss, fresh)
    assert want.norm() > 1e-3
    torch.testing.assert_close(moved.by, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())
    if update == "replay":
        assert moved.values["loss"] == pytest.approx(loss.item(), rel=1e-5)
