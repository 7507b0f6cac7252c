"""From latents to pictures good enough to be judged, for less than the VAE takes.

`n` latents of `c` channels. A sensor decodes states of the whole rollout, so a decoder is most of its cost. The tiny
autoencoder is many times cheaper than the VAE it imitates; the linear map is next to free, and blurred.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from adascope_fast.backbone import in_double
from adascope_fast.loading import align, load_whole

RIDGE = 1e-4
MAX_PLACES = 2**16  # of the latents that the linear map is fitted to


class TinyDecoder:
    """diffusers' AutoencoderTiny (TAESD and its kin), which takes the denoiser's latents.

    Args:
        name: a folder or a Hugging Face repository; ValueError if it holds none in safetensors.
    """

    def __init__(self, name: str) -> None:
        from diffusers import AutoencoderTiny

        try:
            self.model: Any = load_whole(AutoencoderTiny, name, "it")
        except (OSError, ValueError) as error:
            raise ValueError(
                "sensing.tiny names the folder or repository of a diffusers AutoencoderTiny in safetensors, got "
                f"{name!r}: {str(error).strip().splitlines()[0]}; download it first, or set sensing.decoder = 'vae'"
            ) from None
        align(self.model.requires_grad_(False).eval())

    @torch.no_grad()
    def __call__(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 height width"]:
        """Pictures in [0, 1], float32. ValueError for latents of another model."""
        config = self.model.config
        if latents.shape[1] != config.latent_channels:
            raise ValueError(
                f"sensing.tiny must have the model's {latents.shape[1]} latent channels, got {config.latent_channels}; "
                "use the tiny autoencoder made for this model, or sensing.decoder = 'vae'"
            )
        self.model.to(latents.device)
        scaled = latents.to(self.model.dtype) / config.scaling_factor + config.shift_factor
        return (self.model.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


class LinearDecoder:
    """The best linear map from 3 x 3 neighbourhoods of latents to the pixels that the VAE makes of their middle.

    Fitted once, by least squares, to what the VAE makes of the first latents it is shown.

    Args:
        teacher: decodes latents to images in [0, 1]: the VAE.
    """

    def __init__(self, teacher: Callable[[Tensor], Tensor]) -> None:
        self._teacher = teacher
        self._map: dict[str, Tensor] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The map, once there is one."""
        return dict(self._map or {})

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Have the map that `tensors` gave."""
        self._map = dict(tensors) or None

    @torch.no_grad()
    def prepare(self, latents: Float[Tensor, "n c h w"]) -> None:
        """Have a map: the one that there is, else one fitted to the finite ones of `latents`."""
        if self._map is not None:
            return
        latents = latents[latents.flatten(1).isfinite().all(1)].float()
        if not len(latents):
            raise ValueError("the linear decoder is fitted to finite latents, got none; set sensing.decoder = 'vae'")
        latents = latents[: max(1, MAX_PLACES // latents[0, 0].numel())]
        self._map = fitted(latents, self._teacher(latents).float())

    @torch.no_grad()
    def __call__(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 height width"]:
        """Pictures in [0, 1], float32, of the size of the VAE's. `prepare` comes first."""
        assert self._map is not None, "prepare comes first"
        self._map = {name: value.to(latents.device) for name, value in self._map.items()}
        around = F.pad(latents.float(), (1, 1, 1, 1), mode="replicate")
        patch = round((len(self._map["bias"]) / 3) ** 0.5)
        return F.pixel_shuffle(F.conv2d(around, self._map["weight"], self._map["bias"]), patch).clamp(0, 1)


def fitted(latents: Float[Tensor, "n c h w"], images: Float[Tensor, "n 3 height width"]) -> dict[str, Tensor]:
    """`weight` [3 patch^2, c, 3, 3] and `bias` of the convolution before a pixel shuffle, by ridge regression."""
    channels, patch = latents.shape[1], images.shape[-1] // latents.shape[-1]
    around = in_double(F.unfold(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2).flatten(0, 1))
    target = in_double(F.unfold(images, patch, stride=patch).transpose(1, 2).flatten(0, 1))
    centre, middle = around.mean(0), target.mean(0)
    x, y = around - centre, target - middle
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(gram, x.T @ y)  # [9 c, 3 patch^2]
    bias = middle - centre @ weight
    shaped = weight.T.reshape(len(bias), channels, 3, 3).float().contiguous()
    return {"weight": shaped, "bias": bias.float()}
