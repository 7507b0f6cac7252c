"""The learning rate of each update: as transformers has it, by the update's number alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.optimization import get_scheduler

from adascope_fast.algorithms.policy_gradient import ddpo
from adascope_fast.engine.optimizer import rate_of
from adascope_fast.rollout import EncodedPrompts

PROMPTS = ["a red one", "a red one", "the green", "the green", "see", "see"]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine_with_restarts"])
def test_rates_are_those_of_transformers(name: str, warmup: int):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    theirs = "constant_with_warmup" if name == "constant" and warmup else name
    more: dict[str, Any] = {"scheduler_specific_kwargs": {"num_cycles": 2}} if name == "cosine_with_restarts" else {}
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=11, **more)
    want = []
    for _ in range(11):
        want.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    rate = rate_of(0.3, name, warmup_updates=warmup, num_updates=11, num_cycles=2 if more else 1)
    assert [rate(number) for number in range(11)] == pytest.approx(want, abs=1e-15)
    assert (want[0] == 0) is bool(warmup)


def test_a_rate_needs_no_other_before_it():
    rate = rate_of(0.3, "linear", warmup_updates=2, num_updates=10)
    assert rate(6) == pytest.approx(0.3 * 4 / 8)
    assert rate(1) == pytest.approx(0.3 / 2)


@pytest.mark.parametrize("skipped", [(), (1,), (0, 1, 2)])
def test_each_update_has_its_own_rate_and_skipped_ones_count(
    make_toy: Callable, make_engine: Callable, skipped: tuple[int, ...]
):
    """SGD of clipped gradients: an update moves the parameters by its rate, whatever the optimiser began with."""
    toy, moved = make_toy(torch.float64), []
    engine = make_engine(toy, ddpo(), max_grad_norm=1e-9, updates_per_iteration=3, learning_rate=100.0)
    engine._rate = lambda number: [0.0, 1.0, 2.0, 3.0, 4.0, 5.0][number]
    update = engine._optimizer_step

    def watched() -> Tensor:
        before = [parameter.detach().clone() for parameter in toy.trainable_parameters()]
        if len(moved) in skipped:
            toy.trainable_parameters()[0].grad.fill_(torch.nan)
        norm = update()
        pairs = zip(before, toy.trainable_parameters(), strict=True)
        moved.append(sum((old - new).square().sum().item() for old, new in pairs) ** 0.5 / 1e-9)
        return norm

    engine._optimizer_step = watched
    encoded = EncodedPrompts.of(toy, PROMPTS)
    for iteration in (0, 1):
        engine.step(encoded, PROMPTS, iteration=iteration, seed=iteration)
    assert moved == pytest.approx([0.0 if n in skipped else n for n in range(6)], rel=1e-3, abs=1e-3)


def test_an_iteration_without_an_update_counts_too(make_toy: Callable, make_engine: Callable):
    engine, seen = make_engine(make_toy(), ddpo(), updates_per_iteration=3), []
    engine._rate = lambda number: seen.append(number) or 1.0
    encoded, good = EncodedPrompts.of(engine.backbone, PROMPTS), engine.score
    engine.score = lambda images, prompts: torch.full((len(prompts),), torch.nan)
    engine.backbone.decode = lambda latents, decode=engine.backbone.decode: decode(latents) * torch.nan
    engine.step(encoded, PROMPTS, iteration=0, seed=0)
    assert seen == []
    engine.score = good
    del engine.backbone.decode
    engine.step(encoded, PROMPTS, iteration=1, seed=1)
    assert seen == [3, 4, 5]
