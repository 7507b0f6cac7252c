"""A step-aware preference model (SPO's, Liang et al. 2024, 2406.04314) as a small network on noisy latents.

(latents, timestep, encoded prompt) -> score; differences of scores are logits of one being preferred. Differs from the
original, a PickScore that is told the timestep: it sees latents and not decoded guesses, so it costs no forward of the
denoiser, and it knows the latents and prompts of one model alone, which its folder names.

Axes: `n` states, `w` channels.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adascope_fast.backbone import Backbone, Condition
from adascope_fast.loading import aligned, follow_umask
from adascope_fast.preferences.folders import DESCRIPTION, NAME_ONE, WEIGHTS, refuse_no_model
from adascope_fast.rollout import Candidates

KIND = "step-aware preference model"
WIDTH, NUM_BLOCKS = 48, 3
SMALLEST_SIDE = 4
"""Latents are halved behind each block as long as they are larger."""
NUM_FREQUENCIES = 16
MOST_WIDTH = 4096


class StepAwareModel(nn.Module):
    """A convolutional encoder, each block scaled and shifted by the timestep and the prompt.

    Args:
        model: the name of the model whose latents it knows.
        latent_shape: of these.
        embedding: width of each tensor of an encoded prompt, by name.
        told: what else its folder says of it, as JSON.
    """

    def __init__(
        self,
        model: str,
        latent_shape: tuple[int, int, int],
        embedding: Mapping[str, int],
        *,
        width: int = WIDTH,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.latent_shape, self.width = model, tuple(latent_shape), width
        self.embedding, self.told = dict(sorted(embedding.items())), dict(told or {})
        self.embed = nn.Sequential(
            nn.Linear(2 * NUM_FREQUENCIES + sum(self.embedding.values()), 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, 2 * width),
            nn.SiLU(),
        )
        self.enter = nn.Conv2d(latent_shape[0], width, 3, padding=1)
        side, blocks = min(latent_shape[1:]), []
        for _ in range(NUM_BLOCKS):
            is_halved = side > SMALLEST_SIDE
            blocks.append(_Block(width, 2 * width, stride=2 if is_halved else 1))
            side = -(-side // 2) if is_halved else side
        self.blocks = nn.ModuleList(blocks)
        self.leave = nn.Sequential(nn.Linear(3 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 1))

    def forward(self, candidates: Candidates) -> Float32[Tensor, " n"]:
        """The score of each state, from its latents as they are: nothing is guessed."""
        sample = candidates.sample
        with torch.autocast(sample.device.type, enabled=False):
            told = self.embed(torch.cat([_waves(candidates.timestep), self._pooled(candidates.condition)], 1))
            x = self.enter(sample.float().contiguous())
            for block in self.blocks:
                x = block(x, told)
            return self.leave(torch.cat([x.mean((2, 3)), told], 1))[:, 0]

    def _pooled(self, condition: Condition) -> Float32[Tensor, "n e"]:
        """Mean over the tokens of each tensor, each of unit scale, one beside the other."""
        parts = (_mean(condition[name].float()) for name in self.embedding)
        return torch.cat([F.layer_norm(part, part.shape[1:]) for part in parts], 1)

    def suit(self, backbone: Backbone) -> None:
        """Move to where the model is; ValueError where it is another one's."""
        now = {name: value.shape[-1] for name, value in sorted(backbone.encode([""]).items())}
        mine = {"model": self.model, "latents": list(self.latent_shape), "embedding": self.embedding}
        its = {"model": backbone.name, "latents": list(backbone.latent_shape), "embedding": now}
        for what, value in its.items():
            if mine[what] != value:
                raise ValueError(
                    f"a preference model is for the {what} that it was trained on, {mine[what]}, got {value}; "
                    f"make one with adascope-fast train-preference-model and this configuration"
                )
        self.to(next(backbone.denoiser.parameters()).device)

    def save(self, folder: Path) -> None:
        """Write `config.json` and the weights as safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}, folder / WEIGHTS)
        described = {
            "kind": KIND,
            "model": self.model,
            "latent_shape": list(self.latent_shape),
            "embedding": self.embedding,
            "width": self.width,
        }
        (folder / DESCRIPTION).write_text(json.dumps(described | self.told, indent=1) + "\n", encoding="utf-8")
        follow_umask(folder)

    @classmethod
    def load(cls, folder: Path) -> "StepAwareModel":
        """What `save` wrote; ValueError where it is not whole, or something else."""
        refuse_no_model(folder)
        try:
            described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            if described.pop("kind") != KIND:
                raise ValueError(f"it is no {KIND}")
            name, embedding, width = (described.pop(key) for key in ("model", "embedding", "width"))
            shape = tuple(described.pop("latent_shape"))
            sizes = [*shape, width, *embedding.values()]
            if len(shape) != 3 or not all(type(size) is int and 0 < size < MOST_WIDTH * 8 for size in sizes):
                raise ValueError(f"sizes are whole numbers above 0, got {sizes}")
            made = cls(str(name), shape, embedding, width=width, told=described)
            made.load_state_dict(aligned(load_file(folder / WEIGHTS)))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"the preference model in {str(folder)!r} could not be read: {why}; {NAME_ONE}") from error
        return made.requires_grad_(False).eval()


class _Block(nn.Module):
    """Two convolutions around a skip; what comes in is scaled and shifted by what is told."""

    def __init__(self, width: int, num_told: int, *, stride: int) -> None:
        super().__init__()
        groups = math.gcd(8, width)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, width, affine=False) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.films = nn.ModuleList(nn.Linear(num_told, 2 * width) for _ in range(2))
        self.stride = stride

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        residual = x
        for norm, film, convolution in zip(self.norms, self.films, self.convolutions, strict=True):
            scale, shift = film(told)[:, :, None, None].chunk(2, 1)
            residual = convolution(F.silu(norm(residual) * (1 + scale) + shift))
        x = x + residual
        return x if self.stride == 1 else F.avg_pool2d(x, self.stride, ceil_mode=True)


def _waves(timestep: Float[Tensor, " n"]) -> Float32[Tensor, "n f"]:
    """Sines and cosines of a timestep between 0 and 1000, of wavelengths from about 6 to 6000."""
    rates = torch.logspace(0, -3, NUM_FREQUENCIES, device=timestep.device)
    angles = timestep.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def _mean(values: Float[Tensor, "n *tokens e"]) -> Float[Tensor, "n e"]:
    return values.flatten(1, -2).mean(1) if values.dim() > 2 else values


def is_made_here(folder: Path) -> bool:
    """Whether `folder` has what says that `StepAwareModel.save` wrote it."""
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and described.get("kind") == KIND
