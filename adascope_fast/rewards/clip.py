"""Similarity of picture and prompt by a CLIP: the embedded `scenes-clip`, or any other by its folder or repository.

Only safetensors are read, and no code beside them runs. `n` pictures, `d` the shared embedding. The similarity is the
bare cosine, neither clamped nor scaled; its mean over pictures is the CLIP score that papers report for ViT-L/14 near
0.24. A caption longer than the model reads is cut.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from adascope_fast.loading import align, load_whole

SCENES_CLIP = Path(__file__).parents[1] / "assets" / "scenes-clip"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's CLIP, for folders that name none."""
MAX_KNOWN = 4096  # prompts whose embeddings are kept


class ClipSimilarity:
    """Reward, sensor and score: the cosine of each picture with its prompt.

    Args:
        model: a transformers CLIPModel, which is frozen.
        tokenizer: its tokenizer.
        mean, std: of the three colours, what pictures are normalised by.
        name: what reports call it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        name: str = "clip_similarity",
    ) -> None:
        self.model, self.tokenizer, self.name = model.requires_grad_(False).eval(), tokenizer, name
        align(self.model)
        self._mean, self._std = mean, std
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    @classmethod
    def load(cls, name: str = "scenes-clip") -> "ClipSimilarity":
        """The CLIP of that name: `scenes-clip`, a folder, or a Hugging Face repository. ValueError if there is none."""
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.image_processing_base import ImageProcessingMixin

        place = str(SCENES_CLIP) if name == "scenes-clip" else name
        try:
            model = load_whole(CLIPModel, place, "it", trust_remote_code=False, dtype=torch.float32)
            tokenizer = CLIPTokenizer.from_pretrained(place)
        except (ImportError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # broken files raise whatever their reader trips over
            raise ValueError(
                "a CLIP is 'scenes-clip', the folder of a transformers CLIPModel in safetensors with its tokenizer, or "
                f"a Hugging Face repository of that kind, got {name!r}: {_first_line(error)}; "
                "download it first, or name a folder"
            ) from error
        try:
            described, _ = ImageProcessingMixin.get_image_processor_dict(place)
            why = f"a {type(described).__name__}"
        except (OSError, ValueError) as error:
            has_one = (Path(place) / "preprocessor_config.json").is_file()
            described, why = None if has_one else {}, _first_line(error)
        if not isinstance(described, dict):
            raise ValueError(
                f"the preprocessor_config.json of the CLIP {name!r} must be a JSON object, got {why}; download it again"
            )
        mean = _colours(described.get("image_mean"), MEAN, f"image_mean of the CLIP {name!r}")
        std = _colours(described.get("image_std"), STD, f"image_std of the CLIP {name!r}")
        return cls(model, tokenizer, mean=mean, std=std, name=f"clip_similarity ({name})")

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float32[Tensor, " n"]:
        """Cosine in [-1, 1] of each picture in [0, 1] with its prompt; higher is better."""
        return (self.embed_images(images) * self.embed_prompts(prompts, images.device)).sum(1)

    @torch.no_grad()
    def embed_images(self, images: Float[Tensor, "n 3 h w"]) -> Float32[Tensor, "n d"]:
        """Unit vectors of pictures in [0, 1]; the longer side is cut to a square about the middle."""
        self.model.to(images.device)
        size = self.model.config.vision_config.image_size
        return features(self.model, pixel_values=prepared(images.float(), size, self._mean, self._std))

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str], device: torch.device) -> Float32[Tensor, "n d"]:
        """Unit vectors of prompts, each read once and alone: no prompt's vector depends on its neighbours."""
        self.model.to(device)
        length = self.model.config.text_config.max_position_embeddings
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._known:
                tokens = self.tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt").to(device)
                self._known[prompt] = features(self.model, **tokens)[0]
        found = torch.stack([self._known[prompt].to(device) for prompt in prompts])
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return found


def _first_line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return kind + (said[0] if said else "")


def _colours(given: Any, default: Sequence[float], what: str) -> Sequence[float]:
    """Three finite numbers as they are, `default` where none are given; ValueError for anything else."""
    if given is None:
        return default
    numbers = given if isinstance(given, list | tuple) else []
    if len(numbers) == 3 and all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
        return numbers
    raise ValueError(f"{what} must be three numbers, got {given!r:.60}; correct its preprocessor_config.json")


def features(model: Any, **inputs: Tensor) -> Float[Tensor, "n d"]:
    """Unit vectors of `pixel_values`, or of `input_ids` with their `attention_mask`."""
    found = model.get_image_features(**inputs) if "pixel_values" in inputs else model.get_text_features(**inputs)
    found = found if isinstance(found, Tensor) else found.pooler_output  # transformers 4 gives the tensor, 5 wraps it
    return F.normalize(found, dim=-1)


def prepared(
    images: Float[Tensor, "n 3 h w"], size: int, mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "n 3 size size"]:
    """As CLIP's own processor has it: the shorter side scaled to `size` (bicubic), the middle cut out, normalised."""
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        short = min(height, width)
        scaled = height * size // short, width * size // short
        images = F.interpolate(images, scaled, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
        images = images[..., top : top + size, left : left + size]
    centre, spread = (images.new_tensor(list(values))[:, None, None] for values in (mean, std))
    return (images - centre) / spread
