"""The learning rate of each update, as transformers has it; moments of 8 bits, and their way through a checkpoint."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import get_scheduler

from adascope_fast.algorithms.policy_gradient import ddpo
from adascope_fast.engine.optimizer import adamw_8bit, rate_of
from adascope_fast.rollout import EncodedPrompts
from adascope_fast.training import checkpoint

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


def _eight_bit(sizes: tuple[int, ...] = (5000, 4096, 7), learning_rate: float = 1e-2) -> torch.optim.Optimizer:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size)) for size in sizes]
    return adamw_8bit(parameters, lr=learning_rate, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)


def _update(optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_moments_of_eight_bits_go_through_a_checkpoint_and_on_as_they_were(tmp_path: Path):
    alone, before, after = _eight_bit(), _eight_bit(), _eight_bit()
    for seed in range(4):
        _update(alone, seed)
    for seed in range(2):
        _update(before, seed)
    checkpoint.save(tmp_path / "000001", checkpoint.optimizer_tensors(before), {"next_iteration": 1})
    found = checkpoint.load(tmp_path / "000001").tensors
    assert {found[f"0.{name}"].dtype for name in ("state1", "state2")} == {torch.uint8}
    assert found["2.state1"].dtype == torch.float32, "bitsandbytes keeps small ones whole"
    for old, new in zip(before.param_groups[0]["params"], after.param_groups[0]["params"], strict=True):
        new.data.copy_(old.data)
    checkpoint.load_optimizer_tensors(after, found)
    for seed in (2, 3):
        _update(after, seed)
    pairs = zip(alone.param_groups[0]["params"], after.param_groups[0]["params"], strict=True)
    assert all(torch.equal(want, got) for want, got in pairs)
    want, got = (checkpoint.optimizer_tensors(one) for one in (alone, after))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_eight_bits_update_about_as_torch_does():
    optimizer = _eight_bit()
    parameters = optimizer.param_groups[0]["params"]
    start = [parameter.detach().clone() for parameter in parameters]
    own = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    plain = torch.optim.AdamW(own, lr=1e-2, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    for seed in range(3):
        _update(optimizer, seed)
        _update(plain, seed)
    for first, got, want in zip(start, parameters, own, strict=True):
        assert torch.cosine_similarity(got - first, want - first, 0) > 0.99


def test_a_device_that_bitsandbytes_cannot_update_on_is_told(monkeypatch: pytest.MonkeyPatch):
    class Fails(torch.optim.SGD):
        def __init__(self, parameters: Any, **settings: Any) -> None:
            super().__init__(parameters, lr=1.0)

        def step(self) -> None:  # type: ignore[override]
            raise NotImplementedError("no kernel")

    stub: Any = ModuleType("bitsandbytes.optim")
    stub.AdamW8bit = Fails
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", stub)
    with pytest.raises(ValueError, match=r'got cpu, on which it raises NotImplementedError: no kernel; .* "adamw"$'):
        adamw_8bit([nn.Parameter(torch.zeros(3))], lr=1.0)


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes, got .*; pip install 'adascope-fast\[bnb\]', or set"):
        adamw_8bit([nn.Parameter(torch.zeros(3))], lr=1.0)
