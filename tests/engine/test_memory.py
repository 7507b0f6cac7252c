"""What autograd holds during an update: as much for one trained step as for all, less with checkpointing."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adascope_fast import backbones
from adascope_fast.algorithms.policy_gradient import Pairs, ddpo
from adascope_fast.engine.engine import Engine
from adascope_fast.engine.settings import Updates
from adascope_fast.rollout import EncodedPrompts, OwnNoise, rollout
from adascope_fast.selectors.simple import EveryStep

CAPTIONS = ["a small red circle on a grey background", "two large blue crosses on a black background"]
NUM_STEPS = 6


class Held:
    """Bytes that autograd has saved and not yet let go, the model's own aside, and the most of them at once."""

    def __init__(self, model: nn.Module) -> None:
        self.now = self.peak = 0
        self._own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def pack(self, tensor: Tensor) -> Any:
        size = 0 if tensor.untyped_storage().data_ptr() in self._own else tensor.numel() * tensor.element_size()
        holder = _Holder(tensor)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(holder, self._free, size)
        return holder

    def _free(self, size: int) -> None:
        self.now -= size


class _Holder:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _peak(num_kept: int, *, microbatch: int = 2, checkpointing: bool = False) -> int:
    model = backbones.load("scenes", lora_rank=2, gradient_checkpointing=checkpointing)
    schedule, generator = model.schedule(NUM_STEPS), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1.0)
    settings = Updates(rollout_batch=2, microbatch=microbatch)
    score = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    engine = Engine(model, schedule, ddpo(clip_range=1e-4), EveryStep(), score, optimizer, settings)
    encoded = EncodedPrompts.of(model, CAPTIONS)
    sampler = {"guidance_scale": 1.0, "noise": OwnNoise(0), "batch": 2}
    trajectory = rollout(model, schedule, encoded, CAPTIONS, **sampler)
    keep = torch.zeros(2, NUM_STEPS, dtype=torch.bool)
    keep[:, :num_kept] = True
    pairs = trajectory.pairs(keep)
    rows = Pairs(trajectory, pairs, torch.ones(len(pairs)), None)
    held = Held(model.denoiser)
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda holder: holder.tensor):
        values = engine.update(engine.policy(encoded, schedule), rows, NUM_STEPS, generator)
    assert values["pairs_trained"] == 2 * num_kept
    assert held.now == 0
    return held.peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_does_not_grow_with_the_steps_trained(checkpointing: bool):
    one = _peak(1, checkpointing=checkpointing)
    assert one > 0
    assert _peak(NUM_STEPS, checkpointing=checkpointing) == one


def test_memory_grows_with_the_microbatch_and_shrinks_with_checkpointing():
    small, large = _peak(NUM_STEPS), _peak(NUM_STEPS, microbatch=4)
    assert large > 1.5 * small
    assert _peak(NUM_STEPS, checkpointing=True) < 0.5 * small
