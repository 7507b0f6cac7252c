"""Pictures to latents: what diffusers' own encoding gives, and what decoding takes back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

from adascope_fast import backbones
from adascope_fast.prompts.scenes import captions
from adascope_fast.training.draw import draw

FAMILIES = ["sd", "sdxl", "sd3", "sd35", "flux"]


def _load(folder: Path) -> Any:
    flow: dict[str, Any] = {"max_sequence_length": 6} if folder.name in ("sd3", "sd35", "flux") else {}
    options = {"resolution": 16, **flow} if folder.name == "flux" else flow
    return backbones.load(str(folder), lora_rank=2, **options)


def _images(model: Any, count: int = 3) -> torch.Tensor:
    side = model.resolution
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_what_diffusers_encoding_gives(tiny: Callable[[str], Path], family: str):
    """The image-to-image pipelines' way: the processor, the posterior's mean, and the family's shift and scale."""
    model = _load(tiny(family))
    images, config = _images(model), model.vae.config
    mean = model.vae.encode(model.pipeline.image_processor.preprocess(images)).latent_dist.mean
    want = (mean - (config.shift_factor or 0.0)) * config.scaling_factor
    got = model.encode_images(images)
    assert got.dtype == torch.float32
    assert tuple(got.shape[1:]) == model.latent_shape
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not got.requires_grad


def test_sdxl_takes_a_mean_and_deviation_for_each_channel(tiny: Callable[[str], Path]):
    model = _load(tiny("sdxl"))
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 2.0, 1.0, 1.5]
    model.vae.register_to_config(latents_mean=mean, latents_std=std)
    images = _images(model)
    posterior = model.vae.encode(2 * images - 1).latent_dist.mean
    shift, width = (torch.tensor(value).view(1, 4, 1, 1) for value in (mean, std))
    want = (posterior - shift) * model.vae.config.scaling_factor / width  # as its image-to-image pipeline has it
    torch.testing.assert_close(model.encode_images(images), want, rtol=1e-5, atol=1e-6)


def test_a_tiny_autoencoder_encodes_too(tiny: Callable[[str], Path]):
    model = _load(tiny("sd"))
    torch.manual_seed(0)
    widths: Any = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    blocks: Any = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    model.vae = AutoencoderTiny(latent_channels=4, scaling_factor=0.5, **widths, **blocks).eval()
    images = _images(model)
    encoded: Any = model.vae.encode(2 * images - 1)
    want = 0.5 * encoded.latents
    torch.testing.assert_close(model.encode_images(images), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["scenes", "scenes-flow"])
def test_a_picture_survives_encoding_and_decoding(name: str):
    model = backbones.load(name, lora_rank=2)
    images = draw(model, captions("held_out")[:4], [3], num_steps=8, guidance_scale=1.0)
    back = model.decode(model.encode_images(images))
    assert images.std() > 0.1
    assert (back - images).abs().mean() < 0.03
    assert (back - images.roll(1, 0)).abs().mean() > 0.1, "another picture is far away"


def test_pictures_of_another_size_are_refused():
    model = backbones.load("scenes", lora_rank=2)
    side = model.resolution
    with pytest.raises(ValueError, match=rf"the model's size \[3, {side}, {side}\], got \[3, {side}, 8\]; resize"):
        model.encode_images(torch.rand(1, 3, side, 8))
