"""Finished pictures that no rollout of this run made: their clean latents, for algorithms that learn from a set.

`b` pictures; latents keep their own trailing shape.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from adascope_fast.backbone import Backbone
from adascope_fast.schedules import Schedule


class StoredImage(Protocol):
    """A picture on disk."""

    @property
    def path(self) -> Hashable:
        """What tells it from the others."""
        ...

    @property
    def where(self) -> str:
        """What an error calls it."""
        ...

    def pixels(self, side: int) -> Any:
        """Its middle square as an array [side, side, 3] of 8 bits."""
        ...


@dataclass(frozen=True)
class Stills:
    """Clean latents with the prompts that they were made for, to be noised anew at steps of `schedule`."""

    latents: Float[Tensor, "b *latent"]
    schedule: Schedule
    prompts: list[str]
    """Of each picture: its interval is that of this prompt."""
    prompt_index: Int64[Tensor, " b"]
    """What the denoiser is told of each, a row of the encoded prompts: another than its own where that is left out."""

    @property
    def num_steps(self) -> int:
        """Of the sampler, t: noise levels to train at."""
        return self.schedule.num_steps


@dataclass
class ImageCache:
    """Encodes pictures to latents, each once in the run, as long as `max_bytes` of memory on the CPU hold them."""

    backbone: Backbone
    max_bytes: int = 2**30
    _rows: OrderedDict[Hashable, Tensor] = field(default_factory=OrderedDict, init=False, repr=False)

    def __call__(self, images: Sequence[StoredImage], device: torch.device) -> Float[Tensor, "n *latent"]:
        """The latents of the pictures. FloatingPointError where the VAE gives one that is not finite."""
        found = [self._latents(image, device) for image in images]
        return torch.stack(found).to(device)

    def _latents(self, image: StoredImage, device: torch.device) -> Float[Tensor, "*latent"]:
        """One at a time: what is cached cannot depend on its neighbours, nor on a resume."""
        if image.path not in self._rows:
            pixels = torch.from_numpy(image.pixels(self.backbone.resolution).copy())
            whole = (pixels.permute(2, 0, 1).float() / 255)[None].to(device)
            latents = self.backbone.encode_images(whole)[0].cpu()
            if not bool(latents.isfinite().all()):
                raise FloatingPointError(
                    f"latents must be finite, and those of {image.where} are not: the VAE overflows in its type; try "
                    f'model.dtype = "float32"'
                )
            self._rows[image.path] = latents
        self._rows.move_to_end(image.path)
        found = self._rows[image.path]
        while len(self._rows) > 1 and len(self._rows) * found.numel() * 4 > self.max_bytes:
            self._rows.popitem(last=False)
        return found
