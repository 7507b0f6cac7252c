"""DPOK: the two-sided clip, the critic as a baseline of each step, what it sees, and that it resumes where it was."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adascope_fast import schedules
from adascope_fast.algorithms import dpok
from adascope_fast.algorithms.algorithm import Context, Samples
from adascope_fast.algorithms.critic import features
from adascope_fast.algorithms.objectives import Clipped
from adascope_fast.rollout import Trajectory

T = 4


def _samples(rewards: list[float], prompts: list[str], seed: int = 0) -> Samples:
    schedule = schedules.dance_sde(torch.linspace(1, 0.2, T + 1), eta=0.3)
    latents = torch.randn(len(rewards), T + 1, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    index = torch.tensor([sorted(set(prompts)).index(prompt) for prompt in prompts])
    trajectory = Trajectory(latents, latents[:, 1:], torch.zeros(len(rewards), T), schedule, prompts, index)
    return Samples(trajectory, torch.tensor(rewards))


def _context(seed: int = 0) -> Context:
    text = torch.tensor([[[1.0, 0.0], [3.0, 2.0]], [[0.0, 0.0], [0.0, 1.0]]])  # [prompts, tokens, channels]
    policy: Any = SimpleNamespace(condition=lambda: {"text": text})
    return Context(policy, torch.ones(4, T, dtype=torch.bool), torch.Generator().manual_seed(seed))


PROMPTS = ["a", "a", "b", "b"]


def test_the_clip_is_two_sided():
    log_prob = torch.tensor([1.3, 0.7, 1.3, 0.7, 1.05]).log().requires_grad_()
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    loss, ratio = Clipped(0.1, form="dpok")(log_prob, torch.zeros(5), advantage)
    assert loss.tolist() == pytest.approx([-1.1, -0.9, 1.1, 0.9, -2.1])
    (grad,) = torch.autograd.grad(loss.sum(), log_prob)
    assert grad.tolist() == pytest.approx([0.0, 0.0, 0.0, 0.0, -2.1])
    assert ratio.tolist() == pytest.approx([1.3, 0.7, 1.3, 0.7, 1.05])


def test_a_fresh_critic_is_no_baseline_and_a_trained_one_knows_the_prompts_mean():
    rewards = [1.0, 0.8, 0.1, -0.1]
    samples = _samples(rewards, PROMPTS)
    standard = (torch.tensor(rewards) - 0.45) / torch.tensor(rewards).std(correction=0)
    first = dpok(value_steps=1, value_learning_rate=1e-12).advantages(samples, _context())
    torch.testing.assert_close(first, standard[:, None].expand(4, T), rtol=1e-4, atol=1e-4)
    learned = dpok(value_steps=400, value_learning_rate=3e-3).advantages(samples, _context())
    assert learned.abs().mean() < 0.2 * first.abs().mean()  # it has seen these very samples


def test_the_baseline_differs_from_step_to_step():
    algorithm = dpok(value_steps=30, value_learning_rate=3e-3)
    advantages = algorithm.advantages(_samples([1.0, 0.8, 0.1, -0.1], PROMPTS), _context())
    assert advantages.std(dim=1).min() > 1e-4


def test_what_the_critic_sees_is_the_latent_the_prompt_and_the_time():
    samples = _samples([0.0] * 4, PROMPTS)
    trajectory = samples.trajectory
    seen = features(trajectory, _context())
    assert seen.shape == (4, T, 2 * 3 * 3 + 2 + 9)
    torch.testing.assert_close(seen[1, 2, :18], trajectory.latents[1, 2].flatten())
    assert seen[0, 0, 18:20].tolist() == [2.0, 1.0]  # the mean over the tokens of prompt a
    assert seen[3, 0, 18:20].tolist() == [0.0, 0.5]
    torch.testing.assert_close(seen[0, :, 20], trajectory.schedule.timesteps / 1000)


def test_large_latents_are_averaged_and_states_that_were_not_sampled_are_zero():
    latents = torch.arange(16.0 * 16).view(1, 1, 1, 16, 16).repeat(1, 2, 1, 1, 1)
    latents[0, 1] = torch.nan
    timesteps: Any = SimpleNamespace(timesteps=torch.tensor([999.0, 1.0]))
    states = torch.cat([latents, latents[:, :1]], 1)
    trajectory = Trajectory(states, latents, torch.zeros(1, 2), timesteps, ["a"], torch.tensor([0]))
    seen = features(trajectory, _context())
    assert seen[0, 0, :64].tolist() == latents[0, 0, 0].view(8, 2, 8, 2).mean((1, 3)).flatten().tolist()
    assert seen[0, 1, :64].abs().max() == 0


def test_the_critic_remembers_the_newest_images_alone():
    algorithm = dpok(buffer_size=5, value_steps=1)
    for seed in range(3):
        algorithm.advantages(_samples([1.0, 2.0, 3.0, 4.0], PROMPTS, seed), _context(seed))
    assert len(algorithm.tensors()["buffer.target"]) == 5


def test_it_resumes_where_it_was():
    straight = dpok(value_steps=3)
    straight.advantages(_samples([1.0, 0.5, 0.2, 0.1], PROMPTS), _context())
    resumed = dpok(value_steps=3)
    resumed.load_tensors({name: value.clone() for name, value in straight.tensors().items()})
    assert resumed.tensors().keys() == straight.tensors().keys()  # also before its first use
    after = _samples([0.3, 0.9, 0.4, 0.2], PROMPTS, seed=1)
    assert torch.equal(straight.advantages(after, _context(1)), resumed.advantages(after, _context(1)))
    for name, value in straight.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name


def test_its_defaults_are_the_originals():
    algorithm = dpok()
    assert algorithm.objective == Clipped(1e-4, None, "dpok")
    assert (algorithm.kl_weight, algorithm.kl_form, algorithm.needs_reference) == (0.01, "output", True)
