"""Rewards computed aside are the rewards computed in line, and their errors are not lost."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adascope_fast.engine.scoring import Scoring

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def _latents() -> Tensor:
    return torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(1))


def _score(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])


@pytest.mark.parametrize("overlap", [None, True])
def test_every_sample_meets_its_own_prompt(make_toy: Callable, overlap: bool | None):
    toy, latents = make_toy(), _latents()
    with Scoring(toy, _score, PROMPTS, overlap=overlap) as scoring:
        scoring.submit(slice(0, 5), torch.zeros_like(latents))
        scoring.clear()
        for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
            scoring.submit(rows, latents[rows])
        rewards = scoring.rewards()
    torch.testing.assert_close(rewards, _score(toy.decode(latents), PROMPTS))


def test_a_reward_runs_beside_the_rollout(make_toy: Callable):
    went_on = threading.Event()

    def slow(images: Tensor, prompts: list[str]) -> Tensor:
        assert went_on.wait(30), "the rollout waits for the reward"
        return _score(images, prompts)

    with Scoring(make_toy(), slow, PROMPTS, overlap=True) as scoring:
        scoring.submit(slice(0, 5), _latents())
        went_on.set()
        assert scoring.rewards().shape == (5,)


@pytest.mark.parametrize("overlap", [None, True])
def test_an_error_of_the_reward_reaches_the_caller(make_toy: Callable, overlap: bool | None):
    def broken(images: Tensor, prompts: list[str]) -> Tensor:
        raise RuntimeError("no such judge")

    with Scoring(make_toy(), broken, PROMPTS, overlap=overlap) as scoring:
        scoring.submit(slice(0, 5), _latents())
        with pytest.raises(RuntimeError, match="no such judge"):
            scoring.rewards()
