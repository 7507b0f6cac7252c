"""What is written is what is read, and whatever else is sent is refused in one line before it costs anything."""

import io
import json
import pickle
import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save

from adascope_fast.rewards.remote import wire
from adascope_fast.serving.wire import MOST_HEADER

IMAGES = torch.rand(3, 3, 9, 14, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red circle", "", 'é"\\\n😀']


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_images_and_prompts_come_back_as_they_were(dtype: torch.dtype):
    images = IMAGES.to(dtype)
    metadata = [{}, {"count": 2, "of": ["é"]}, {}]
    found = wire.read(wire.write(images, PROMPTS, metadata, encoding="safetensors"))
    assert torch.equal(found.images, images.float() if dtype == torch.float64 else images)
    assert found.images.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    assert (found.prompts, found.metadata) == (PROMPTS, metadata)


def test_png_rounds_to_8_bits_and_other_programs_read_it():
    body = wire.write(IMAGES, PROMPTS, encoding="png")
    found = wire.read(body)
    assert torch.equal(found.images, (IMAGES * 255).round() / 255)
    assert found.metadata == [{}, {}, {}]
    start = body.index(b"\x89PNG")
    pixels = np.asarray(PIL.Image.open(io.BytesIO(body[start:])))
    assert pixels.tolist() == (IMAGES[0] * 255).round().permute(1, 2, 0).int().tolist()


def test_8_bits_of_another_client_are_taken_too():
    pixels = (IMAGES * 255).to(torch.uint8)
    assert torch.equal(wire.read(_body({"images": pixels})).images, pixels.float() / 255)


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
@pytest.mark.parametrize("encoding", wire.ENCODINGS)
def test_images_beyond_their_range_are_not_sent(encoding: str, value: float):
    images = IMAGES.clone()
    images[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=r"images lie in \[0, 1\], got values from"):
        wire.write(images, PROMPTS, encoding=encoding)


def test_scores_come_back_bit_by_bit_and_null_is_nan():
    values = torch.tensor([0.1, -1e-45, 3.4028234e38, 16777217.0, -0.0])
    sent = json.loads(json.dumps(wire.write_scores(values)))
    assert torch.equal(wire.read_scores(sent, 5).view(torch.int32), values.view(torch.int32))
    assert wire.write_scores(torch.tensor([float("nan"), float("-inf"), 1.0])) == [None, None, 1.0]
    assert wire.read_scores([None, 1], 2).isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0], "has not 2 scores, got 1"),
        ({"0": 1.0, "1": 2.0}, "has not 2 scores, got dict"),
        (None, "has not 2 scores, got NoneType"),
        (["1.0", 2.0], "not numbers within float32, got '1.0'"),
        ([True, 2.0], "got 'True'"),
        ([1e39, 2.0], "got '1e[+]39'"),
        ([10**400, 2.0], "got '1000"),
        ([[1.0], [2.0]], "not numbers"),
    ],
)
def test_scores_of_another_kind_are_refused(values: Any, said: str):
    with pytest.raises(ValueError, match=said):
        wire.read_scores(values, 2)


def _body(tensors: dict[str, torch.Tensor] | None = None, **about: Any) -> bytes:
    told = {"version": 1, "encoding": "safetensors", "prompts": PROMPTS} | about
    tensors = {"images": IMAGES} if tensors is None else tensors
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"adascope_fast": json.dumps(told)})


def _pngs(*files: bytes, **about: Any) -> bytes:
    tensors = {str(place): torch.tensor(list(file), dtype=torch.uint8) for place, file in enumerate(files)}
    return _body(tensors, **{"encoding": "png", "prompts": ["a"] * len(files)} | about)


def _file(width: int, height: int, *, mode: str = "RGB", claims: tuple[int, int] | None = None) -> bytes:
    """A PNG, with another size in its header if it claims one."""
    file = io.BytesIO()
    PIL.Image.new(mode, (width, height)).save(file, "PNG")
    content = file.getvalue()
    if claims is None:
        return content
    header = b"IHDR" + struct.pack(">II", *claims) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def _with_header(header: bytes, claims: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if claims is None else claims) + header


WHOLE = _body()
LENGTH = struct.unpack("<Q", WHOLE[:8])[0]
OVERLAPPING = (
    b'{"images":{"dtype":"F32","shape":[1,3,1,1],"data_offsets":[0,99]},"__metadata__":{"adascope_fast":"%s"}}'
)
TOLD = json.dumps({"version": 1, "encoding": "safetensors", "prompts": ["a"]}).replace('"', '\\"').encode()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "a safetensors file, got 0 bytes"),
        (b"hello", "got 5 bytes"),
        (b"<!DOCTYPE html><html></html>", "a header of at most"),
        (pickle.dumps({"images": [1.0], "prompts": ["a"]}), "a header of at most"),
        (PIL.Image.new("RGB", (8, 8)).tobytes() + b"x", "whose metadata has"),
        (_with_header(b"", 2**63), "a header of at most 16777216 bytes, got 9223372036854775808"),
        (_with_header(b"{" + b" " * MOST_HEADER), "a header of at most"),
        (_with_header(b"[" * 100_000), "nested too deep"),
        (_with_header(b"\xff\xfe"), "not JSON"),
        (_with_header(b'{"__metadata__": 3}'), "whose metadata has"),
        (_with_header(b'{"__metadata__": {"adascope_fast": "[]"}}'), "not an object of JSON, got list"),
        (_with_header(b'{"__metadata__": {"adascope_fast": "{\\"version\\": NaN}"}}'), "NaN is no number of JSON"),
        (_with_header(OVERLAPPING % TOLD) + bytes(12), "a safetensors file, got"),
        (save({"images": IMAGES}), "whose metadata has"),
        (WHOLE[:-1], "a safetensors file, got"),
        (WHOLE[: LENGTH // 2], "a header of at most"),
        (WHOLE + b"\0", "a safetensors file, got"),
        (_body(version=2), "a request speaks version 2 of the wire, this adascope-fast 1"),
        (_body(encoding="pickle"), '"encoding" is safetensors or png, got pickle'),
        (_body(prompts="abc"), '"prompts" must be a list of texts'),
        (_body(prompts=["a", 1, "b"]), '"prompts" must be a list of texts'),
        (_body(prompts=[]), "1 to 1024 images, got 0"),
        (_body(prompts=["a"] * 1025), "1 to 1024 images, got 1025"),
        (_body(prompts=["a", "b"]), "got 3 images and 2 prompts"),
        (_body(prompts=["a" * 10_001, "b", "c"]), "at most 10000 characters, got one of 10001"),
        (_body(metadata=[1, 2, 3]), '"metadata" must be a list of objects'),
        (_body(metadata=[{}]), "metadata must be one a prompt, got 1 of 3"),
        (_body(prompts=["a", "a", "b"], metadata=[{}, {"n": 1}, {}]), "a prompt has one metadata, got two of 'a'"),
        (_body(metadata=[{"a": "x" * 2**20}, {}, {}]), "metadata have at most"),
        (_body({"pictures": IMAGES}), 'one tensor, "images"'),
        (_body({"images": IMAGES, "more": IMAGES * 0.5}), 'one tensor, "images"'),
        (_body({"images": IMAGES[0]}), r"shape \[n, 3, h, w\]"),
        (_body({"images": IMAGES[:, :1]}), r"got shape \[3, 1, 9, 14\]"),
        (_body({"images": IMAGES[:, :, :0]}), r"got shape \[3, 3, 0, 14\]"),
        (_body({"images": IMAGES.double()}), "of torch.float64"),
        (_body({"images": IMAGES.to(torch.complex64)}), "of torch.complex64|a safetensors file"),
        (_body({"images": IMAGES * 2 - 1}), r"images lie in \[0, 1\]"),
        (_body({"images": IMAGES.log().log()}), r"images lie in \[0, 1\]"),
        (_body({"images": torch.zeros(1, 3, 1, 1)}, prompts=["a"], encoding="png"), "a PNG a prompt, named 0 to 0"),
        (_body({"0": torch.zeros(30)}, prompts=["a"], encoding="png"), "a PNG is sent as its bytes"),
        (_pngs(b"GIF89a" + bytes(40)), "an image must be a PNG"),
        (_pngs(b""), "an image must be a PNG"),
        (_pngs(_file(8, 8, mode="RGBA")), "a PNG must be RGB of 8 bits"),
        (_pngs(_file(8, 8, mode="L")), "a PNG must be RGB of 8 bits"),
        (_pngs(_file(8, 8), _file(8, 9)), "images of a request have one size"),
        (_pngs(_file(8, 8)[:44]), "a PNG cannot be read"),
        (_pngs(_file(8, 8)[:33]), "a PNG cannot be read"),
        (_pngs(_file(8, 8, claims=(2**31 - 1, 2**31 - 1))), "at most 67108864 pixels in all"),
        (_pngs(_file(8, 8, claims=(0, 8))), "a PNG must be RGB of 8 bits"),
        (_pngs(*[_file(8, 8, claims=(512, 512))] * 257), "at most 67108864 pixels in all, got 67371008"),
        (_pngs(_file(8, 8), prompts=["a", "b"]), "named 0 to 1, got 1"),
    ],
)
def test_anything_else_is_refused_in_one_line(body: bytes, said: str):
    with pytest.raises(ValueError, match=said) as caught:
        wire.read(body)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_every_body_that_is_cut_or_changed_is_refused_or_read_and_nothing_else():
    generator, said = np.random.default_rng(0), []
    for body in (WHOLE, _pngs(_file(8, 8), _file(8, 8))):
        for _ in range(300):
            changed = bytearray(body[: generator.integers(len(body) + 1)] if generator.random() < 0.3 else body)
            for place in generator.integers(max(1, min(len(changed), 700)), size=3):
                if place < len(changed):
                    changed[place] = generator.integers(256)
            try:
                found = wire.read(bytes(changed))
            except ValueError as error:
                said.append(str(error))
            else:
                assert len(found.prompts) == len(found.images)
    assert len(said) > 300
    assert all(line.isprintable() for line in said)


def test_a_bomb_is_told_before_it_is_unpacked():
    body = _pngs(*[_file(2**11, 2**11)] * 17)
    assert len(body) < 2**18
    with pytest.raises(ValueError, match="pixels in all"):
        wire.read(body)
