"""Pretraining of the small text encoders, which are frozen afterwards, as those of published models are.

The encoders learn to tell every attribute of a caption from what the denoiser reads after its last word. Trained by
the denoiser alone they carried the colours there and little else: the shape of an object changes few latents, so the
denoiser asked for it last, and drew without it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adascope_fast.pretraining import captions, loop
from adascope_fast.prompts.scenes import Scene

RECIPE = loop.Recipe(num_steps=600, learning_rate=2e-3, warmup=50, ema=0.99, save_every=600)
BATCH = 128


def pretrain(
    encoders: Sequence[nn.Module],
    read: Callable[[Tensor], Sequence[Tensor]],
    tokens: Tensor,
    scenes: Sequence[Scene],
    work: Path,
    *,
    recipe: loop.Recipe | None = None,
) -> nn.ModuleList:
    """Leave in `encoders` weights by which linear heads tell each attribute of a caption, and freeze them.

    Returns the heads, one for each attribute of each feature, in the order of `captions.CHOICES`; resumes from `work`.

    Args:
        read: features [b, width] of tokens [b, MAX_TOKENS], each of which shall tell every attribute.
        tokens: of the captions of `scenes`, [len(scenes), MAX_TOKENS].
    """
    choices = captions.CHOICES
    target = torch.tensor(
        [[values.index(getattr(scene, name)) for name, values in choices.items()] for scene in scenes]
    )
    with torch.no_grad():
        widths = [feature.shape[1] for feature in read(tokens[:1])]
    heads = nn.ModuleList(nn.ModuleList(nn.Linear(width, len(choices[name])) for name in choices) for width in widths)

    def loss_at(step: int) -> Tensor:
        rows = torch.randint(len(scenes), (BATCH,), generator=torch.Generator().manual_seed(step))
        losses = [
            F.cross_entropy(head(feature), target[rows, column])
            for feature, of_feature in zip(read(tokens[rows]), heads, strict=True)
            for column, head in enumerate(of_feature)  # type: ignore[arg-type]
        ]
        return torch.stack(losses).mean()

    loop.train(nn.ModuleList([*encoders, heads]), loss_at, recipe or RECIPE, work, "text")
    for encoder in encoders:
        encoder.requires_grad_(False)
    return heads
