"""What goes over the wire between a training and a reward server, version 1: one safetensors file there, JSON back.

The file's metadata has one entry, `adascope_fast`, the JSON of {"version": 1, "encoding": ..., "prompts": [...]} and,
where a prompt has any, "metadata": [{...}, ...]. The encoding says what the tensors are:

- `safetensors`: `images` [n, 3, h, w] of float32, float16 or bfloat16 in [0, 1], exactly as they are, or of uint8;
- `png`: `0`, `1`, ... the bytes of PNGs, RGB of 8 bits and of one size.

Scores come back as numbers of JSON, which hold a float32 exactly; null is a score that is not finite.
"""

import io
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import PIL.Image
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from adascope_fast.serving.wire import read_header, refuse_version, write_file
from adascope_fast.settings import one_line

VERSION = 1
ENCODINGS = ("safetensors", "png")
MOST_IMAGES = 1024
MOST_PIXELS = 2**26  # of all images of a request
MOST_OF_A_PROMPT = 10_000  # characters
MOST_METADATA = 2**20  # characters of its JSON

_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
_PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"
_RGB_OF_8_BITS = (8, 2)


@dataclass(frozen=True)
class Batch:
    """Images [n, 3, h, w] in [0, 1], and of each its prompt and a dict, which is mostly empty."""

    images: Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(self.images[rows], self.prompts[rows], self.metadata[rows])


_SWITCHES = ("has_parts", "has_breakdown", "checks_prompts", "takes_metadata")


@dataclass(frozen=True)
class Served:
    """What a server says of its reward."""

    name: str
    digest: str
    """SHA-256 of what the reward is made of: another one is another reward."""
    package: str
    """Version of adascope-fast there."""
    has_parts: bool
    weights: dict[str, float]
    has_breakdown: bool
    checks_prompts: bool
    takes_metadata: bool
    most_bytes: int
    """The longest body that is taken."""
    version: int = VERSION

    def write(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Of plain values; ValueError where they are none of these, or of another version."""
        refuse_version(values, VERSION)
        found: dict[str, Any] = {field.name: values.get(field.name) for field in fields(cls)}
        weights = found["weights"]
        is_right = (
            all(isinstance(found[name], str) for name in ("name", "digest", "package"))
            and all(isinstance(found[name], bool) for name in _SWITCHES)
            and type(found["most_bytes"]) is int
            and isinstance(weights, dict)
            and all(_is_number(weight) for weight in weights.values())
        )
        if not is_right:
            raise ValueError("its description of the reward has not the fields that it must have")
        found["name"] = one_line(found["name"])[:200]
        return cls(**found)


def write(
    images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = (), *, encoding: str
) -> bytes:
    """The body of a request.

    Args:
        images: [n, 3, h, w] in [0, 1]; `png` rounds them to 8 bits.
        metadata: a dict for each prompt, or none at all.

    Raises:
        ValueError: an image is not within [0, 1], or the numbers of images, prompts and metadata differ.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts) or len(metadata) not in (0, len(images)):
        raise ValueError(
            f"images must have shape [n, 3, h, w] and a prompt each, got shape {list(images.shape)}, {len(prompts)} "
            f"prompts and {len(metadata)} metadata; give as many of each"
        )
    images = images.detach().cpu()
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(
            f"images lie in [0, 1], got values from {images.min().item():g} to {images.max().item():g}; scale them"
        )
    about: dict[str, Any] = {"version": VERSION, "encoding": encoding, "prompts": list(prompts)}
    if any(metadata):
        about["metadata"] = [dict(one) for one in metadata]
    if encoding == "png":
        tensors = {str(place): _png(image) for place, image in enumerate(images)}
    else:
        tensors = {"images": images.to(images.dtype if images.dtype in _TYPES[:3] else torch.float32).contiguous()}
    return write_file(tensors, about)


def read(body: bytes) -> Batch:
    """What `write` wrote, images as float32 but for float16 and bfloat16.

    Raises:
        ValueError: it is anything else, or more than may be sent at once; in one line.
    """
    try:
        about, names = _header(body)
        prompts = _prompts(about)
        metadata = read_metadata(about, prompts)
        images = _images_of_pngs(body, names, len(prompts)) if about["encoding"] == "png" else _images(body, names)
    except SafetensorError as error:
        raise ValueError(f"a request is a safetensors file, got {one_line(str(error))[:200]}; send one") from None
    if len(images) != len(prompts):
        raise ValueError(
            f"a request has a prompt an image, got {len(images)} images and {len(prompts)} prompts; send as many"
        )
    return Batch(images, prompts, metadata)


def write_scores(scores: Tensor) -> list[float | None]:
    """Scores as JSON has them; what is not finite is None."""
    return [value if is_finite else None for value, is_finite in zip(scores.tolist(), scores.isfinite(), strict=True)]


def read_scores(values: Any, count: int) -> Tensor:
    """Scores [count] of what JSON has, NaN for null; ValueError where they are others, or not as many."""
    if not isinstance(values, list) or len(values) != count:
        got = f"{len(values)}" if isinstance(values, list) else type(values).__name__
        raise ValueError(f"its answer has not {count} scores, got {got}")
    wrong = [value for value in values if value is not None and not _is_number(value)]
    if wrong:
        raise ValueError(f"its scores are not numbers within float32, got {str(wrong[0])[:40]!r}")
    return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float32)


def read_numbers(values: Any) -> dict[str, float]:
    """Finite numbers by name; ValueError for anything else."""
    if not isinstance(values, dict) or not all(_is_number(value) for value in values.values()):
        raise ValueError("its answer has no numbers by name")
    return {str(name): float(value) for name, value in values.items()}


def read_prompts(values: Any) -> list[str]:
    """A list of prompts; ValueError where it is none, or one is too long."""
    if not isinstance(values, list) or not all(isinstance(prompt, str) for prompt in values):
        raise ValueError('"prompts" must be a list of texts; send a text an image')
    longest = max(map(len, values), default=0)
    if longest > MOST_OF_A_PROMPT:
        raise ValueError(f"a prompt has at most {MOST_OF_A_PROMPT} characters, got one of {longest}; shorten it")
    return values


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float32 can hold."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= torch.finfo(torch.float32).max


def _header(body: bytes) -> tuple[dict[str, Any], list[str]]:
    """What the metadata says, and the names of the tensors."""
    about, tensors = read_header(body, VERSION)
    if about.get("encoding") not in ENCODINGS:
        raise ValueError(f'"encoding" is {" or ".join(ENCODINGS)}, got {about.get("encoding")!s:.20}; send one')
    return about, list(tensors)


def _prompts(about: Mapping[str, Any]) -> list[str]:
    prompts = read_prompts(about.get("prompts"))
    if not 1 <= len(prompts) <= MOST_IMAGES:
        raise ValueError(f"a request has 1 to {MOST_IMAGES} images, got {len(prompts)} prompts; send fewer at once")
    return prompts


def read_metadata(about: Mapping[str, Any], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """A dict for each prompt, empty where none are told; ValueError for anything else, or two of one prompt."""
    metadata = about.get("metadata", [])
    if not isinstance(metadata, list) or not all(isinstance(one, dict) for one in metadata):
        raise ValueError('"metadata" must be a list of objects; send one a prompt, or none')
    if len(metadata) not in (0, len(prompts)):
        raise ValueError(f"metadata must be one a prompt, got {len(metadata)} of {len(prompts)}; send as many")
    if metadata and len(json.dumps(metadata)) > MOST_METADATA:
        raise ValueError(f"metadata have at most {MOST_METADATA} characters; send fewer")
    known: dict[str, dict[str, Any]] = {}
    for prompt, one in zip(prompts, metadata, strict=False):
        if known.setdefault(prompt, one) != one:
            raise ValueError(f"a prompt has one metadata, got two of {prompt!r:.80}; send them in two requests")
    return metadata or [{} for _ in prompts]


def _images(body: bytes, names: list[str]) -> Tensor:
    if names != ["images"]:
        raise ValueError(f'a request has one tensor, "images", got {len(names)} others or none; send it alone')
    images = load(body)["images"]
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or images.dtype not in _TYPES:
        raise ValueError(
            f"images must have shape [n, 3, h, w] and be float32, float16, bfloat16 or uint8, got shape "
            f"{list(images.shape)} of {images.dtype}; send such"
        )
    _refuse_pixels(len(images) * images.shape[2] * images.shape[3])
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError("images lie in [0, 1], got other values; scale them")
    return images


def _images_of_pngs(body: bytes, names: list[str], count: int) -> Tensor:
    if sorted(names) != sorted(map(str, range(count))):
        raise ValueError(f"a request has a PNG a prompt, named 0 to {count - 1}, got {len(names)} tensors; send these")
    tensors = load(body)
    files = [tensors[str(place)] for place in range(count)]
    if any(file.dtype != torch.uint8 or file.ndim != 1 for file in files):
        raise ValueError("a PNG is sent as its bytes, uint8 of one axis, got another tensor; send these")
    contents = [file.numpy().tobytes() for file in files]
    sizes = {_size(content) for content in contents}  # what it says, before anything is unpacked
    if len(sizes) > 1:
        raise ValueError("images of a request have one size, got several; send each size by itself")
    (width, height) = sizes.pop()
    _refuse_pixels(count * width * height)
    return torch.stack([_pixels(content, width, height) for content in contents]).float() / 255


def _refuse_pixels(count: int) -> None:
    if count > MOST_PIXELS:
        raise ValueError(f"images of a request have at most {MOST_PIXELS} pixels in all, got {count}; send fewer")


def _png(image: Tensor) -> Tensor:
    pixels = (image.float() * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _size(content: bytes) -> tuple[int, int]:
    """(width, height) of a PNG by its header; ValueError where it is no PNG of RGB in 8 bits."""
    if len(content) < 26 or content[:16] != _PNG:
        raise ValueError("an image must be a PNG, got other bytes; send PNGs")
    width, height = struct.unpack(">II", content[16:24])
    if tuple(content[24:26]) != _RGB_OF_8_BITS or not width or not height:
        raise ValueError("a PNG must be RGB of 8 bits, got another kind; convert it")
    return width, height


def _pixels(content: bytes, width: int, height: int) -> Tensor:
    try:
        with PIL.Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            pixels = bytearray(image.convert("RGB").tobytes())
    except Exception as error:  # broken files raise whatever their reader trips over
        raise ValueError(f"a PNG cannot be read ({one_line(str(error))[:120]}); send it again") from None
    if len(pixels) != width * height * 3:
        raise ValueError("a PNG must have the size that its header says, got another; send it again")
    return torch.frombuffer(pixels, dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
