"""What goes wrong silently in this field, for every policy gradient: a KL without gradient, a mean over the wrong axis,
a step whose replay is not what was sampled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adascope_fast.algorithms.critic import dpok, tdpo
from adascope_fast.algorithms.policy_gradient import (
    GuardedPairs,
    Pairs,
    dance_grpo,
    ddpo,
    flow_grpo_fast,
    grpo,
    grpo_guard,
    mix_grpo,
    reinforce,
)
from adascope_fast.rollout import EncodedPrompts, OwnNoise, SharedStart, Trajectory, rollout
from adascope_fast.schedules import Schedule, dance_sde, ddim, flow_cps, flow_sde, shifted_sigmas

T, WEIGHT = 6, 0.25
ALGORITHMS: list[Callable[..., Any]] = [
    ddpo, reinforce, grpo, flow_grpo_fast, dance_grpo, mix_grpo, grpo_guard, dpok, tdpo,
]  # fmt: skip


def _rows(algorithm: Any, trajectory: Trajectory, keep: Tensor, advantage: Tensor) -> Pairs:
    kind = GuardedPairs if algorithm.name == "grpo_guard" else Pairs
    return kind(trajectory, trajectory.pairs(keep), advantage, None)


def _keep(trajectory: Trajectory) -> Tensor:
    keep = torch.rand(len(trajectory.prompts), T, generator=torch.Generator().manual_seed(2)) < 0.5
    return keep & trajectory.schedule.trainable


def _gradient(engine: Any, trajectory: Trajectory, rows: Pairs, which: Any, *, is_on_policy: bool) -> Tensor:
    """Of the mean of the loss of some rows in the parameters."""
    policy = engine.policy(EncodedPrompts.of(engine.backbone, trajectory.prompts), engine.schedule)
    parameters = engine.backbone.trainable_parameters()
    for parameter in parameters:
        parameter.grad = None
    taken = rows.take(which)
    scale = 1 / len(taken[1])
    loss = engine.algorithm.loss(policy, taken, is_on_policy=is_on_policy, scale=scale)
    gradients = loss.gradients
    if gradients is None:
        gradients = torch.autograd.grad(loss.values.sum() * scale, policy.leaves())
    policy.backward(gradients)
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("make", ALGORITHMS)
def test_the_kl_has_its_gradient_in_the_parameters(
    make_toy: Callable,
    make_engine: Callable,
    make_other_reference: Callable,
    sample: Callable,
    outputs: Callable,
    gradient: Callable,
    make: Callable,
    guidance_scale: float,
):
    """With no advantage the loss is the KL alone, and its gradient that of autograd in float64."""
    toy = make_toy(torch.float64)
    reference = make_other_reference(make_toy, toy, 0.9)
    guidance: Any = None if guidance_scale == 1 else "both"
    algorithm = make(kl_weight=WEIGHT)
    engine = make_engine(toy, algorithm, kind="flow_sde", guidance_scale=guidance_scale, train_guidance=guidance)
    assert algorithm.needs_reference
    trajectory = sample(engine)
    keep = _keep(trajectory)
    rows = _rows(algorithm, trajectory, keep, torch.zeros(int(keep.sum()), dtype=torch.float64))
    ours, theirs = (outputs(model, trajectory, guidance_scale) for model in (toy, reference))
    distance = (ours - theirs.detach()).square().mean((2, 3, 4))
    _, weight_output, std = trajectory.schedule.coef.double().unbind(1)
    kl = distance if algorithm.kl_form == "output" else weight_output.square() * distance / (2 * std.square())
    want = gradient(WEIGHT * kl[keep].mean(), toy)
    assert want.norm() > 1e-5
    for is_on_policy in (True, False):
        got = _gradient(engine, trajectory, rows, slice(None), is_on_policy=is_on_policy)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("make", ALGORITHMS)
def test_the_gradient_of_a_batch_is_the_mean_of_each_alone(
    make_toy: Callable, make_engine: Callable, sample: Callable, make: Callable
):
    """After the policy has moved, with other advantages and other clips in each row."""
    toy = make_toy(torch.float64)
    keys: dict[str, Any] = {} if make is reinforce else {"clip_range": 2e-4}
    engine = make_engine(toy, make(kl_weight=WEIGHT, **keys), kind="flow_sde", guidance_scale=2.0)
    trajectory = sample(engine)
    keep = _keep(trajectory)
    count = int(keep.sum())
    rows = _rows(engine.algorithm, trajectory, keep, torch.linspace(-3, 2, count, dtype=torch.float64))
    with torch.no_grad():
        toy.layers[2].weight.mul_(1.01)
    whole = _gradient(engine, trajectory, rows, slice(None), is_on_policy=False)
    alone = [_gradient(engine, trajectory, rows, slice(r, r + 1), is_on_policy=False) for r in range(count)]
    assert whole.norm() > 1e-5
    torch.testing.assert_close(torch.stack(alone).mean(0), whole, rtol=1e-6, atol=1e-9)


ALPHAS = torch.linspace(0.9999, 0.01, 1000, dtype=torch.float64)
SAMPLERS: dict[str, Schedule] = {
    "shifted Flow-SDE": flow_sde(shifted_sigmas(T, 3.0), noise_level=0.7),
    "shifted Dance-SDE": dance_sde(shifted_sigmas(T, 3.0), eta=0.3),
    "shifted Flow-CPS": flow_cps(shifted_sigmas(T, 3.0), eta=0.7),
    "DDIM": ddim(ALPHAS, torch.arange(5, -1, -1) * 160 + 1, stride=160, eta=1.0),
}


@pytest.mark.parametrize("start", [0, 2, 3])
@pytest.mark.parametrize("name", SAMPLERS)
def test_each_step_of_a_window_is_replayed_as_it_was_sampled(
    make_toy: Callable, outputs: Callable, log_probs: Callable, name: str, start: int
):
    """Also of samples that share the steps before it: the recorded log-probability is the replay's, elsewhere none."""
    toy, schedule = make_toy(torch.float64), SAMPLERS[name].window(start, start + 2)
    prompts = ["a red one", "see", "a red one", "see", "the green"]
    keys: dict[str, Any] = {"guidance_scale": 2.0, "noise": OwnNoise(1), "batch": 2}
    encoded, shared = EncodedPrompts.of(toy, prompts), SharedStart.of(prompts, schedule)
    assert shared.num_shared == start
    trajectory = rollout(toy, schedule, encoded, prompts, shared=shared, **keys)
    want = log_probs(trajectory, outputs(toy, trajectory, 2.0).detach())[:, start : start + 2]
    torch.testing.assert_close(trajectory.log_prob[:, start : start + 2].double(), want, rtol=1e-4, atol=1e-4)
    assert want.std() > 1e-3
    others = [step for step in range(T) if not start <= step < start + 2]
    assert trajectory.log_prob[:, others].isnan().all()
    assert trajectory.schedule.trainable.nonzero()[:, 0].tolist() == [start, start + 1]
