"""D3PO against values worked by hand: who is paired with whom, the loss, where its gradient ends, which steps count."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adascope_fast import schedules
from adascope_fast.algorithms import d3po
from adascope_fast.algorithms.algorithm import Context, Samples
from adascope_fast.algorithms.preference import paired, preference_loss
from adascope_fast.rollout import Trajectory


def test_the_best_is_paired_with_the_worst_and_so_inward():
    rewards = torch.tensor([0.1, 5.0, 0.9, 0.4, 0.7, 5.0, 2.0])
    prompts = ["a", "b", "a", "a", "a", "b", "b"]
    # a: 0.9 (2), 0.7 (4), 0.4 (3), 0.1 (0); b: 5 (1), 5 (5), 2 (6), whose middle one is left over
    assert paired(rewards, prompts).tolist() == [[2, 0], [4, 3], [1, 6]]


def test_ties_teach_nothing():
    assert paired(torch.tensor([1.0, 1.0, 2.0]), ["a", "a", "b"]).tolist() == []
    assert paired(torch.tensor([1.0, 1.0, 1.0, 3.0]), ["a"] * 4).tolist() == [[3, 2]]


def test_the_loss_and_its_gradient_are_the_formulas():
    beta, clip = 0.5, 0.1
    # Ratios 1.05 and 0.98 (within the clip), then 1.2 (beyond it) and 0.98.
    log_ratio = torch.tensor([[1.05, 1.2], [0.98, 0.98]], dtype=torch.float64).log().requires_grad_()
    loss = preference_loss(log_ratio, torch.tensor([1.0, 2.0]), beta=beta, clip=clip)
    z = [beta * (math.log(1.05) - math.log(0.98)), 2 * beta * (math.log(1.1) - math.log(0.98))]
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-value)) for value in z], rel=1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), log_ratio)
    slope = [1 / (1 + math.exp(value)) for value in z]  # sigmoid(-z)
    want = [[-slope[0] * beta, 0.0], [slope[0] * beta, 2 * slope[1] * beta]]  # no gradient beyond the clip
    torch.testing.assert_close(grad, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-12)


def test_no_preference_is_log_two():
    loss = preference_loss(torch.zeros(2, 3), torch.ones(3), beta=0.1, clip=0.1)
    assert loss.tolist() == pytest.approx([math.log(2)] * 3)


def _samples(rewards: list[float], prompts: list[str], t: int = 4) -> Samples:
    schedule = schedules.dance_sde(torch.linspace(1, 0.2, t + 1), eta=0.3)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(rewards), t + 1, 2, 3, 3, generator=generator)
    index = torch.tensor([sorted(set(prompts)).index(prompt) for prompt in prompts])
    trajectory = Trajectory(latents, latents[:, 1:], torch.zeros(len(rewards), t), schedule, prompts, index)
    return Samples(trajectory, torch.tensor(rewards))


def _context(keep: torch.Tensor, policy: Any = None) -> Context:
    return Context(policy, keep, torch.Generator().manual_seed(0))


def test_a_pair_is_trained_at_the_steps_kept_of_both_else_of_either():
    samples = _samples([1.0, 0.0, 1.0, 0.0], ["a", "a", "b", "b"])
    keep = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1]]).bool()
    rows = d3po().batch(samples, _context(keep))
    assert rows.rows.tolist() == [[0, 1, 1], [0, 1, 2], [2, 3, 0], [2, 3, 3]]
    assert rows.num_forwards == 2
    pairs, weight = rows.take(torch.tensor([3, 0]))
    assert pairs.sample_index.tolist() == [2, 0, 3, 1]  # the better ones first
    assert pairs.step_index.tolist() == [3, 1, 3, 1]
    assert weight.tolist() == [1.0, 1.0]
    torch.testing.assert_close(pairs.prev_sample[1], samples.trajectory.latents[0, 2])


def test_the_loss_of_a_batch_is_the_density_ratio_to_the_reference():
    samples = _samples([1.0, 0.0], ["a", "a"])
    trajectory = samples.trajectory
    shift = 0.01

    def outputs(sample: torch.Tensor, timestep: torch.Tensor, prompt_index: torch.Tensor) -> tuple[torch.Tensor, None]:
        return sample * 0.5, None

    def reference(sample: torch.Tensor, timestep: torch.Tensor, prompt_index: torch.Tensor) -> torch.Tensor:
        return sample * 0.5 + shift

    policy = SimpleNamespace(
        outputs=outputs, reference=reference, schedule=trajectory.schedule, guidance_scale=1.0, train_guidance="both"
    )
    algorithm = d3po(beta=0.3, clip_range=0.9)
    rows = algorithm.batch(samples, _context(torch.tensor([[0, 1, 0, 0]] * 2).bool(), policy))
    loss = algorithm.loss(policy, rows.take(torch.arange(1)), is_on_policy=True, scale=1.0)  # type: ignore[arg-type]
    a, b, std = trajectory.schedule.coef[1].double().tolist()
    log_ratio = []
    for sample in (0, 1):
        x, following = trajectory.latents[sample, 1].double(), trajectory.latents[sample, 2].double()
        mean, other = a * x + b * 0.5 * x, a * x + b * (0.5 * x + shift)
        log_ratio.append((((following - other) ** 2 - (following - mean) ** 2) / (2 * std**2)).mean().item())
    want = math.log(1 + math.exp(-0.3 * (log_ratio[0] - log_ratio[1])))
    assert loss.values.tolist() == pytest.approx([want], rel=1e-5)
    assert loss.statistics["step"].tolist() == [1]
