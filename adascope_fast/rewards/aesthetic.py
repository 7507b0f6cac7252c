"""LAION's aesthetic predictor V2 (sac+logos+ava1-l14-linearMSE): how people rated pictures, 1 to 10.

A stack of linear layers, without anything between them, on the normalised image embedding of OpenAI's CLIP ViT-L/14.
The prompt does not matter. The layers compute in float32 whatever the CLIP does, as in the published code.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adascope_fast.loading import aligned
from adascope_fast.rewards.clip import Clip, told
from adascope_fast.weights.aesthetic import PLACES, WIDTHS, shapes

STEP = "make it with: adascope-fast import-weights aesthetic FILE --out FOLDER"


class Aesthetic:
    """Reward of the picture alone, about 1 to 10.

    Args:
        clip: makes the image embedding.
        head: what `head_of` makes.
        name: what reports call it.
    """

    def __init__(self, clip: Clip, head: nn.Module, *, name: str = "aesthetic") -> None:
        self.clip, self.model, self.name = clip, clip.model, name
        self.head = head.requires_grad_(False).eval()
        wanted, width = clip.model.config.projection_dim, next(head.parameters()).shape[1]
        if width != wanted:
            raise ValueError(
                f"the aesthetic predictor must fit its CLIP, got layers for {width} numbers and a CLIP of {wanted}; "
                f"set reward.clip to the CLIP that it was trained on"
            )

    @classmethod
    def load(
        cls, model: str, *, clip: str, dtype: str = "float32", device: str = "auto", batch: int | None = None
    ) -> "Aesthetic":
        """The layers of a folder or Hugging Face repository with `model.safetensors`, and the CLIP.

        Raises:
            ValueError: one of the two is missing or something else, or they do not fit.
        """
        from safetensors.torch import load_file
        from transformers.utils import cached_file

        rule = "reward.model of aesthetic is a folder, or a Hugging Face repository, of its layers in model.safetensors"
        with told(rule, model, STEP):
            head = head_of(load_file(str(cached_file(model, "model.safetensors"))))
        return cls(Clip.load(clip, dtype=dtype, device=device, batch=batch), head, name=f"aesthetic ({model})")

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [b] float32 of pictures [b, 3, h, w] in [0, 1]; higher is better."""
        self.head.to(images.device)
        return self.head(self.clip.embed_images(images))[:, 0]


def stack(width: int) -> nn.Sequential:
    """The layers for an embedding of `width` numbers, named as the published ones are: `0.weight`, `2.weight`, ..."""
    sizes = zip((width, *WIDTHS), WIDTHS, strict=False)
    layers: dict[int, nn.Module] = dict(zip(PLACES, (nn.Linear(*pair) for pair in sizes), strict=True))
    return nn.Sequential(*(layers.get(place, nn.Identity()) for place in range(PLACES[-1] + 1)))


def head_of(tensors: Mapping[str, Tensor]) -> nn.Sequential:
    """The stack with the weights `layers.0.weight` to `layers.7.bias`; ValueError where they are others."""
    first = tensors.get("layers.0.weight")
    width = first.shape[1] if first is not None and first.ndim == 2 else 1
    head = stack(width).float()
    wanted = shapes(width)
    others = sorted(tensors.keys() - wanted.keys())
    wrong = sorted(name for name, shape in wanted.items() if name not in tensors or tensors[name].shape != shape)
    if others or wrong:
        has = f"has {others[0]}" if others else f"has {wrong[0]} of another shape or not at all"
        raise ValueError(f"it must have the weights layers.0.weight to layers.7.bias alone, and {has}")
    own = {name.removeprefix("layers."): value.float() for name, value in tensors.items()}
    head.load_state_dict(aligned(own), assign=True)
    return head
