"""An iteration of SPO: what it samples, judges and trains, against counts and a loss differentiated as a whole."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_emulation import Emulation
from graph_runs import Run, assert_same
from torch import Tensor

from adascope_fast.algorithms.algorithm import Samples
from adascope_fast.algorithms.preference import spo
from adascope_fast.engine.engine import Engine
from adascope_fast.engine.graphs import Graphs
from adascope_fast.engine.settings import Updates
from adascope_fast.rollout import Candidates
from adascope_fast.schedules.settings import Sampler
from adascope_fast.selectors.simple import StaticRange

B, T, K = 6, 6, 4  # of the engines of `conftest`; their selector keeps steps 1 to 4


class _Judge:
    """A preference model: the mean of the latents."""

    def suit(self, backbone: Any) -> None:
        """It suits all."""

    def __call__(self, candidates: Candidates) -> Tensor:
        return candidates.sample.flatten(1).mean(1)


def _judged(**keys: Any) -> Any:
    judge: Any = _Judge()
    return dataclasses.replace(spo(margin=0.0, **keys), preference=judge)


def _watching(algorithm: Any) -> list[Samples]:
    """The samples that its batches are made of."""
    seen, batch = [], algorithm.batch

    def watched(samples: Samples, context: Any) -> Any:
        seen.append(samples)
        return batch(samples, context)

    algorithm.batch = watched
    return seen


@pytest.mark.parametrize("from_reward", [True, False])
def test_it_branches_and_judges_the_kept_steps_alone(
    make_toy: Callable, make_engine: Callable, move: Callable, from_reward: bool
):
    """By the reward, at one more forward of each candidate; a pair is then one row of the policy and one beside it."""
    toy = make_toy()
    algorithm = spo(margin=0.0, branch_from=2) if from_reward else _judged(branch_from=2)
    values = move(make_engine(toy, algorithm)).values
    guesses = K * B * 3 if from_reward else 0  # steps 2, 3 and 4
    assert values["pairs_trained"] == B * 3
    assert values["forwards_sampled"] == B * T + guesses
    assert toy.num_rows == B * T + guesses + 2 * values["pairs_trained"]
    assert values["fraction_trained"] == pytest.approx(3 / T)
    assert values["rollout_drift_max"] < 1e-5


def test_without_knowing_the_selectors_steps_all_are_branched(
    make_toy: Callable, make_engine: Callable, move: Callable
):
    toy = make_toy()

    class Late(StaticRange):
        def ahead(self, prompts: list[str], schedule: Any, iteration: int) -> None:
            return None

        def __call__(self, trajectory: Any, iteration: int) -> Tensor:
            return torch.tensor([[False, False, True, False, False, False]]).expand(B, T)

    values = move(make_engine(toy, spo(margin=0.0), selector=Late(start=2, end=3))).values
    num_branched = int(toy.schedule(T).trainable[1:].sum())
    assert values["forwards_sampled"] == B * T + K * B * min(num_branched, T - 2)
    assert values["pairs_trained"] == B


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_an_update_is_the_gradient_of_the_whole_loss(
    make_toy: Callable, make_engine: Callable, move: Callable, make_other_reference: Callable, gradient: Callable,
    guidance_scale: float,
):  # fmt: skip
    toy = make_toy(torch.float64)
    other = make_other_reference(make_toy, toy, 0.999)
    algorithm = _judged(beta=10.0, clip_range=0.1)
    seen = _watching(algorithm)
    twin = make_toy(torch.float64)
    by, values = move(make_engine(toy, algorithm, guidance_scale=guidance_scale))
    (samples,) = seen
    branches, trajectory = samples.branches, samples.trajectory
    assert branches is not None
    losses = []
    for step in range(1, 5):
        x, timestep = trajectory.latents[:, step].double(), trajectory.schedule.timesteps[step].expand(B)
        a, b, std = trajectory.schedule.coef[step].double()
        z = torch.zeros(B, dtype=torch.float64)
        for sign, table in ((1, branches.better), (-1, branches.worse)):
            state, densities = table[:, branches.column[step]].double(), []
            for model in (twin, other):
                output = model.predict(x, timestep, model.encode(trajectory.prompts))
                if guidance_scale != 1:
                    without = model.predict(x, timestep, model.encode([""] * B))
                    output = without + guidance_scale * (output - without)
                densities.append(torch.distributions.Normal(a * x + b * output, std).log_prob(state).mean((1, 2, 3)))
            ratio = (densities[0] - densities[1].detach()).exp()
            assert ((ratio - 1).abs() < 0.1).all()
            z = z + sign * ratio.clamp(0.9, 1.1).log()
        losses.append(-torch.nn.functional.logsigmoid(10.0 * z))
    loss = torch.cat(losses).mean()
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-5)
    want = gradient(loss, twin)
    assert (by - want).norm() < 1e-4 * want.norm()


def test_a_sample_that_is_not_finite_leaves_with_its_branches(
    make_toy: Callable, make_engine: Callable, move: Callable
):
    toy, algorithm = make_toy(), _judged()
    seen, decode, count = _watching(algorithm), toy.decode, [0]

    def decode_badly(latents: Tensor) -> Tensor:
        images = decode(latents).clone()
        for row in range(len(latents)):
            if count[0] + row == 1:
                images[row] = torch.nan
        count[0] += len(latents)
        return images

    toy.decode = decode_badly
    values = move(make_engine(toy, algorithm)).values
    (samples,) = seen
    branches, latents = samples.branches, samples.trajectory.latents
    assert branches is not None
    assert values["samples_dropped"] == 1
    assert len(branches.better) == len(branches.is_live) == len(latents) == B - 1
    is_extreme = []
    for step in range(1, 5):  # the walk is one of the candidates: by chance the best or the worst, and never beyond
        walked = latents[:, step + 1].flatten(1)
        better, worse = (table[:, branches.column[step]].flatten(1) for table in (branches.better, branches.worse))
        assert ((worse.mean(1) <= walked.mean(1)) & (walked.mean(1) <= better.mean(1))).all()
        is_extreme.append((better == walked).all(1) | (worse == walked).all(1))
    assert 0 < torch.stack(is_extreme).sum() < 4 * (B - 1)


def test_a_short_tail_leaves_the_pairs_as_they_are(make_toy: Callable, move: Callable):
    found = []
    for share in (1.0, 0.5):
        toy, algorithm = make_toy(), _judged()
        seen = _watching(algorithm)
        engine = Engine(
            toy, toy.schedule(T), algorithm, StaticRange(start=1, end=3), lambda images, _: images.mean((1, 2, 3)),
            torch.optim.SGD(toy.trainable_parameters(), lr=1.0), Updates(rollout_batch=4, microbatch=4),
            sampler=Sampler(tail_share=share),
        )  # fmt: skip
        moved = move(engine)
        found.append((moved, seen[0].branches))
    (plain, want), (short, got) = found
    assert got.better.equal(want.better)
    assert got.worse.equal(want.worse)
    assert short.values["forwards_sampled"] < plain.values["forwards_sampled"]
    torch.testing.assert_close(short.by, plain.by)


def test_graphs_repeat_the_updates_and_say_that_rollouts_run_without(make_toy: Callable):
    def run(graphs: Graphs | None) -> Run:
        return Run(make_toy(), _judged(branch_from=0), graphs, inner_epochs=2, guidance_scale=2.0, images=4)

    lines: list[str] = []
    graphs = Graphs(Emulation(), tell=lines.append)
    assert_same(run(graphs), run(None))
    assert any("a step of the rollout runs without: its candidates are judged on the way" in line for line in lines)
    assert graphs.num_replays > 0
