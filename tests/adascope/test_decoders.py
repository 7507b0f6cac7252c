"""Decoders of a sensor: the tiny autoencoder is diffusers' own, the linear map is the least-squares solution."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adascope_fast import backbones
from adascope_fast.adascope.decoders import RIDGE, LinearDecoder, TinyDecoder, fitted
from adascope_fast.pretraining.clip import embedded_vae
from adascope_fast.pretraining.drawing import draw
from adascope_fast.prompts.scenes import every_scene


def test_the_tiny_autoencoder_is_that_of_diffusers(tmp_path: Path, save_tiny: Callable):
    model = save_tiny(tmp_path, scaling_factor=0.5, shift_factor=0.25)
    latents = torch.randn(3, 8, 4, 4)
    with torch.no_grad():
        want = (model.decode(latents / 0.5 + 0.25).sample / 2 + 0.5).clamp(0, 1)  # type: ignore[union-attr]
    got = TinyDecoder(str(tmp_path))(latents)
    assert got.shape == (3, 3, 32, 32)
    assert got.std() > 0
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")  # diffusers gives it where it looks for a repository
def test_a_tiny_autoencoder_of_another_model_or_none_is_refused(tmp_path: Path, save_tiny: Callable):
    save_tiny(tmp_path, channels=4)
    with pytest.raises(ValueError, match=r"the model's 8 latent channels, got 4"):
        TinyDecoder(str(tmp_path))(torch.zeros(1, 8, 4, 4))
    with pytest.raises(ValueError, match=r"AutoencoderTiny in safetensors, got 'no-such-folder'"):
        TinyDecoder("no-such-folder")


def test_a_linear_teacher_is_learned_exactly():
    """The teacher is a linear map of 3 x 3 neighbourhoods with edges replicated: nothing is left but the ridge."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 12, 3, padding=1, padding_mode="replicate")
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, 0.5)  # type: ignore[arg-type]

    @torch.no_grad()
    def teacher(latents: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(layer(latents), 2)

    decoder = LinearDecoder(teacher)
    decoder.prepare(torch.randn(40, 2, 6, 5))
    latents = torch.randn(3, 2, 6, 5)
    torch.testing.assert_close(decoder(latents), teacher(latents), rtol=0, atol=1e-4)
    decoder.prepare(torch.zeros(1, 2, 6, 5))
    torch.testing.assert_close(decoder(latents), teacher(latents), rtol=0, atol=1e-4)


def test_the_map_is_numpys_least_squares():
    rng = np.random.default_rng(0)
    latents, images = rng.normal(size=(20, 1, 3, 3)), rng.uniform(size=(20, 3, 3, 3))
    rows = np.stack(
        [
            np.pad(x[0], 1, mode="edge")[i : i + 3, j : j + 3].ravel()
            for x in latents
            for i in range(3)
            for j in range(3)
        ]
    )
    target = images.transpose(0, 2, 3, 1).reshape(-1, 3)
    x, y = rows - rows.mean(0), target - target.mean(0)
    ridge = (RIDGE * len(x)) ** 0.5
    want = np.linalg.lstsq(np.vstack([x, ridge * np.eye(9)]), np.vstack([y, np.zeros((9, 3))]), rcond=None)[0]
    got = fitted(torch.from_numpy(latents).float(), torch.from_numpy(images).float())
    np.testing.assert_allclose(got["weight"].reshape(3, 9).T, want, atol=1e-5)
    np.testing.assert_allclose(got["bias"], target.mean(0) - rows.mean(0) @ want, atol=1e-5)


def test_it_goes_on_with_the_map_of_a_checkpoint_and_skips_what_is_not_finite():
    calls = []

    def teacher(latents: Tensor) -> Tensor:
        calls.append(len(latents))
        return latents.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1).sigmoid()

    latents = torch.randn(9, 1, 4, 4)
    latents[2, 0, 0, 0] = torch.nan
    first = LinearDecoder(teacher)
    assert first.tensors() == {}
    first.prepare(latents)
    assert calls == [8]
    second = LinearDecoder(teacher)
    second.load_tensors(first.tensors())
    second.prepare(torch.zeros_like(latents))
    assert calls == [8], "loaded, not fitted"
    assert torch.equal(first(latents[:2]), second(latents[:2]))
    with pytest.raises(ValueError, match="finite latents, got none"):
        LinearDecoder(teacher).prepare(torch.full((2, 1, 4, 4), torch.nan))


def test_on_the_embedded_autoencoder_the_linear_map_finds_the_colours():
    """Most of the variance of the VAE's pictures is explained: backgrounds are, shapes are not."""
    vae, backbone = embedded_vae(), backbones.load("scenes", lora_rank=1)
    scenes = every_scene()[::12]
    with torch.no_grad():
        latents = vae.encode(draw(scenes, 1) * 2 - 1).latent_dist.mean  # type: ignore[union-attr]
    decoder = LinearDecoder(backbone.decode)
    decoder.prepare(latents[::2])
    want = backbone.decode(latents[1::2])
    assert (decoder(latents[1::2]) - want).square().mean() < 0.25 * want.var()
