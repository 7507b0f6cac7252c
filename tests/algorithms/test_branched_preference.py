"""SPO: its loss and gradient against known answers and float64 autograd, and which pairs are trained."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adascope_fast import schedules
from adascope_fast.algorithms import spo
from adascope_fast.algorithms.algorithm import Context, Samples
from adascope_fast.algorithms.preference import preference_loss
from adascope_fast.rollout import Branches, Trajectory

KNOWN = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())["d3po_spo"]
B, T, FIRST = 3, 5, 1


@pytest.mark.parametrize("known", KNOWN, ids=["d3po", "spo"])
def test_the_loss_and_its_gradient_are_the_known_answers(known: dict[str, Any]):
    log_prob = torch.tensor(known["logp"], dtype=torch.float64).view(2, 1).requires_grad_()
    log_ratio = log_prob - torch.tensor(known["logp_ref"], dtype=torch.float64).view(2, 1)
    loss = preference_loss(log_ratio, torch.ones(1, dtype=torch.float64), beta=known["beta"], clip=known["eps"])
    (grad,) = torch.autograd.grad(loss.sum(), log_prob)
    assert known["h"] == [1, -1], "the better one is first"
    assert loss.item() == pytest.approx(known["loss"], rel=1e-12)
    assert grad.flatten().tolist() == pytest.approx(known["dloss_dlogp"], rel=1e-12)


def _samples() -> Samples:
    schedule = schedules.dance_sde(torch.linspace(1, 0.2, T + 1), eta=0.3)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(B, T + 1, 2, 3, 3, generator=generator)
    # Near the latents, so that ratios are within the clip for some rows and beyond it for others.
    better, worse = (0.3 * torch.randn(B, T - FIRST, 2, 3, 3, generator=generator) for _ in range(2))
    prompts = ["a", "b", "b"]
    index = torch.tensor([0, 1, 1])
    trajectory = Trajectory(latents, latents[:, 1:], torch.zeros(B, T), schedule, prompts, index)
    is_live = torch.ones(B, T, dtype=torch.bool)
    is_live[:, 0] = is_live[1, 2] = False
    column = (torch.arange(T) - FIRST).clamp(min=0)
    log_prob = torch.randn(B, T - FIRST, 2, generator=generator)
    return Samples(trajectory, torch.zeros(B), Branches(better, worse, log_prob, is_live, column))


def _context(keep: Tensor) -> Context:
    policy: Any = None
    return Context(policy, keep, torch.Generator().manual_seed(0))


def test_live_pairs_are_trained_at_the_kept_steps():
    keep = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    samples = _samples()
    rows = spo().batch(samples, _context(keep))
    assert rows.rows.tolist() == [[0, 1], [0, 4], [1, 1], [1, 3]]
    assert rows.sample_index.tolist() == [0, 0, 1, 1]
    assert (len(rows), rows.num_forwards, rows.is_live) == (4, 1, None)
    steps, better, worse, recorded, weight = rows.ordered(torch.tensor([3, 1])).take(slice(0, 2))
    branches = samples.branches
    assert branches is not None
    assert steps.sample.equal(samples.trajectory.latents[[1, 0], [3, 4]])
    assert better.equal(branches.better[[1, 0], [2, 3]])
    assert worse.equal(branches.worse[[1, 0], [2, 3]])
    assert recorded.equal(branches.log_prob[[1, 0], [2, 3]].T)
    assert weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("step_weight", ["none", "balanced"])
def test_a_batch_is_the_formula_of_two_densities_from_one_forward(guidance_scale: float, step_weight: Any):
    samples, calls = _samples(), {"policy": 0, "reference": 0}
    schedule, beta, clip = samples.trajectory.schedule, 10.0, 0.2
    factors = torch.tensor([0.5, 0.49], dtype=torch.float64)
    leaves: list[Tensor] = []

    def outputs(sample: Tensor, timestep: Tensor, prompt_index: Tensor) -> tuple[Tensor, Tensor | None]:
        calls["policy"] += len(sample)
        found = [(factor * sample.double()).float().requires_grad_() for factor in factors]
        leaves.extend(found[: 1 if guidance_scale == 1 else 2])
        return found[0], None if guidance_scale == 1 else found[1]

    def reference(sample: Tensor, timestep: Tensor, prompt_index: Tensor) -> Tensor:
        calls["reference"] += len(sample)
        return 0.45 * sample + 0.3

    policy: Any = SimpleNamespace(
        outputs=outputs, reference=reference, schedule=schedule, guidance_scale=guidance_scale, train_guidance="both"
    )
    algorithm = spo(beta=beta, clip_range=clip, step_weight=step_weight)
    rows = algorithm.batch(samples, _context(torch.ones(B, T, dtype=torch.bool)))
    loss = algorithm.loss(policy, rows.take(slice(None)), is_on_policy=True, scale=1.0)
    got = torch.autograd.grad(loss.values.sum(), leaves)
    assert calls == {"policy": len(rows), "reference": len(rows)}

    # SPEC B.6 and B.7, in float64: L = -ln sigmoid(beta sum_k h_k ln clip(r_k, 1 - e, 1 + e)).
    want, outside = [], 0
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    branches = samples.branches
    assert branches is not None
    for number, (sample, step) in enumerate(rows.rows.tolist()):
        x = samples.trajectory.latents[sample, step].double()
        a, b, std = schedule.coef[step].double()
        output = twins[0][number]
        if guidance_scale != 1:
            output = twins[1][number] + guidance_scale * (output - twins[1][number])
        z = torch.zeros((), dtype=torch.float64)
        for sign, table in ((1, branches.better), (-1, branches.worse)):
            y = table[sample, step - FIRST].double()
            here, there = (
                torch.distributions.Normal(a * x + b * m, std).log_prob(y).mean() for m in (output, 0.45 * x + 0.3)
            )
            ratio = (here - there).exp()
            outside += int((ratio - 1).abs() > clip)
            z = z + sign * ratio.clamp(1 - clip, 1 + clip).log()
        weight = 1.0 if step_weight == "none" else float(rows.weight[step])
        want.append(-torch.nn.functional.logsigmoid(beta * weight * z))
    assert 0 < outside < 2 * len(rows), "both sides of the clip are met"
    torch.testing.assert_close(loss.values.double(), torch.stack(want), rtol=2e-4, atol=1e-5)
    for mine, theirs in zip(got, torch.autograd.grad(torch.stack(want).sum(), twins), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-3, atol=1e-5)
    assert loss.statistics["step"].tolist() == rows.rows[:, 1].tolist()


def test_the_candidates_are_asked_for_from_a_fifth_on_or_where_it_is_said():
    asked: dict[str, Any] = {}

    def branched(where: Tensor, **keys: Any) -> str:
        asked.update(keys, where=where.tolist())
        return "samples"

    schedule = schedules.dance_sde(torch.linspace(1, 0, 6), eta=0.3)  # its last step has no noise
    collector: Any = SimpleNamespace(schedule=schedule, branched=branched)
    assert spo().collect(collector) == "samples"  # type: ignore[comparison-overlap]
    last = bool(schedule.trainable[-1])
    assert asked == {
        "where": [False, True, True, True, last],
        "num_candidates": 4,
        "margin": 0.3,
        "temperature": 0.1,
        "preference": None,
    }
    spo(branch_from=3, temperature=2.0, num_candidates=2, margin=0.4).collect(collector)
    assert (asked["where"], asked["temperature"]) == ([False, False, False, True, last], 2.0)
    collector.schedule = schedules.flow_ode(torch.linspace(1, 0, 6))
    with pytest.raises(ValueError, match="draws its candidates by the noise of a step, and flow_ode has none from"):
        spo().collect(collector)


def test_a_choice_of_earlier_steps_alone_is_refused(make_toy: Callable):
    chosen = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]).bool()
    kept = spo(branch_from=2).steps(chosen, torch.ones(5).bool())
    assert kept.tolist() == [[False] * 5, [False, False, True, False, False]]
    with pytest.raises(ValueError, match=r"from algorithm\.branch_from = 3 on, and the selector kept 2"):
        spo(branch_from=3).steps(chosen, torch.ones(5).bool())


def test_no_preference_is_log_two_with_a_ratio_of_one_exactly():
    samples = _samples()
    policy: Any = SimpleNamespace(
        outputs=lambda sample, *_: (0.5 * sample, None),
        reference=lambda sample, *_: 0.5 * sample,
        schedule=samples.trajectory.schedule,
        guidance_scale=1.0,
    )
    algorithm = spo()
    rows = algorithm.batch(samples, _context(torch.ones(B, T, dtype=torch.bool)))
    loss = algorithm.loss(policy, rows.take(slice(None)), is_on_policy=True, scale=1.0)
    assert loss.statistics["ratio"].tolist() == [1.0] * len(rows)
    assert loss.values.tolist() == pytest.approx([math.log(2)] * len(rows))
