"""AWM against values worked by hand: noised latents and their targets, its likelihood, its draws and its penalties."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adascope_fast import schedules
from adascope_fast.algorithms import awm
from adascope_fast.algorithms.algorithm import Context, Samples
from adascope_fast.algorithms.regression import Noised, matching_log_prob, mean_square
from adascope_fast.rollout import Trajectory
from adascope_fast.schedules import Schedule

SHAPE = (2, 3, 3)


def _flow(t: int = 5) -> Schedule:
    return schedules.flow_sde(torch.linspace(1, 0, t + 1), noise_level=0.7)


def _diffusion(prediction: str) -> Schedule:
    alphas = torch.linspace(0.9999, 0.01, 100, dtype=torch.float64)
    return schedules.ddim(alphas, [80, 60, 40, 20, 0], stride=20, eta=1.0, prediction_type=prediction)


def _samples(schedule: Schedule, rewards: list[float], prompts: list[str]) -> Samples:
    t = schedule.num_steps
    latents = torch.randn(len(rewards), t + 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([sorted(set(prompts)).index(prompt) for prompt in prompts])
    trajectory = Trajectory(latents, latents[:, 1:], torch.zeros(len(rewards), t), schedule, prompts, index)
    return Samples(trajectory, torch.tensor(rewards))


@pytest.mark.parametrize(
    ("schedule", "target"),
    [
        (_flow(), lambda x0, noise, signal, sigma: noise - x0),
        (_diffusion("epsilon"), lambda x0, noise, signal, sigma: noise),
        (_diffusion("sample"), lambda x0, noise, signal, sigma: x0),
        (_diffusion("v_prediction"), lambda x0, noise, signal, sigma: signal * noise - sigma * x0),
    ],
    ids=["flow", "epsilon", "sample", "v_prediction"],
)
def test_the_target_is_the_output_that_the_model_was_pretrained_on(schedule: Schedule, target: Any):
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, *SHAPE, generator=generator), torch.randn(3, *SHAPE, generator=generator)
    sample, step = torch.tensor([1, 0, 1]), torch.tensor([1, 2, 3])
    rows = Noised(x0, noise, sample, step, torch.tensor([0, 1]), schedule, torch.ones(3))
    batch = rows.take(torch.arange(3))
    signal, sigma = (level[step].float().view(3, 1, 1, 1) for level in schedule.levels())
    torch.testing.assert_close(batch.sample, signal * x0[sample] + sigma * noise, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch.target, target(x0[sample], noise, signal, sigma), rtol=1e-3, atol=1e-4)
    assert torch.equal(batch.timestep, schedule.timesteps[step])
    torch.testing.assert_close(batch.level, sigma.flatten())


def test_the_likelihoods_weightings_are_the_formulas():
    error, level = torch.tensor([0.25, 4.0]), torch.tensor([0.5, 0.2])
    want = {
        "uniform": [-0.25, -4.0],
        "t": [-0.125, -0.8],
        "t2": [-0.0625, -0.16],
        "huber": [-0.5 * (0.5 - 1e-5), -0.2 * (2 - 1e-5)],
        "ghuber": [-0.5 / 0.25 * (0.25**0.25 - 1e-10**0.25), -0.2 / 0.25 * (4.0**0.25 - 1e-10**0.25)],
    }
    for weighting, values in want.items():
        assert matching_log_prob(error, level, weighting).tolist() == pytest.approx(values, rel=1e-5), weighting


def test_the_gradient_is_the_advantage_times_that_of_the_likelihood():
    schedule = _flow()
    algorithm = awm(kl_weight=0.0, ema_kl_weight=0.0, weighting="t", num_draws=2)
    samples = _samples(schedule, [1.0, 0.0], ["a", "a"])
    output = torch.zeros(4, *SHAPE, requires_grad=True)
    policy: Any = SimpleNamespace(output=lambda *_: output, schedule=schedule)
    keep = torch.zeros(2, 5, dtype=torch.bool)
    keep[:, 1:3] = True
    rows = algorithm.batch(samples, Context(policy, keep, torch.Generator().manual_seed(0)))
    batch = rows.take(torch.arange(4))
    loss = algorithm.loss(policy, batch, is_on_policy=True, scale=1.0)
    (grad,) = torch.autograd.grad(loss.values.sum(), output)
    # dL / dv = -A dlog_prob / dv, and dlog_prob / dv = -t * 2 (v - target) / D with v = 0
    factor = -batch.advantage * batch.level * 2 / math.prod(SHAPE)
    torch.testing.assert_close(grad, factor.view(4, 1, 1, 1) * batch.target)
    # Rewards 1 and 0 are standardised by their population std + 1e-4: +-0.5 / 0.5001, over the clip of 5.
    assert batch.advantage.tolist() == pytest.approx([0.2 / 1.0002] * 2 + [-0.2 / 1.0002] * 2, rel=1e-5)
    assert loss.statistics["ratio"].tolist() == [1.0] * 4


def test_noise_levels_are_drawn_among_the_kept_steps_each_once():
    schedule = _flow(8)
    samples = _samples(schedule, [1.0, 0.0, 3.0], ["a", "a", "a"])
    keep = torch.zeros(3, 8, dtype=torch.bool)
    keep[0, 2:7] = True
    keep[1, 3:5] = True
    keep[2, 0] = True
    seen = set()
    algorithm = awm(num_draws=3, ema_kl_weight=0.0)
    for seed in range(20):
        rows = algorithm.batch(samples, Context(SimpleNamespace(), keep, torch.Generator().manual_seed(seed)))  # type: ignore[arg-type]
        drawn = [(int(s), int(i)) for s, i in zip(rows.sample_index, rows.step, strict=True)]
        assert len(set(drawn)) == len(drawn)
        assert all(keep[s, i] for s, i in drawn)
        assert [sum(s == number for s, _ in drawn) for number in range(3)] == [3, 2, 1]
        seen |= set(drawn)
    assert seen == {(s, i) for s in range(3) for i in range(8) if keep[s, i]}  # in time, all of them


def test_a_deterministic_sampler_can_be_trained():
    schedule = awm().schedule(schedules.flow_ode(torch.linspace(1, 0, 6)))
    assert schedule.trainable.all()


def test_rows_without_advantage_are_live_only_where_a_penalty_acts():
    samples = _samples(_flow(), [1.0, 1.0, 0.0, 3.0], ["a", "a", "b", "b"])
    keep = torch.ones(4, 5, dtype=torch.bool)
    policy: Any = SimpleNamespace(parameters=lambda: [torch.nn.Parameter(torch.ones(1))])
    context = Context(policy, keep, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    rows = awm(kl_weight=0.0, ema_kl_weight=0.0).batch(samples, context)
    assert rows.is_live is not None
    assert rows.is_live.tolist() == (rows.sample_index >= 2).tolist()
    assert awm(kl_weight=0.0).batch(samples, context).is_live is None


def test_the_penalties_are_mean_squared_differences():
    schedule = _flow()
    samples = _samples(schedule, [1.0, 1.0], ["a", "a"])  # no advantage: the penalties alone
    parameter = torch.nn.Parameter(torch.tensor(3.0))
    policy: Any = SimpleNamespace(
        output=lambda sample, *_: sample + parameter,
        reference=lambda sample, *_, is_guided: sample + 1.0,
        frozen=lambda sample, *_: (sample + parameter).detach(),
        parameters=lambda: [parameter],
        schedule=schedule,
    )
    algorithm = awm(kl_weight=0.5, ema_kl_weight=0.25, num_draws=1)
    context = Context(policy, torch.ones(2, 5, dtype=torch.bool), torch.Generator().manual_seed(0))
    rows = algorithm.batch(samples, context)
    with torch.no_grad():
        parameter.fill_(5.0)  # the average stays at 3
    loss = algorithm.loss(policy, rows.take(torch.arange(2)), is_on_policy=False, scale=1.0)
    assert loss.values.tolist() == pytest.approx([0.5 * 4.0**2 + 0.25 * 2.0**2] * 2, rel=1e-5)
    assert parameter.item() == 5.0  # the weights are back
    assert loss.statistics["kl"].tolist() == pytest.approx([16.0, 16.0])


def test_later_updates_have_ratios_to_what_the_policy_said_at_first():
    schedule = _flow()
    samples = _samples(schedule, [1.0, 0.0], ["a", "a"])
    said = {"value": 0.0}
    policy: Any = SimpleNamespace(
        output=lambda sample, *_: torch.full_like(sample, said["value"]),
        frozen=lambda sample, *_: torch.full_like(sample, said["value"]),
        schedule=schedule,
    )
    algorithm = awm(kl_weight=0.0, ema_kl_weight=0.0, weighting="uniform", num_draws=2)
    keep = torch.ones(2, 5, dtype=torch.bool)
    rows = algorithm.batch(
        samples, Context(policy, keep, torch.Generator().manual_seed(0), num_updates=2, microbatch=3)
    )
    said["value"] = 0.5
    batch = rows.take(torch.arange(4))
    loss = algorithm.loss(policy, batch, is_on_policy=False, scale=1.0)
    was, now = mean_square(batch.target), mean_square(0.5 - batch.target)
    torch.testing.assert_close(loss.statistics["ratio"], (was - now).exp())
