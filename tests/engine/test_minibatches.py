"""Several updates of an iteration: epochs over all rows, minibatches of pairs or of whole samples."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adascope_fast.algorithms.policy_gradient import Pairs, ddpo
from adascope_fast.algorithms.preference import d3po
from adascope_fast.rollout import EncodedPrompts

SAMPLES, STEPS = 6, 4
PAIRS = SAMPLES * STEPS


class _Seen:
    """An algorithm's rows and losses as the engine asks for them; with a large microbatch each update is one call."""

    def __init__(self, algorithm: Any) -> None:
        self.pairs: list[Tensor] = []
        self.losses: list[tuple[bool, Tensor]] = []
        self.algorithm, self._loss = algorithm, algorithm.loss
        algorithm.loss = self

    def __call__(self, policy: Any, rows: Any, *, is_on_policy: bool, scale: float) -> Any:
        loss = self._loss(policy, rows, is_on_policy=is_on_policy, scale=scale)
        self.pairs.append(torch.stack([rows[0].sample_index, rows[0].step_index], 1))
        self.losses.append((is_on_policy, loss.statistics["ratio"]))
        return loss


def _sorted(parts: list[Tensor]) -> list[list[int]]:
    return sorted(torch.cat(parts).tolist())


ALL = [[sample, step] for sample in range(SAMPLES) for step in range(1, 5)]


@pytest.mark.parametrize("minibatch", ["pairs", "samples"])
def test_every_epoch_goes_through_every_row_once(
    make_toy: Callable, make_engine: Callable, move: Callable, minibatch: str
):
    seen = _Seen(ddpo(clip_range=0.1))
    options = {"inner_epochs": 2, "updates_per_iteration": 2, "minibatch": minibatch, "microbatch": 100}
    engine = make_engine(make_toy(), seen.algorithm, **options)
    steps = []
    engine.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    values = move(engine).values
    assert len(steps) == len(seen.pairs) == 4
    assert [len(pairs) for pairs in seen.pairs] == [PAIRS // 2] * 4
    assert _sorted(seen.pairs[:2]) == _sorted(seen.pairs[2:]) == ALL
    assert seen.pairs[0].tolist() != seen.pairs[2].tolist(), "each epoch has its own order"
    assert values["pairs_trained"] == 2 * PAIRS
    assert values["fraction_trained"] == pytest.approx(STEPS / 6)


def test_the_ratio_is_exactly_one_in_the_first_update_alone(make_toy: Callable, make_engine: Callable, move: Callable):
    seen = _Seen(ddpo(clip_range=0.1))
    move(make_engine(make_toy(), seen.algorithm, inner_epochs=2, updates_per_iteration=2, microbatch=5))
    on_policy = [ratio for is_on_policy, ratio in seen.losses if is_on_policy]
    later = torch.cat([ratio for is_on_policy, ratio in seen.losses if not is_on_policy])
    assert [is_on_policy for is_on_policy, _ in seen.losses] == [True] * 3 + [False] * 9  # 12 pairs, at most 5 a time
    assert torch.cat(on_policy).tolist() == [1.0] * (PAIRS // 2)
    assert len(later) == 3 * PAIRS // 2
    assert (later != 1).all()


@pytest.mark.parametrize("num_updates", [1, 2, 3, 4, 6])
def test_whole_samples_have_all_their_rows_in_one_update(
    make_toy: Callable, make_engine: Callable, move: Callable, num_updates: int
):
    seen = _Seen(ddpo(clip_range=0.1))
    options = {"inner_epochs": 2, "updates_per_iteration": num_updates, "minibatch": "samples", "microbatch": 100}
    move(make_engine(make_toy(), seen.algorithm, **options))
    assert len(seen.pairs) == 2 * num_updates
    for epoch in (seen.pairs[:num_updates], seen.pairs[num_updates:]):
        samples = [set(pairs[:, 0].tolist()) for pairs in epoch]
        assert sorted(sample for part in samples for sample in part) == list(range(SAMPLES)), "each in one update"
        for part, pairs in zip(samples, epoch, strict=True):
            assert sorted(pairs.tolist()) == [pair for pair in ALL if pair[0] in part]


def test_more_updates_than_samples_are_refused(make_toy: Callable, make_engine: Callable, move: Callable):
    options = {"updates_per_iteration": 7, "minibatch": "samples"}
    with pytest.raises(ValueError, match=r"got 6 images for 7 updates; lower train\.updates_per_iteration, or set"):
        move(make_engine(make_toy(), ddpo(), **options))
    move(make_engine(make_toy(), ddpo(), updates_per_iteration=7))


@pytest.mark.parametrize("minibatch", ["pairs", "samples"])
def test_ties_may_leave_an_update_less_or_nothing(
    make_toy: Callable, make_engine: Callable, move: Callable, minibatch: str
):
    """D3PO: the two images of "a red one" differ, those of the other prompts tie; then all of them tie."""

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        plain = images.mean((1, 2, 3))
        return torch.where(torch.tensor([prompt == "a red one" for prompt in prompts]), plain, 0.1)

    for worth, rows in ((score, STEPS), (lambda images, prompts: torch.ones(len(images)), 0)):
        toy, steps = make_toy(), []
        options = {"updates_per_iteration": 5, "minibatch": minibatch, "score": worth, "learning_rate": 1e-3}
        engine = make_engine(toy, d3po(), **options)
        engine.optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        by, values = move(engine)
        assert len(steps) == 5
        assert values["pairs_trained"] == rows
        assert toy.num_rows == 6 * 6 + 4 * rows, "the rollout, then two images and their references a row"
        assert (by.norm() > 0) == (rows > 0)
        json.dumps(values, allow_nan=False)


def test_two_epochs_are_two_updates_on_the_same_rows_by_hand(
    make_toy: Callable, make_engine: Callable, sample: Callable
):
    """An epoch of one update each: the second starts where the first ended, with the rollout's log-probabilities."""
    moved = []
    for epochs in (1, 2):
        toy = make_toy(torch.float64)
        engine = make_engine(toy, ddpo(clip_range=10.0), inner_epochs=epochs, microbatch=100, learning_rate=0.1)
        trajectory = sample(engine)
        pairs = trajectory.pairs(torch.ones(SAMPLES, 6, dtype=torch.bool))
        advantage = torch.randn(len(pairs), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        encoded = EncodedPrompts.of(toy, trajectory.prompts)
        policy = engine.policy(encoded, engine.schedule)
        engine.update(policy, Pairs(trajectory, pairs, advantage, None), 6, torch.Generator().manual_seed(2))
        moved.append((toy, trajectory, pairs, advantage))
    (once, trajectory, pairs, advantage), (twice, *_) = moved
    rows = trajectory.gather(pairs)
    condition = once.encode([trajectory.prompts[i] for i in rows.sample_index])
    output = once.predict(rows.sample.double(), rows.timestep, condition)
    a, b, std = rows.coef.double()[:, :, None, None, None].unbind(1)
    normal = torch.distributions.Normal(a * rows.sample.double() + b * output, std.expand_as(output))
    log_prob = normal.log_prob(rows.prev_sample.double()).mean((1, 2, 3))
    loss = -(advantage * (log_prob - rows.old_log_prob.double()).exp()).mean()
    gradients = torch.autograd.grad(loss, once.trainable_parameters())
    for start, end, slope in zip(once.trainable_parameters(), twice.trainable_parameters(), gradients, strict=True):
        torch.testing.assert_close(end, start - 0.1 * slope, rtol=1e-6, atol=1e-8)
