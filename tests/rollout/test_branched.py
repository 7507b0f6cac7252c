"""A branched rollout: the walk is the plain one, candidates are draws of its steps, and the best and worst are kept.

Axes: `b` samples, `t` steps, `k` candidates.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adascope_fast.rollout import Branching, Candidates, Denoising, EncodedPrompts, OwnNoise, Trajectory, rollout

PROMPTS = ["a red one", "a red one", "the green", "see", "see"]
T, K, FIRST = 5, 4, 2


class _Judge:
    """Scores by the first latent element; remembers what it was shown."""

    def __init__(self, scores: Callable[[Candidates], Tensor] = lambda one: one.sample.flatten(1)[:, 0]) -> None:
        self.shown: list[Candidates] = []
        self._scores = scores

    def __call__(self, candidates: Candidates) -> Tensor:
        self.shown.append(candidates)
        return self._scores(candidates)


def _from(first: int) -> Tensor:
    return (torch.arange(T) >= first).expand(len(PROMPTS), T)


def _branched(
    toy: Any,
    judge: Any = None,
    *,
    where: Tensor | None = None,
    batch: int = 5,
    guidance_scale: float = 1.0,
    margin: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Trajectory, Branching]:
    schedule, encoded = toy.schedule(T), EncodedPrompts.of(toy, PROMPTS)
    branching = Branching(
        Denoising(toy, schedule, encoded, guidance_scale),
        _from(FIRST) if where is None else where,
        PROMPTS,
        judge or _Judge(),
        num_candidates=K,
        margin=margin,
        temperature=temperature,
        noise=OwnNoise(4),
    )
    options: dict[str, Any] = {"guidance_scale": guidance_scale, "noise": OwnNoise(3), "batch": batch}
    return rollout(toy, schedule, encoded, PROMPTS, advance=branching, **options), branching


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_the_walk_is_that_of_a_plain_rollout_and_costs_as_many_forwards(make_toy: Callable, guidance_scale: float):
    toy, plain = make_toy(), make_toy()
    got, _ = _branched(toy, guidance_scale=guidance_scale)
    options: dict[str, Any] = {"guidance_scale": guidance_scale, "noise": OwnNoise(3), "batch": 5}
    want = rollout(plain, plain.schedule(T), EncodedPrompts.of(plain, PROMPTS), PROMPTS, **options)
    for name in ("latents", "x0", "log_prob"):
        assert getattr(got, name).equal(getattr(want, name)), name
    assert toy.num_rows == plain.num_rows


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_candidates_are_draws_of_the_step_and_the_extreme_ones_are_kept(make_toy: Callable, guidance_scale: float):
    toy, judge = make_toy(torch.float64), _Judge()
    trajectory, branching = _branched(toy, judge, guidance_scale=guidance_scale)
    kept, noise = branching.branches, []
    assert kept.better.shape == (5, T - FIRST, *toy.latent_shape)
    for step in range(FIRST, T):
        states = torch.stack([one.sample for one in judge.shown[(step - FIRST) * K :][:K]])  # [k, b, ...]
        assert states[0].equal(trajectory.latents[:, step + 1])
        scores, column = states.flatten(2)[:, :, 0], step - FIRST
        for sample in range(5):
            assert kept.better[sample, column].equal(states[scores[:, sample].argmax(), sample])
            assert kept.worse[sample, column].equal(states[scores[:, sample].argmin(), sample])
        x, timestep = trajectory.latents[:, step].double(), trajectory.schedule.timesteps[step].expand(5)
        output = toy.predict(x, timestep, toy.encode(PROMPTS))
        if guidance_scale != 1:
            without = toy.predict(x, timestep, toy.encode([""] * 5))
            output = without + guidance_scale * (output - without)
        a, b, std = trajectory.schedule.coef[step].double()
        normal = torch.distributions.Normal(a * x + b * output, std)
        for state, log_prob in zip((kept.better, kept.worse), kept.log_prob.unbind(2), strict=True):
            want = normal.log_prob(state[:, column].double()).mean((1, 2, 3))
            torch.testing.assert_close(log_prob[:, column].double(), want, rtol=1e-4, atol=1e-5)
        noise.append((states.double() - normal.mean) / std)
    drawn = torch.stack(noise).flatten(3)  # [s, k, b, d]
    assert drawn.mean().item() == pytest.approx(0, abs=0.1)
    assert drawn.std().item() == pytest.approx(1, abs=0.1)
    likeness = drawn.flatten(0, 2) @ drawn.flatten(0, 2).T / drawn.shape[-1]
    assert (likeness - torch.diag(likeness.diag())).abs().max() < 0.95, "no two have the same noise"


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_what_is_found_of_a_sample_does_not_depend_on_its_batch(make_toy: Callable, batch: int):
    _, want = _branched(make_toy(), margin=0.3, temperature=0.5)
    _, got = _branched(make_toy(), margin=0.3, temperature=0.5, batch=batch)
    assert got.branches.is_live.equal(want.branches.is_live)
    assert 0 < want.branches.is_live.sum() < 5 * (T - FIRST)
    for name in ("better", "worse", "log_prob"):
        torch.testing.assert_close(getattr(got.branches, name), getattr(want.branches, name), rtol=1e-5, atol=1e-5)


def test_a_pair_is_live_where_its_probabilities_differ_by_more_than_the_margin(make_toy: Callable):
    """p - (1 - p) = tanh(difference / (2 temperature)): above 0.3 from a difference of 0.619 temperatures on."""
    for difference, is_live in ((0.61, False), (0.63, True)):
        calls: list[int] = []

        def scores(one: Candidates, difference: float = difference, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return torch.full((len(one.sample),), 7.0 + 2.0 * difference * (len(calls) % K == 3))

        _, branching = _branched(make_toy(), _Judge(scores), margin=0.3, temperature=2.0)
        want = _from(FIRST) & is_live
        assert branching.branches.is_live.equal(want)
    assert math.tanh(0.619 / 2) == pytest.approx(0.3, abs=1e-3)


def test_states_that_cannot_be_judged_are_no_part_of_a_pair(make_toy: Callable):
    calls: list[int] = []

    def scores(one: Candidates) -> Tensor:
        calls.append(1)
        value = [1.0, math.nan, 3.0, math.nan][len(calls) % K]
        found = torch.full((len(one.sample),), value)
        found[0] = math.nan
        return found

    judge = _Judge(scores)
    _, branching = _branched(make_toy(), judge)
    kept = branching.branches
    assert kept.is_live[:, FIRST:].tolist() == [[False] * 3] + [[True] * 3] * 4
    assert kept.better[1, 0].equal(
        judge.shown[1].sample[1]
    )  # calls count from 1: 1 -> nan, 2 -> 3.0, 3 -> nan, 4 -> 1.0
    assert kept.worse[1, 0].equal(judge.shown[3].sample[1])


def test_only_the_asked_for_steps_of_samples_are_branched(make_toy: Callable):
    where = torch.zeros(5, T, dtype=torch.bool)
    where[1, 1] = where[4, 1] = where[2, 3] = True
    judge = _Judge()
    trajectory, branching = _branched(make_toy(), judge, where=where, batch=2)
    kept = branching.branches
    assert kept.is_live.equal(where)
    assert kept.better.shape[1] == 2
    assert sum(len(one.sample) for one in judge.shown) == K * 3
    assert [one.prompts for one in judge.shown[::K]] == [["a red one"], ["the green"], ["see"]]
    assert kept.better[2, kept.column[3]].isfinite().all()
    assert trajectory.latents.isfinite().all()


def test_a_clean_guess_is_of_the_state_that_enters_the_next_step_and_an_image_is_its_own(make_toy: Callable):
    toy = make_toy(torch.float64)
    judge = _Judge(lambda one: one.clean().flatten(1).float().mean(1))
    trajectory, branching = _branched(toy, judge)
    schedule = trajectory.schedule
    assert branching.num_guesses == K * 5 * (T - FIRST - 1)
    for number, one in enumerate(judge.shown):
        state = FIRST + number // K + 1
        if state == T:
            assert one.timestep.tolist() == [0.0] * 5
            assert one.clean().equal(one.sample)
            continue
        timestep = schedule.timesteps[state].expand(5)
        assert one.timestep.equal(timestep)
        output = toy.predict(one.sample.double(), timestep, toy.encode(PROMPTS))
        of_x, of_output = schedule.x0_coef[state].double()
        torch.testing.assert_close(one.clean().double(), of_x * one.sample.double() + of_output * output)
        assert one.condition["text"].equal(toy.encode(PROMPTS)["text"])


def test_rows_of_branches_are_those_of_the_samples(make_toy: Callable):
    _, branching = _branched(make_toy())
    chosen = branching.branches.rows(torch.tensor([3, 0]))
    assert chosen.better.equal(branching.branches.better[[3, 0]])
    assert chosen.is_live.equal(branching.branches.is_live[[3, 0]])
    assert chosen.column.equal(branching.branches.column)
