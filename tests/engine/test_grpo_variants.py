"""Aliases of GRPO: their published defaults; and GRPO-Guard's loss and gradient against the formula in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from command_line import TINY, refused
from torch import Tensor

from adascope_fast.algorithms import settings
from adascope_fast.algorithms.advantages import GroupRelative
from adascope_fast.algorithms.objectives import Clipped
from adascope_fast.algorithms.policy_gradient import (
    GuardedPairs,
    dance_grpo,
    flow_grpo_fast,
    grpo,
    grpo_guard,
    mix_grpo,
)
from adascope_fast.rollout import EncodedPrompts, Trajectory
from adascope_fast.schedules import samplers as schedules
from adascope_fast.selectors.windows import Window

T = 6


@pytest.mark.parametrize(
    ("make", "advantage_scale", "clip_range", "initial_noise", "train_guidance"),
    [
        (grpo, "global", 1e-4, "own", "conditional"),
        (flow_grpo_fast, "global", 1e-5, "group", "conditional"),
        (dance_grpo, "group_sample", 1e-4, "group", "both"),
        (mix_grpo, "group_sample", 1e-4, "group", "both"),
        (grpo_guard, "group", 2e-6, "own", "conditional"),
    ],
)
def test_defaults_are_the_published_ones(
    make: Callable, advantage_scale: Any, clip_range: float, initial_noise: str, train_guidance: str
):
    algorithm = make()
    assert algorithm.advantage == GroupRelative(advantage_scale, 5.0)
    assert algorithm.objective == Clipped(clip_range)
    assert (algorithm.initial_noise, algorithm.train_guidance) == (initial_noise, train_guidance)
    assert algorithm.shares_noise == (initial_noise == "group")
    assert (algorithm.kl_weight, algorithm.name) == (0, make.__name__)


def _guard_loss(
    toy: Any,
    trajectory: Trajectory,
    outputs: Tensor,
    old_outputs: Tensor,
    advantage: Tensor,
    keep: Tensor,
    clip: float,
) -> Tensor:
    """[b, t] by the formula, in float64: mu, bias and ratio of each image, PPO's clip, divided by -dt."""
    a, b, std = (column.double()[None, :, None, None, None] for column in trajectory.schedule.coef.unbind(1))
    x, y = trajectory.latents[:, :-1].double(), trajectory.latents[:, 1:].double()
    mu, mu_old = a * x + b * outputs, a * x + b * old_outputs.detach()
    axes, s = (2, 3, 4), std.flatten()
    log_prob, old_log_prob = (-((y - mean) ** 2).mean(axes) / (2 * s**2) for mean in (mu, mu_old))
    bias = ((mu - mu_old) ** 2).mean(axes) / (2 * s**2)
    ratio = ((log_prob - old_log_prob + bias) * s).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return (loss / (1 / T))[keep]  # the sigmas fall evenly from 1 to 0 in T steps, so -dt is 1 / T


def _moved(toy: Any) -> None:
    """Another policy than the one that drew the rollout."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in toy.trainable_parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("clip", [3e-4, 10.0])
@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde"])
def test_guards_loss_and_gradient_are_those_of_the_formula(
    make_toy: Callable,
    make_engine: Callable,
    make_other_reference: Callable,
    sample: Callable,
    outputs: Callable,
    gradient: Callable,
    kind: str,
    clip: float,
    kl_weight: float,
    guidance_scale: float,
):
    """After the policy has moved; the old mean is read from the rollout's guesses, with a KL to another policy."""
    toy = make_toy(torch.float64)
    algorithm = grpo_guard(clip_range=clip, kl_weight=kl_weight)
    options: dict[str, Any] = {"guidance_scale": guidance_scale, "train_guidance": None}
    if guidance_scale != 1:
        options["train_guidance"] = "both"
    engine = make_engine(toy, algorithm, kind=kind, **options)
    trajectory = sample(engine)
    old = outputs(toy, trajectory, guidance_scale).detach()
    _moved(toy)
    reference = make_other_reference(make_toy, toy, 0.9)
    keep = torch.zeros(len(trajectory.prompts), T, dtype=torch.bool)
    keep[:, 1:5] = True
    advantage = torch.linspace(-2, 2, len(keep), dtype=torch.float64)[:, None].expand(-1, T)
    pairs = trajectory.pairs(keep)
    rows = GuardedPairs(trajectory, pairs, (advantage * T)[keep], None)
    policy = engine.policy(EncodedPrompts.of(toy, trajectory.prompts), engine.schedule)
    loss = algorithm.loss(policy, rows.take(slice(None)), is_on_policy=False, scale=1.0)
    found = torch.autograd.grad(loss.values.mean(), policy.leaves())
    policy.backward(found)
    got = torch.cat([parameter.grad.flatten() for parameter in toy.trainable_parameters()])
    now = outputs(toy, trajectory, guidance_scale)
    want = _guard_loss(toy, trajectory, now, old, advantage, keep, clip)
    _, b, std = trajectory.schedule.coef.double().unbind(1)
    distance = (now - outputs(reference, trajectory, guidance_scale).detach()).square().mean((2, 3, 4))
    want = want + kl_weight * (b.square() * distance / (2 * std.square()))[keep]
    assert (loss.statistics["clipfrac"].sum() > 0) == (clip < 1)
    # The rollout's tables are float32, so the old output is known as exactly as that.
    torch.testing.assert_close(loss.values.double(), want, rtol=2e-5, atol=1e-5)
    want_gradient = gradient(want.mean(), toy)
    assert want_gradient.norm() > 1e-4
    torch.testing.assert_close(got, want_gradient, rtol=1e-3, atol=2e-5 * want_gradient.norm().item())


def test_guards_first_ratio_is_1_exactly_and_a_sample_does_not_depend_on_its_batch(
    make_toy: Callable, make_engine: Callable, sample: Callable
):
    toy = make_toy()
    algorithm = grpo_guard()
    engine = make_engine(toy, algorithm, kind="flow_sde", guidance_scale=2.0)
    trajectory = sample(engine)
    keep = engine.algorithm.steps(torch.ones(6, T, dtype=torch.bool), engine.schedule.trainable)
    pairs = trajectory.pairs(keep & engine.schedule.trainable)
    rows = GuardedPairs(trajectory, pairs, torch.randn(len(pairs)), None)
    policy = engine.policy(EncodedPrompts.of(toy, trajectory.prompts), engine.schedule)
    first = algorithm.loss(policy, rows.take(slice(None)), is_on_policy=True, scale=1.0)
    assert (first.statistics["ratio"] == 1).all()
    with torch.no_grad():
        toy.layers[0].weight.mul_(1.3)
    whole = algorithm.loss(policy, rows.take(slice(None)), is_on_policy=False, scale=1.0)
    assert whole.statistics["ratio"].std() > 1e-4
    for row in (0, 7, 20):
        alone = algorithm.loss(policy, rows.take(slice(row, row + 1)), is_on_policy=False, scale=1.0)
        torch.testing.assert_close(alone.statistics["ratio"][0], whole.statistics["ratio"][row], rtol=1e-6, atol=0)
        torch.testing.assert_close(alone.values[0], whole.values[row], rtol=1e-5, atol=1e-6)


def test_guards_rows_are_divided_by_the_length_of_their_step():
    schedule = schedules.flow_sde([1.0, 0.9, 0.5, 0.2, 0.1], noise_level=0.7)
    keep = torch.ones(1, 4, dtype=torch.bool)
    assert grpo_guard().weights(keep, schedule)[0].tolist() == pytest.approx([10, 2.5, 1 / 0.3, 10], rel=1e-5)


@pytest.mark.parametrize("make", [flow_grpo_fast, dance_grpo, mix_grpo, grpo_guard])
def test_microbatches_do_not_matter(make_toy: Callable, make_engine: Callable, move: Callable, make: Callable):
    found = []
    for microbatch in (3, 64):
        toy = make_toy(torch.float64)
        selector = Window(window_size=3, start=1, shift_every=1)
        algorithm = make(clip_range=0.01, kl_weight=0.1)
        engine = make_engine(
            toy, algorithm, kind="flow_sde", selector=selector, microbatch=microbatch, inner_epochs=2, rollout_batch=2
        )
        found.append(move(engine, 2).by)
    assert found[0].norm() > 1e-6
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-9)


def test_guard_is_refused_without_a_flow():
    ddim = schedules.ddim([0.9, 0.5, 0.1], [2, 1], stride=1, eta=1.0)
    with pytest.raises(ValueError, match="divides by the dt of a flow sampler's steps, got the sampler 'ddim'"):
        grpo_guard().schedule(ddim)
    with pytest.raises(ValueError, match="log_prob"):
        settings.GrpoGuard(log_prob="squared_error")  # type: ignore[arg-type]
    line = refused("train", TINY, "algorithm.name=grpo_guard")  # scenes is a diffusion model
    assert "got the sampler 'ddim'" in line
    line = refused("train", TINY, "algorithm.name=grpo_guard", "sampler.kind=ddpm")
    assert 'got sampler.kind = "ddpm"' in line
    line = refused("train", TINY, "algorithm.name=grpo_guard", "train.update=one_pass", "selector.name=every_step")
    assert "grpo_guard has its own" in line
