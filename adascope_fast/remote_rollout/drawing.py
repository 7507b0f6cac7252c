"""Samples for others: a model of this package with the trained weights that it was sent.

`b` samples, `t` steps.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adascope_fast.backbones.folding import Folding
from adascope_fast.engine.acceleration import halving
from adascope_fast.remote_rollout.wire import Answer, Request, noise_of
from adascope_fast.rollout import Denoising, PromptCache, Tables

if TYPE_CHECKING:
    from adascope_fast.backbones.base import PipelineBackbone


class Drawing:
    """Draws what a request asks for, all its samples at once; fewer where memory runs out.

    Args:
        backbone: on its device.
        folds_adapter: it draws with weights that have the adapter in them.
        autocast: context in which the denoiser runs.
    """

    def __init__(
        self,
        backbone: "PipelineBackbone",
        *,
        folds_adapter: bool,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.backbone, self._folds, self._autocast = backbone, folds_adapter, autocast
        self._encoded = PromptCache(backbone)
        self.weights = ""
        """Digest of the weights that it was sent; "" before that."""

    def take(self, tensors: Mapping[str, Tensor], digest: str) -> None:
        """Draw with these weights from now on; ValueError where they are another model's, and it has none then."""
        self.weights = ""
        self.backbone.load_adapter_file(tensors)
        self.weights = digest

    @torch.no_grad()
    def __call__(self, request: Request) -> Answer:
        """What was drawn."""
        request.refuse_more(self.backbone.latent_shape)
        answer, _ = halving(lambda batch: self._drawn(request, batch), len(request.prompts), "the samples of a request")
        return answer

    def _drawn(self, request: Request, batch: int) -> Answer:
        backbone, device = self.backbone, self.backbone.device
        schedule, encoded = request.schedule.to(device), self._encoded(request.prompts)
        tables = Tables.of(_noise(request, backbone.latent_shape).to(device), backbone.denoiser)
        denoising = Denoising(backbone, schedule, encoded, request.guidance_scale, request.kind)
        prompt_index, samples = encoded.index(request.prompts, device), torch.arange(len(request.prompts))
        folding = Folding(backbone.denoiser) if self._folds else nullcontext()
        with self._autocast(), folding:
            for first in range(0, len(samples), batch):
                rows = slice(first, min(first + batch, len(samples)))
                for step in range(schedule.num_steps):
                    denoising(step, samples[rows], rows, tables, prompt_index)
        answer = Answer(**vars(tables))
        return answer if request.asks_x0 else replace(answer, x0=None)


def _noise(request: Request, latent_shape: tuple[int, int, int]) -> Tensor:
    """The noise [b, t+1, ...] of all samples, with the latents that they start from."""
    shape = (request.schedule.num_steps + 1, *latent_shape)
    noise = torch.stack([noise_of(seed, shape) for seed in request.seeds])
    for number, (seed, start) in enumerate(zip(request.seeds, request.start_seeds, strict=True)):
        if start != seed:
            noise[number, 0] = noise_of(start, (1, *latent_shape))[0]
    return noise
