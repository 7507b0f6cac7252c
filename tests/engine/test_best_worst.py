"""The best and worst images of each group are trained; the others count in the advantages alone."""

from collections.abc import Callable

import pytest
import torch

from adascope_fast.algorithms import awm, d3po, ddpo, grpo
from adascope_fast.rollout import EncodedPrompts
from adascope_fast.selectors.best_worst import best_and_worst

PROMPTS = ["a", "a", "b", "a", "a", "b", "a", "c"]
REWARDS = torch.tensor([0.3, 0.9, 0.1, 0.5, 0.1, 0.2, 0.5, 0.0])


def test_the_best_and_worst_of_each_prompt_are_chosen() -> None:
    """By hand: of the five of a, 0.9 and 0.1; both of b; the one of c."""
    assert best_and_worst(REWARDS, PROMPTS, 1).nonzero()[:, 0].tolist() == [1, 2, 4, 5, 7]
    # Two of a on either side, 0.1 0.3 and 0.5 0.9: of the equal ones the earlier counts as the lower.
    assert best_and_worst(REWARDS, PROMPTS, 2).nonzero()[:, 0].tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert best_and_worst(REWARDS, PROMPTS, 3).all()


@pytest.mark.parametrize("make", [ddpo, grpo, lambda: awm(num_draws=2), lambda: d3po(beta=2.0)])
def test_an_iteration_trains_them_and_compares_with_all(
    make_toy: Callable, make_engine: Callable, move: Callable, make: Callable
) -> None:
    """Groups of two images are whole at k = 1, so that all learns the same; a group of six is not."""
    whole, same = (move(make_engine(make_toy(torch.float64), make(), best_worst_k=k)) for k in (None, 1))
    assert torch.equal(whole.by, same.by)
    engine, prompts = make_engine(make_toy(torch.float64), make(), best_worst_k=1), ["see"] * 6
    values = engine.step(EncodedPrompts.of(engine.backbone, prompts), prompts, iteration=0, seed=1).values
    assert 0 < values["pairs_trained"] < whole.values["pairs_trained"]


def test_the_gradient_is_that_of_the_chosen_images_with_the_advantages_of_all(
    make_toy: Callable, make_engine: Callable, sample: Callable
) -> None:
    engine = make_engine(make_toy(torch.float64), grpo(), best_worst_k=1)
    prompts = ["see"] * 6
    seen = []
    loss = engine.algorithm.loss

    def watched(policy, rows, **keys):
        seen.append((rows[0].sample_index.tolist(), rows[1].tolist()))
        return loss(policy, rows, **keys)

    engine.algorithm.loss = watched
    report = engine.step(EncodedPrompts.of(engine.backbone, prompts), prompts, iteration=0, seed=1)
    rewards = report.rewards.double()
    want = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
    found = {row: advantage for rows, values in seen for row, advantage in zip(rows, values, strict=True)}
    assert found.keys() == {int(rewards.argmin()), int(rewards.argmax())}
    for row, advantage in found.items():
        assert advantage == pytest.approx(want[row].item(), rel=1e-5)


def test_what_cannot_know_them_is_refused(make_toy: Callable, make_engine: Callable) -> None:
    with pytest.raises(ValueError, match=r"known after the rollout, in which one_pass .*best_worst_k = 2; set train"):
        make_engine(make_toy(), ddpo(), best_worst_k=2, update="one_pass")
