"""Which outputs carry gradient under classifier-free guidance: both, or the conditional one alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from adascope_fast.algorithms.objectives import Clipped
from adascope_fast.algorithms.policy_gradient import ddpo, grpo

SCALE = 3.0
WAYS = ["fused", "own", "one_pass"]


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_that_of_the_outputs_that_carry_it(
    make_toy: Callable,
    make_engine: Callable,
    move: Callable,
    sample: Callable,
    outputs: Callable,
    log_probs: Callable,
    gradient: Callable,
    way: str,
):
    """By hand: -A log p of the guided output, with `output_uncond.detach()` for "conditional"."""
    algorithm = ddpo(advantage="batch", clip_range=0.1)
    if way == "own":
        algorithm = replace(algorithm, objective=Clipped(0.1).__call__)
    found = {}
    for train_guidance in ("both", "conditional"):
        toy, rewards = make_toy(torch.float64), []
        score = lambda images, prompts, seen=rewards: (seen.append(images.mean((1, 2, 3))), seen[-1])[1]  # noqa: E731
        options: dict[str, Any] = {"guidance_scale": SCALE, "train_guidance": train_guidance, "score": score}
        engine = make_engine(toy, algorithm, update="one_pass" if way == "one_pass" else "replay", **options)
        trajectory, got = sample(engine), move(engine).by
        reward = torch.cat(rewards).double()
        advantage = (reward - reward.mean()) / (reward.std(correction=0) + 1e-8)
        fresh = make_toy(torch.float64)
        guided = outputs(fresh, trajectory, SCALE, is_conditional=train_guidance == "conditional")
        loss = -(advantage[:, None] * log_probs(trajectory, guided)[:, 1:5]).mean()
        want = gradient(loss, fresh)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())
        found[train_guidance] = got
    both, conditional = found["both"], found["conditional"]
    assert (both - conditional).norm() > 0.1 * both.norm()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("make", "own"), [(ddpo, "both"), (grpo, "conditional")])
def test_an_algorithm_has_its_own_convention_until_the_sampler_names_one(
    make_toy: Callable, make_engine: Callable, move: Callable, make: Callable, own: str, way: str
):
    moved = {}
    for train_guidance in (None, "both", "conditional"):
        algorithm = make(clip_range=0.1)
        if way == "own":
            algorithm = replace(algorithm, objective=Clipped(0.1).__call__)
        update = "one_pass" if way == "one_pass" else "replay"
        options: dict[str, Any] = {"guidance_scale": SCALE, "train_guidance": train_guidance, "update": update}
        engine = make_engine(make_toy(torch.float64), algorithm, **options)
        assert engine.train_guidance == (train_guidance or own)
        moved[train_guidance] = move(engine).by
    assert torch.equal(moved[None], moved[own])
    assert not torch.allclose(moved["both"], moved["conditional"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("train_guidance", ["both", "conditional"])
def test_either_way_a_pair_costs_two_rows(
    make_toy: Callable, make_engine: Callable, move: Callable, train_guidance: str
):
    toy = make_toy()
    values = move(make_engine(toy, ddpo(), guidance_scale=SCALE, train_guidance=train_guidance)).values
    assert toy.num_rows == 2 * values["forwards_sampled"] + 2 * values["pairs_trained"]


def test_without_guidance_there_is_nothing_to_choose(make_toy: Callable, make_engine: Callable):
    with pytest.raises(ValueError, match=r"got sampler\.guidance_scale = 1, which is none"):
        make_engine(make_toy(), ddpo(), train_guidance="conditional")
