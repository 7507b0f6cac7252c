"""AWM and DiffusionNFT against known answers: noised latents, likelihood and loss, draws, averages and penalties."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adascope_fast import schedules
from adascope_fast.algorithms import awm, diffusion_nft
from adascope_fast.algorithms.algorithm import Context, Samples
from adascope_fast.algorithms.regression import (
    Noised,
    matching_log_prob,
    mean_square,
    negative_aware_loss,
    noise_levels,
)
from adascope_fast.rollout import Trajectory
from adascope_fast.schedules import Schedule

SHAPE = (2, 3, 3)
VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())


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


def _collected(algorithm: Any, policy: Any, samples: Samples, num_updates: int = 1) -> Noised:
    """The rows of an iteration that keeps every step, as the engine has them made."""
    collector = _Collector(samples, policy, num_updates)
    context = Context(policy, torch.ones(samples.trajectory.log_prob.shape, dtype=torch.bool), _generator())
    return algorithm.batch(algorithm.collect(collector), context)


class _Collector:
    """A rollout that was made already; remembers a weight of the policy during it."""

    def __init__(self, samples: Samples, policy: Any, num_updates: int) -> None:
        self.samples, self.policy, self.num_updates, self.prompts = samples, policy, num_updates, samples.prompts
        self.weight = math.nan

    def __call__(self, prompts: list[str] | None = None) -> Samples:
        if hasattr(self.policy, "parameters"):
            self.weight = self.policy.parameters()[0].item()
        return self.samples


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _double(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


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
    context = Context(SimpleNamespace(), keep, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
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
    rows = _collected(algorithm, policy, samples)
    with torch.no_grad():
        parameter.fill_(5.0)  # the average stays at 3
    loss = algorithm.loss(policy, rows.take(torch.arange(2)), is_on_policy=False, scale=1.0)
    (grad,) = torch.autograd.grad(loss.values.sum(), parameter)
    assert grad.item() == pytest.approx(2 * (0.5 * 2 * 4.0 + 0.25 * 2 * 2.0), rel=1e-5)
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


@pytest.mark.parametrize("case", VECTORS["awm"], ids=lambda case: case["weighting"])
def test_awms_likelihood_is_the_known_answer(case: dict[str, Any]):
    names = {"Uniform": "uniform", "t**2": "t2"}
    weighting = names.get(case["weighting"]) or case["weighting"]
    v = torch.tensor([case["v"]], dtype=torch.float64, requires_grad=True)
    error = (v - torch.tensor([case["target"]], dtype=torch.float64)).square().mean(1)
    level = torch.tensor([case["t"]], dtype=torch.float64)
    found = matching_log_prob(error, level, weighting, power=case["power"])
    (grad,) = torch.autograd.grad(found.sum(), v)
    assert found.item() == pytest.approx(case["logp"], rel=1e-12)
    assert grad[0].tolist() == pytest.approx(case["dlogp_dv"], rel=1e-12)


@pytest.mark.parametrize("case", VECTORS["diffusion_nft"], ids=lambda case: f"beta {case['beta']}")
def test_nfts_loss_is_the_known_answer(case: dict[str, Any]):
    v, old, sample, x0 = (torch.tensor([case[k]], dtype=torch.float64) for k in ("v", "v_old", "xt", "x0"))
    v.requires_grad_()
    coef = torch.tensor([[1.0, -case["t"]]], dtype=torch.float64)
    clip = case["adv_clip"]
    optimality = torch.tensor([case["adv"] / clip / 2 + 0.5], dtype=torch.float64)
    loss = clip * negative_aware_loss(v, old, sample, x0, coef, optimality, beta=case["beta"])
    (grad,) = torch.autograd.grad(loss.sum(), v)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-12)
    assert grad[0].tolist() == pytest.approx(case["dloss_dv"], rel=1e-12)


def _published(v: Any, old: Any, xt: Any, x0: Any, t: Any, advantage: Any, *, beta: float) -> torch.Tensor:
    """SPEC B.11 of each sample, in its letters; advantages are before their clip at 5."""
    r = (advantage.clamp(-5, 5) / 5 / 2 + 0.5).clamp(0, 1)
    t, total = t.view(-1, 1, 1, 1), 0
    for share, mixed in ((r, beta * v + (1 - beta) * old), (1 - r, (1 + beta) * old - beta * v)):
        guess = xt - t * mixed
        weight = (guess - x0).abs().mean(dim=(1, 2, 3)).clamp(min=1e-5).detach()
        total = total + share * ((guess - x0).square().mean(dim=(1, 2, 3)) / weight)
    return 5 * total / beta


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nfts_loss_and_gradient_are_the_papers_formula(beta: float):
    """Also of guesses that are exact, where the divisor is its least."""
    v, old, x0, noise = (_double(6, *SHAPE, seed=seed) for seed in range(4))
    old[5] = v[5] = (noise - x0)[5]
    t = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    xt = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * noise
    advantage = torch.tensor([-7.0, -2.0, 0.0, 0.3, 4.0, 1.0], dtype=torch.float64)
    v.requires_grad_()
    want = _published(v, old, xt, x0, t, advantage, beta=beta)
    coef = torch.stack([torch.ones_like(t), -t], 1)
    found = 5 * negative_aware_loss(v, old, xt, x0, coef, (advantage.clamp(-5, 5) / 5 + 1) / 2, beta=beta)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-15)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    grads = [torch.autograd.grad((loss * weights).sum(), v, retain_graph=True)[0] for loss in (found, want)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-9)  # rounding over 1e-5 where the guess is exact


def test_a_samples_nft_loss_does_not_depend_on_its_batch():
    v, old, sample, x0 = (_double(5, *SHAPE, seed=seed) * torch.arange(1.0, 6.0).view(-1, 1, 1, 1) for seed in range(4))
    coef = torch.tensor([[1.0, -0.1], [1.0, -0.5], [1.0, -1.0], [3.0, -2.0], [0.5, 2.0]], dtype=torch.float64)
    optimality = torch.linspace(0, 1, 5, dtype=torch.float64)
    whole = negative_aware_loss(v, old, sample, x0, coef, optimality, beta=0.7)
    for row in range(5):
        one = slice(row, row + 1)
        parts = v[one], old[one], sample[one], x0[one], coef[one], optimality[one]
        alone = negative_aware_loss(*parts, beta=0.7)
        torch.testing.assert_close(whole[one], alone, rtol=1e-14, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_nfts_loss_is_that_of_the_flow_at_the_same_signal_to_noise_ratio(prediction: str):
    """A diffusion latent over (signal + sigma) is a flow's at t = sigma / (signal + sigma), with the same guesses."""
    schedule = _diffusion(prediction)
    x0, noise, one, other = (_double(4, *SHAPE, seed=seed) for seed in range(4))
    step = torch.tensor([0, 1, 2, 3])
    signal, sigma = (level[step].view(-1, 1, 1, 1) for level in schedule.levels())
    of_x, of_output = (part.view(-1, 1, 1, 1) for part in schedule.x0_coef[step].double().unbind(1))
    sample = signal * x0 + sigma * noise
    t = sigma / (signal + sigma)
    x = sample / (signal + sigma)
    v, old = ((x - (of_x * sample + of_output * output)) / t for output in (one, other))
    optimality = torch.tensor([0.0, 0.2, 0.9, 1.0], dtype=torch.float64)
    flow_coef = torch.stack([torch.ones(4, dtype=torch.float64), -t.flatten()], 1)
    want = negative_aware_loss(v, old, x, x0, flow_coef, optimality, beta=0.5)
    coef = schedule.x0_coef[step].double()
    found = negative_aware_loss(one, other, sample, x0, coef, optimality, beta=0.5)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def _moving(parameter: torch.nn.Parameter, schedule: Schedule) -> Any:
    return SimpleNamespace(
        output=lambda sample, *_: sample * 0.1 + parameter,
        reference=lambda sample, *_, is_guided: sample * 0.1 + 1.0,
        frozen=lambda sample, *_: (sample * 0.1 + parameter).detach(),
        parameters=lambda: [parameter],
        schedule=schedule,
    )


def test_nft_draws_images_with_the_moving_average_and_compares_with_it():
    schedule = _flow()
    samples = _samples(schedule, [1.0, 0.0], ["a", "a"])
    parameter = torch.nn.Parameter(torch.tensor(3.0))
    algorithm, policy = diffusion_nft(kl_weight=0.0, beta=0.5), _moving(parameter, schedule)
    expected = 3.0
    for decay, weight in ((0.0, 3.0), (0.003, 4.0), (0.006, 5.0)):  # 0.001 n before updates 0, 3 and 6
        with torch.no_grad():
            parameter.fill_(weight)
        collector: Any = _Collector(samples, policy, 3)  # three updates in each iteration
        rows = algorithm.batch(
            algorithm.collect(collector), Context(policy, torch.ones(2, 5, dtype=torch.bool), _generator())
        )
        expected = decay * expected + (1 - decay) * weight
        assert collector.weight == pytest.approx(expected, rel=1e-6)
        assert parameter.item() == weight, "the policy is back"
        batch = rows.take(torch.arange(10))
        loss = algorithm.loss(policy, batch, is_on_policy=True, scale=1.0)
        v, old = batch.sample * 0.1 + weight, batch.sample * 0.1 + expected
        want = _published(v, old, batch.sample, batch.x0, batch.level, batch.advantage * 5, beta=0.5)
        torch.testing.assert_close(loss.values.detach(), want, rtol=1e-5, atol=1e-6)


def test_nfts_difference_from_the_reference_has_its_gradient():
    """With the policy at its average and an advantage of 0, good and bad cancel and the penalty alone is left."""
    samples = _samples(_flow(), [1.0, 1.0], ["a", "a"])
    parameter = torch.nn.Parameter(torch.tensor(3.0))
    policy, algorithm = _moving(parameter, samples.trajectory.schedule), diffusion_nft(kl_weight=0.5)
    rows = _collected(algorithm, policy, samples)
    assert len(rows) == 10
    assert rows.is_live is None
    batch = rows.take(torch.arange(10))
    loss = algorithm.loss(policy, batch, is_on_policy=True, scale=1.0)
    (grad,) = torch.autograd.grad(loss.values.sum(), parameter)
    assert grad.item() == pytest.approx(10 * 0.5 * 2 * (3.0 - 1.0), rel=1e-4)
    assert loss.statistics["kl"].tolist() == pytest.approx([4.0] * 10, rel=1e-5)
    assert not loss.statistics["kl"].requires_grad


@pytest.mark.parametrize(
    ("make", "asked"),
    [
        (lambda: diffusion_nft(), ["average", "policy", "reference"]),
        (lambda: diffusion_nft(kl_weight=0.0), ["average", "policy"]),
        (lambda: awm(), ["average", "policy", "reference"]),
        (lambda: awm(kl_weight=0.0, ema_kl_weight=0.0), ["policy"]),
    ],
    ids=["nft", "nft without kl", "awm", "awm alone"],
)
def test_each_output_is_asked_for_once_and_the_policys_alone_has_a_gradient(make: Any, asked: list[str]):
    samples, said = _samples(_flow(), [1.0, 0.0], ["a", "a"]), []
    parameter = torch.nn.Parameter(torch.tensor(3.0))
    moving = _moving(parameter, samples.trajectory.schedule)

    def noting(name: str, output: Any) -> Any:
        def called(sample: torch.Tensor, *rest: Any, **keys: Any) -> torch.Tensor:
            said.append(name)
            return output(sample, *rest, **keys)

        return called

    names = {"output": "policy", "frozen": "average", "reference": "reference"}
    policy: Any = SimpleNamespace(
        **vars(moving) | {key: noting(name, vars(moving)[key]) for key, name in names.items()}
    )
    rows = _collected(make(), policy, samples)
    algorithm = make()
    algorithm.collect(_Collector(samples, policy, 1))
    loss = algorithm.loss(policy, rows.take(torch.arange(2)), is_on_policy=True, scale=1.0)
    assert said == asked
    assert all(not value.requires_grad for value in loss.statistics.values())


@pytest.mark.parametrize(
    ("kind", "decays"),
    [
        ("none", {0: 0.0, 10: 0.0, 2000: 0.0}),
        ("type_1", {0: 0.0, 10: 0.01, 500: 0.5, 2000: 0.5}),
        ("type_2", {0: 0.0, 75: 0.0, 85: 0.075, 208: 0.9975, 209: 0.999, 2000: 0.999}),
    ],
)
def test_the_average_decays_as_published(kind: str, decays: dict[int, float]):
    parameter = torch.nn.Parameter(torch.tensor(0.0))
    samples = _samples(_flow(), [1.0, 0.0], ["a", "a"])
    for n, decay in decays.items():
        algorithm = diffusion_nft(ema_decay_type=kind)
        algorithm.load_tensors({"0": torch.tensor(1.0), "num_updates": torch.tensor(n)})
        collector: Any = _Collector(samples, _moving(parameter, samples.trajectory.schedule), 1)
        algorithm.collect(collector)
        assert collector.weight == pytest.approx(decay, abs=1e-6), n
        assert algorithm.tensors()["num_updates"] == n + 1


def test_draws_are_one_from_each_part_of_the_kept_steps():
    """Of 14 steps from 1 to 12 that is AWM's `discrete_wo_init`: one of [1, 2), [2, 4), ..., [10, 12)."""
    keep = torch.zeros(4, 14, dtype=torch.bool)
    keep[:, 1:12] = True
    keep[3] = False
    keep[3, [0, 2, 9]] = True  # fewer than there are draws
    seen = [set() for _ in range(6)]
    for seed in range(40):
        sample, step = noise_levels(keep, 6, torch.Generator().manual_seed(seed))
        assert sample.tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 3
        assert step[18:].tolist() == [0, 2, 9]
        for part in range(6):
            seen[part] |= set(step[:18].view(3, 6)[:, part].tolist())
    assert seen == [{1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}]


def test_without_a_number_of_draws_every_kept_step_is_trained_once():
    keep = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]]).bool()
    sample, step = noise_levels(keep, None, _generator())
    assert list(zip(sample.tolist(), step.tolist(), strict=True)) == [(0, 0), (0, 2), (2, 1), (2, 2)]
