"""What is not finite: no reward sees it, its sample leaves the iteration and its group, and is counted."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

from adascope_fast.algorithms.algorithm import Samples
from adascope_fast.algorithms.critic import dpok
from adascope_fast.algorithms.policy_gradient import ddpo, grpo
from adascope_fast.algorithms.preference import d3po
from adascope_fast.algorithms.regression import awm, diffusion_nft
from adascope_fast.engine.scoring import decoded_whole, score_finite

BAD = (1, 4)
GOOD = [0, 2, 3, 5]
ALGORITHMS = {"ddpo": ddpo, "grpo": grpo, "dpok": dpok, "d3po": d3po, "awm": awm, "diffusion_nft": diffusion_nft}
NAN, INFINITE = float("nan"), float("inf")


def _poison(toy: Any, where: str, value: float = NAN, bad: tuple[int, ...] = BAD) -> Any:
    """The toy with samples whose image is not finite; samples are counted as they are decoded."""
    decode, state = toy.decode, {"seen": 0}

    def decode_badly(self: Any, latents: Tensor) -> Tensor:
        rows = [row - state["seen"] for row in bad if state["seen"] <= row < state["seen"] + len(latents)]
        state["seen"] += len(latents)
        images = decode(latents).clone()
        if where == "pixel":
            images[rows, 0, 1, 1] = value
        else:
            images[rows] = value
        return images

    toy.decode = MethodType(decode_badly, toy)
    return toy


def _watching(score: Callable) -> tuple[Callable, list[int]]:
    seen = []

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        assert images.isfinite().all()
        assert len(prompts) == len(images)
        seen.append(len(images))
        return score(images, prompts)

    return reward, seen


def _mean(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3)) + 0.01 * torch.tensor([len(prompt) for prompt in prompts])


@pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE])
@pytest.mark.parametrize("where", ["pixel", "image"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_update_is_that_of_the_finite_samples_alone(
    make_toy: Callable, make_engine: Callable, move: Callable, name: str, where: str, value: float
):
    reward, seen = _watching(_mean)
    toy = _poison(make_toy(torch.float64), where, value)
    got = move(make_engine(toy, ALGORITHMS[name](), score=reward, rollout_batch=4))
    assert sum(seen) == len(GOOD)
    assert got.values["samples_dropped"] == len(BAD)
    algorithm = ALGORITHMS[name]()
    collect = algorithm.collect

    def only_good(collector: Any) -> Samples:
        samples, rows = collect(collector), torch.tensor(GOOD)
        return Samples(samples.trajectory.rows(rows), samples.rewards[rows])

    algorithm.collect = only_good
    want = move(make_engine(make_toy(torch.float64), algorithm, score=_mean, rollout_batch=4))
    assert want.by.norm() > 1e-6
    torch.testing.assert_close(got.by, want.by, rtol=1e-9, atol=1e-12)
    for key in ("reward_mean", "reward_std", "pairs_trained", "fraction_trained"):
        assert got.values[key] == pytest.approx(want.values[key]), key


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_one_pass_leaves_them_out_as_the_replay_does(
    make_toy: Callable, make_engine: Callable, move: Callable, guidance_scale: float
):
    found = []
    for update in ("replay", "one_pass"):
        toy = _poison(make_toy(torch.float64), "image")
        engine = make_engine(toy, grpo(), score=_mean, update=update, guidance_scale=guidance_scale)
        found.append(move(engine))
    assert found[0].by.norm() > 1e-6
    torch.testing.assert_close(found[1].by, found[0].by, rtol=1e-6, atol=1e-9)
    assert [one.values["samples_dropped"] for one in found] == [2, 2]


def test_latents_that_are_not_finite_are_left_out_however_they_are_decoded(make_toy: Callable):
    """`toy.decode` turns an infinite latent into a black image."""
    toy, latents = make_toy(), torch.randn(3, 2, 3, 3)
    latents[1, 0, 0, 0] = -INFINITE
    assert toy.decode(latents).isfinite().all()
    images = decoded_whole(toy, latents)
    assert images.flatten(1).isfinite().all(1).tolist() == [True, False, True]
    assert images[1].isnan().all()
    assert torch.equal(images[[0, 2]], toy.decode(latents[[0, 2]]))
    scores = score_finite(_watching(_mean)[0], images, ["a", "b", "c"])
    assert torch.equal(scores[[0, 2]], _mean(images[[0, 2]], ["a", "c"]))
    assert scores[1].isnan()


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("updates", [1, 2])
def test_without_a_finite_image_nothing_moves_and_no_reward_is_asked(
    make_toy: Callable, make_engine: Callable, move: Callable, name: str, updates: int
):
    reward, seen = _watching(_mean)
    algorithm = ALGORITHMS[name]()
    engine = make_engine(
        _poison(make_toy(), "image", bad=tuple(range(6))), algorithm, score=reward, updates_per_iteration=updates
    )
    state = algorithm.state_dict()
    moved = move(engine)
    assert seen == []
    assert moved.by.abs().max() == 0
    assert algorithm.state_dict() == state
    assert (moved.values["samples_dropped"], moved.values["updates_skipped"]) == (6, updates)
    assert (moved.values["pairs_trained"], moved.values["fraction_trained"]) == (0, 0)


def test_too_few_finite_samples_for_the_updates_count_as_none(
    make_toy: Callable, make_engine: Callable, move: Callable
):
    toy = _poison(make_toy(), "image", bad=(0, 1, 2, 3, 4))
    engine = make_engine(toy, grpo(), score=_mean, updates_per_iteration=2, minibatch="samples")
    moved = move(engine)
    assert moved.by.abs().max() == 0
    assert (moved.values["samples_dropped"], moved.values["updates_skipped"]) == (5, 2)


def test_an_overlapped_reward_sees_no_more(make_toy: Callable):
    """Scoring aside, as on a GPU."""
    from adascope_fast.engine.scoring import Scoring

    reward, seen = _watching(_mean)
    toy = _poison(make_toy(), "pixel")
    latents, prompts = torch.randn(6, 2, 3, 3), list("abcdef")
    with Scoring(toy, reward, prompts, overlap=True) as scoring:
        scoring.submit(slice(0, 4), latents[:4])
        scoring.submit(slice(4, 6), latents[4:])
        scores = scoring.rewards()
    assert scores.isfinite().tolist() == [row not in BAD for row in range(6)]
    assert sum(seen) == 4
