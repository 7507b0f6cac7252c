"""The autoencoder that both embedded models share: 3 x 64 x 64 pictures to 8 x 8 x 8 latents.

Differs from the original only in size: diffusers' AutoencoderKL without attention. The decoder sees latents with
a little added noise, so that small errors of a denoiser do not show.
"""

import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from adascope_fast.pretraining import loop
from adascope_fast.pretraining.drawing import IMAGE_SIZE, draw, where_objects
from adascope_fast.prompts.scenes import Scene, every_scene

RECIPE = loop.Recipe(num_steps=1700, learning_rate=1e-3, warmup=100)
BATCH = 16
OBJECT_WEIGHT = 12.0
LATENT_NOISE = 0.05  # of the latents' own standard deviation
TRAINING_SCENES = [scene for scene in every_scene() if not scene.is_held_out]
BY_COUNT = [[scene for scene in TRAINING_SCENES if scene.count == count] for count in (1, 2, 3)]


def scenes_for(seed: int, num_scenes: int) -> list[Scene]:
    """Training scenes drawn uniformly over counts, then over the combinations of that count."""
    rng = random.Random(seed)
    return [rng.choice(rng.choice(BY_COUNT)) for _ in range(num_scenes)]


def build(*, quant_conv: bool = False) -> AutoencoderKL:
    """An untrained autoencoder with 0.97M parameters."""
    settings: dict[str, Any] = dict(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=2,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
        force_upcast=False,
    )
    return AutoencoderKL(**settings)


def pretrain(folder: Path, *, recipe: loop.Recipe = RECIPE) -> AutoencoderKL:
    """A trained autoencoder whose latents have zero mean and unit variance; resumes from `folder`."""
    torch.manual_seed(0)
    model = build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss_at(step: int) -> Tensor:
        images = draw(scenes_for(step, BATCH), step) * 2 - 1
        noise = torch.Generator().manual_seed(step)
        posterior = model.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
        latents = posterior.mean
        spread = latents.detach().std()
        noisy = latents + LATENT_NOISE * spread * torch.randn(latents.shape, generator=noise)
        error = model.decode(noisy).sample - images
        # Objects cover a few percent of the frame; without a weight their colours are learned last.
        weight = 1 + OBJECT_WEIGHT * where_objects(images)
        return (weight * (error.abs() + error.square())).mean() + 1e-4 * latents.square().mean()

    loop.train(model, loss_at, recipe, folder, "autoencoder")
    return _standardised(model)


def load_or_pretrain(folder: Path) -> AutoencoderKL:
    """The autoencoder in `folder / "final"`, trained first if it is not there; frozen."""
    if not (folder / "final").is_dir():
        pretrain(folder).save_pretrained(folder / "final")
    return AutoencoderKL.from_pretrained(folder / "final").requires_grad_(False).eval()


@torch.no_grad()
def _standardised(trained: Any) -> AutoencoderKL:
    """The same autoencoder with latents of zero mean and unit variance in every channel.

    Stable Diffusion's pipeline has one scale and no shift, so the 1 x 1 convolutions on either side of the latents
    do it. The posterior's width was not trained and is set to nothing.
    """
    latents = trained.encode(draw(scenes_for(-1, 512), 10**6) * 2 - 1).latent_dist.mean
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    model: Any = build(quant_conv=True)
    model.load_state_dict(trained.state_dict(), strict=False)
    channels = len(mean)
    for layer, weight, bias in (
        (
            model.quant_conv,
            torch.cat([1 / std, torch.zeros(channels)]),
            torch.cat([-mean / std, torch.full_like(std, -20)]),
        ),
        (model.post_quant_conv, std, mean),
    ):
        layer.weight.copy_(torch.diag(weight)[:, :, None, None])
        layer.bias.copy_(bias)
    model.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    return model
