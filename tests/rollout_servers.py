"""Rollout servers in a thread of this process, and noise for what a training would draw by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from reward_servers import TOKEN, listening

from adascope_fast import Config, backbones
from adascope_fast.remote_rollout.client import RemoteRollout
from adascope_fast.remote_rollout.drawing import Drawing
from adascope_fast.remote_rollout.server import application
from adascope_fast.rollout import OwnNoise
from adascope_fast.training import building, origin

CAPTIONS = ["a large red circle on a grey background", "two small blue crosses on a black background"]


def loaded(name: str = "scenes", *, lora_rank: int = 4, **options: Any) -> Any:
    """A model as the smallest configuration has it, with an adapter that does something."""
    adapter = {} if options.get("train") == "full" else {"lora_rank": lora_rank}
    backbone = backbones.load(name, **adapter, **options)
    with torch.no_grad():
        for number, parameter in enumerate(backbone.trainable_parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(noise * (0.02 if options.get("train") != "full" else 1e-3))
    return backbone


def digest_of(backbone: Any) -> str:
    pipeline = origin.of_pipeline(backbone.pipeline.components, backbone.name, torch.float32, is_given=False)
    return origin.of_model(backbone, pipeline)


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


@dataclass(frozen=True)
class Seeds(OwnNoise):
    """Noise of samples whose seeds are given."""

    seeds: tuple[int, ...] = ()

    def seed(self, number: int) -> int:
        return self.seeds[number]
