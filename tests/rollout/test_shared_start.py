"""Samples of a prompt that start from one latent: what they share is computed once, and changes nothing else."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graph_emulation import Emulation
from graph_runs import SCENES, Run, assert_same

from adascope_fast.algorithms.policy_gradient import grpo, mix_grpo
from adascope_fast.engine.graphs import Graphs
from adascope_fast.rollout import EncodedPrompts, OwnNoise, SharedStart, Trajectory, rollout
from adascope_fast.schedules import Schedule
from adascope_fast.schedules.tail import Tails
from adascope_fast.selectors.windows import Window

T = 6
PROMPTS = ["a red one", "see", "a red one", "a red one", "the green", "see", "the green"]
LEADERS = [0, 1, 0, 0, 4, 1, 4]


def _rollout(toy: Any, schedule: Schedule, *, batch: int = 3, **how: Any) -> Trajectory:
    encoded = EncodedPrompts.of(toy, PROMPTS)
    return rollout(toy, schedule, encoded, PROMPTS, guidance_scale=2.0, noise=OwnNoise(7), batch=batch, **how)


def _window(toy: Any, start: int) -> Schedule:
    return toy.schedule(T, kind="flow_sde").window(start, start + 2)


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_shared_steps_are_computed_once_and_change_nothing(make_toy: Callable, start: int, batch: int):
    toy = make_toy(torch.float64)
    schedule = _window(toy, start)
    shared = SharedStart.of(PROMPTS, schedule)
    assert shared.leader.tolist() == LEADERS == shared.first
    assert shared.num_shared == start
    toy.num_rows = 0
    seen: list[int] = []
    got = _rollout(toy, schedule, batch=batch, shared=shared, on_step=seen.append)
    assert toy.num_rows == 2 * sum(seen), "with and without the prompt"
    assert sum(seen) == 7 * T - shared.num_saved == 7 * T - 4 * start
    want = _rollout(toy, schedule, batch=batch, shared=replace(shared, num_shared=0))
    for name in ("latents", "x0", "log_prob", "x0_correlation", "sample_correlation"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_group_starts_from_the_latent_that_its_first_sample_draws_alone(make_toy: Callable):
    toy = make_toy()
    schedule = toy.schedule(T)
    alone, together = (_rollout(toy, schedule, shared=b) for b in (None, SharedStart.of(PROMPTS, schedule)))
    assert torch.equal(together.latents[:, 0], alone.latents[LEADERS, 0])
    # The noise of each step is its own and what it was: the first samples of each prompt walk as they did.
    first = sorted(set(LEADERS))
    torch.testing.assert_close(together.latents[first], alone.latents[first])
    assert not torch.equal(together.latents[0, 1], together.latents[2, 1])


def test_samples_that_leave_the_sampler_before_they_part_walk_alone(make_toy: Callable):
    toy = make_toy()
    schedule = _window(toy, 2)
    keep = torch.zeros(len(PROMPTS), T, dtype=torch.bool)
    keep[:, 2:4] = True
    tails = Tails.of(schedule, keep, 0.5)
    assert SharedStart.of(PROMPTS, schedule, tails).num_shared == 2
    keep[1] = False  # a tail alone
    assert SharedStart.of(PROMPTS, schedule, Tails.of(schedule, keep, 0.5)).num_shared == 0


@pytest.mark.parametrize("tail_share", [1.0, 0.5])
def test_an_iteration_counts_what_it_sampled(make_toy: Callable, tail_share: float):
    """A window at steps 2 and 3 of 4 and six images of three prompts: three of them skip two steps."""
    window: dict[str, Any] = {"start": 2, "window_size": 1, "last_step": "train"}
    found = {}
    for noise in ("own", "group"):
        toy = make_toy()
        run = Run(toy, grpo(initial_noise=noise), None, selector=Window(**window), iterations=1, tail_share=tail_share)
        found[noise] = run.values["forwards_sampled"]
    assert found["own"] - found["group"] == 3 * 2


def test_iterations_with_shared_noise_are_recorded_alike(make_toy: Callable):
    """Graphs replay the leaders' steps, as a batch of their own size, to the bit."""

    def run(graphs: Graphs | None) -> Run:
        options: dict[str, Any] = {"start": 1, "window_size": 2, "shift_every": 1}
        return Run(make_toy(), mix_grpo(), graphs, selector=Window(**options), prompts=SCENES, images=2, microbatch=2)

    graphs = Graphs(Emulation())
    assert_same(run(graphs), run(None))
    assert graphs.num_replays > 0
