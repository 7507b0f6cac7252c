"""A CLIP: the embedded `scenes-clip`, or any other by its folder or repository; similarity of picture and prompt by it.

Only safetensors are read, and no code beside them runs. `n` pictures, `d` the shared embedding. The similarity is the
bare cosine, neither clamped nor scaled; its mean over pictures is the CLIP score that papers report for ViT-L/14 near
0.24. A caption longer than the model reads is cut.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from adascope_fast.loading import align, load_whole

SCENES_CLIP = Path(__file__).parents[1] / "assets" / "scenes-clip"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's CLIP, for folders that name none."""
MAX_KNOWN = 4096  # prompts whose embeddings are kept


class Clip:
    """Unit vectors of pictures and prompts by a CLIP, which is frozen.

    Args:
        model: a transformers CLIPModel.
        tokenizer: its tokenizer.
        mean, std: of the three colours, what pictures are normalised by.
        name: what reports call it.
        device: where it computes; "auto": where the pictures are.
        batch: pictures at a time; None: all that are given.
    """

    called: ClassVar[str] = "clip_similarity"
    rule: ClassVar[str] = (
        "a CLIP is 'scenes-clip', the folder of a transformers CLIPModel in safetensors with its tokenizer, or a "
        "Hugging Face repository of that kind"
    )
    """What an error says of it, and below what to do; subclasses say it of theirs."""
    step: ClassVar[str] = "download it first, or name a folder"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        name: str = "clip_similarity",
        device: str = "auto",
        batch: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name = model.requires_grad_(False).eval(), tokenizer, name
        align(self.model)
        self.device, self.batch = device, batch
        self._mean, self._std = mean, std
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    @classmethod
    def load(
        cls,
        name: str = "scenes-clip",
        *,
        dtype: str = "float32",
        device: str = "auto",
        batch: int | None = None,
        **more: Any,
    ) -> Self:
        """The CLIP of that name: `scenes-clip`, a folder, or a Hugging Face repository. ValueError if there is none.

        Args:
            dtype: what it computes in; its vectors are float32 whatever it is.
            more: what a subclass takes besides.
        """
        from transformers import CLIPModel, CLIPTokenizer

        refuse_absent(device)
        place = str(SCENES_CLIP) if name == "scenes-clip" else name
        with told(cls.rule, name, cls.step):
            refuse_bare(place)
            model = load_whole(CLIPModel, place, "it", trust_remote_code=False, dtype=getattr(torch, dtype))
            tokenizer = CLIPTokenizer.from_pretrained(place)
        mean, std = colours_of(place, f"the CLIP {name!r}")
        options = {"mean": mean, "std": std, "device": device, "batch": batch, **more}
        return cls(model, tokenizer, name=f"{cls.called} ({name})", **options)

    @torch.no_grad()
    def embed_images(self, images: Float[Tensor, "n 3 h w"]) -> Float32[Tensor, "n d"]:
        """Unit vectors of pictures in [0, 1]; the longer side is cut to a square about the middle."""
        device = device_of(self.device, images)
        self.model.to(device)
        size = self.model.config.vision_config.image_size
        found = []
        for part in images.split(self.batch or max(1, len(images))):
            pixels = prepared(part.to(device).float(), size, self._mean, self._std)
            found.append(features(self.model, pixel_values=pixels.to(self.model.dtype)))
        return torch.cat(found).to(images.device)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str], device: torch.device) -> Float32[Tensor, "n d"]:
        """Unit vectors of prompts, each read once and alone: no prompt's vector depends on its neighbours."""
        own = device if self.device == "auto" else torch.device(self.device)
        self.model.to(own)
        length = self.model.config.text_config.max_position_embeddings
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._known:
                tokens = self.tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt").to(own)
                self._known[prompt] = features(self.model, **tokens)[0]
        found = torch.stack([self._known[prompt].to(device) for prompt in prompts])
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return found


class ClipSimilarity(Clip):
    """Reward, sensor and score: the cosine of each picture with its prompt."""

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float32[Tensor, " n"]:
        """Cosine in [-1, 1] of each picture in [0, 1] with its prompt; higher is better."""
        return (self.embed_images(images) * self.embed_prompts(prompts, images.device)).sum(1)


def device_of(name: str, images: Tensor) -> torch.device:
    """The device that a reward computes on: that of the images for "auto"."""
    return images.device if name == "auto" else torch.device(name)


def refuse_absent(device: str) -> None:
    """ValueError where a device is named that torch does not see."""
    count, index = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and index >= count:
        raise ValueError(f'reward.device = "{device}" needs that CUDA GPU, and torch sees {count}; use "auto" or "cpu"')


def refuse_bare(place: str) -> None:
    """ValueError for a folder without config.json, which transformers would read as a model of its default sizes."""
    if Path(place).is_dir() and not (Path(place) / "config.json").is_file():
        raise ValueError("it has no config.json")


@contextmanager
def told(rule: str, name: str, step: str) -> Iterator[None]:
    """Within it files of a model are read; whatever they raise is a ValueError of one line with its name."""
    try:
        yield
    except (ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # broken files raise whatever their reader trips over
        raise ValueError(f"{rule}, got {name!r}: {_first_line(error)}; {step}") from error


def colours_of(place: str, what: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std of a model's preprocessor_config.json, CLIP's without one; ValueError where they are none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        described, _ = ImageProcessingMixin.get_image_processor_dict(place)
        why = f"a {type(described).__name__}"
    except (OSError, ValueError) as error:
        has_one = (Path(place) / "preprocessor_config.json").is_file()
        described, why = None if has_one else {}, _first_line(error)
    if not isinstance(described, dict):
        raise ValueError(f"the preprocessor_config.json of {what} must be a JSON object, got {why}; download it again")
    mean = _colours(described.get("image_mean"), MEAN, f"image_mean of {what}")
    return mean, _colours(described.get("image_std"), STD, f"image_std of {what}")


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


def features(model: Any, **inputs: Tensor) -> Float32[Tensor, "n d"]:
    """Unit vectors of `pixel_values`, or of `input_ids` with their `attention_mask`."""
    found = model.get_image_features(**inputs) if "pixel_values" in inputs else model.get_text_features(**inputs)
    found = found if isinstance(found, Tensor) else found.pooler_output  # transformers 4 gives the tensor, 5 wraps it
    return F.normalize(found.float(), dim=-1)


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
