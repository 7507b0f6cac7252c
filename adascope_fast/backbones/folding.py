"""A LoRA adapter folded into the weights it adapts, for as long as nothing is differentiated.

Saves the two narrow products of every adapted layer in the rollout. The base weights come back as they were, bit for
bit: they are put aside, not computed back.
"""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn


class Folding:
    """Folds within a `with` statement; `off` and `on` in between cost next to nothing.

    The folded weights keep their memory from one `with` statement to the next: CUDA graphs go by it.
    Layers whose base weight is not float32 are left alone, and under autocast all layers: rounding would swallow a
    small adapter.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        from peft.tuners.lora import Linear  # with diffusers and transformers, which take seconds

        self._layers = [layer for layer in denoiser.modules() if type(layer) is Linear and _can_fold(layer)]
        self._weights: list[tuple[Tensor, Tensor]] = []
        """Of each layer, the base and the folded weight."""
        self._is_on = False

    @property
    def num_layers(self) -> int:
        """How many layers it folds."""
        return len(self._layers)

    @property
    def num_bytes(self) -> int:
        """Memory of the folded weights, which the base weights wait beside."""
        weights: list[Any] = [layer.get_base_layer().weight for layer in self._layers]
        return sum(weight.nbytes for weight in weights)

    def __enter__(self) -> Self:
        if not _is_autocast(self._layers):
            before: list[Any] = [folded for _, folded in self._weights] or [None] * len(self._layers)
            self._weights = [_both(layer, old) for layer, old in zip(self._layers, before, strict=True)]
        self.on()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.off()

    def on(self) -> None:
        """Let the adapted layers use the sum of base and adapter."""
        if self._is_on or _is_autocast(self._layers):
            return
        for layer, (_, folded) in zip(self._layers, self._weights, strict=True):
            layer.get_base_layer().weight.data = folded
            layer.merged_adapters.append(layer.active_adapters[0])
        self._is_on = True

    def off(self) -> None:
        """Let them use the base and the adapter apart, to be differentiated."""
        if not self._is_on:
            return
        for layer, (base, _) in zip(self._layers, self._weights, strict=True):
            layer.get_base_layer().weight.data = base
            layer.merged_adapters.clear()
        self._is_on = False


def _can_fold(layer: Any) -> bool:
    is_plain = len(layer.active_adapters) == 1 and not layer.disable_adapters and not layer.merged
    weight = layer.get_base_layer().weight
    return is_plain and type(layer.get_base_layer()) is nn.Linear and weight.dtype == torch.float32


def _is_autocast(layers: list[Any]) -> bool:
    return any(torch.is_autocast_enabled(layer.get_base_layer().weight.device.type) for layer in layers)


@torch.no_grad()
def _both(layer: Any, folded: Tensor | None) -> tuple[Tensor, Tensor]:
    base = layer.get_base_layer().weight.data
    return base, torch.add(base, layer.get_delta_weight(layer.active_adapters[0]), out=folded)
