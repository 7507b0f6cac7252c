"""Rollout servers in a thread of this process, and what a training would draw by itself from the same seeds."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from reward_servers import TOKEN, listening
from torch import Tensor

from adascope_fast import Config, backbones
from adascope_fast.engine import collection
from adascope_fast.remote_rollout.client import RemoteRollout
from adascope_fast.remote_rollout.drawing import Drawing
from adascope_fast.remote_rollout.server import application
from adascope_fast.remote_rollout.wire import noise_of
from adascope_fast.rollout import sampling
from adascope_fast.rollout.trajectory import Trajectory
from adascope_fast.training import building, origin

CAPTIONS = ["a large red circle on a grey background", "two small blue crosses on a black background"]


def loaded(name: str = "scenes", *, lora_rank: int = 4, **options: Any) -> Any:
    """A model as the smallest configuration has it, with an adapter that does something."""
    backbone = backbones.load(name, lora_rank=lora_rank, **options)
    with torch.no_grad():
        for number, parameter in enumerate(backbone.trainable_parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(noise * (0.02 if options.get("train") != "full" else 1e-3))
    return backbone


def digest_of(backbone: Any) -> str:
    return origin.of_model(backbone, torch.float32)


@contextmanager
def drawing_of(source: Any, *, most_bytes: int = 2**24, port: int = 0) -> Iterator[tuple[str, Drawing]]:
    """(address, what draws) of a server of a model, or of that of a configuration."""
    if isinstance(source, Config):
        drawing, model = building.drawing_of(source)
    else:
        drawing, model = Drawing(source, folds_adapter=True), digest_of(source)
    app = application(drawing, model=model, package="0.1.0", most_bytes=most_bytes)
    with listening(app, most_bytes=most_bytes, port=port) as url:
        yield url, drawing


def ask(url: str, backbone: Any, **keys: Any) -> RemoteRollout:
    """A client of the server, which waits for a few seconds at most."""
    usual = {"model": digest_of(backbone), "token": TOKEN, "patience": 2.0, "timeout": 20.0}
    return RemoteRollout(url, backbone, **usual | keys)


@contextmanager
def seeded() -> Iterator[None]:
    """Within it a training draws the noise of each sample from a seed of its own, as those that ask a server do."""

    def rollout(*given: Any, generator: torch.Generator, **keys: Any) -> Trajectory:
        seeds = torch.randint(2**63 - 1, (len(given[3]),), generator=generator).tolist()
        with with_noise(seeds):
            return sampling.rollout(*given, generator=generator, **keys)

    with mock.patch.object(collection, "rollout", rollout):
        yield


@contextmanager
def with_noise(seeds: Sequence[int]) -> Iterator[None]:
    """Within it a rollout has the noise of these seeds."""

    original: Callable[..., Tensor] = torch.randn

    def randn(shape: Sequence[int], *, generator: torch.Generator, device: Any = None) -> Tensor:
        if device is None:  # of `noise_of` itself
            return original(shape, generator=generator)
        return torch.stack([noise_of(seed, shape[1:]) for seed in seeds])

    with mock.patch.object(torch, "randn", randn):
        yield
