"""The wire as the protocol has it, read back as it was written, and nothing else is read."""

import hashlib
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_servers import loaded
from safetensors.torch import load_file, save

from adascope_fast import backbones
from adascope_fast.remote_rollout import wire
from adascope_fast.remote_rollout.wire import Request
from adascope_fast.rollout import OwnNoise
from adascope_fast.schedules.samplers import flow_sde

SCHEDULE = flow_sde(torch.linspace(1, 0, 4), noise_level=0.7)
REQUEST = Request("w", ["a", "b"], [1, 2**63 - 1], [1, 1], 4.5, "gaussian", True, SCHEDULE)
ABOUT: dict[str, Any] = {
    "version": 1,
    "weights": "w",
    "prompts": ["a", "b"],
    "seeds": [1, 2],
    "start_seeds": [1, 2],
    "guidance_scale": 4.5,
    "kind": "gaussian",
    "x0": True,
    "sampler": "flow_sde",
}
TABLES = {"timesteps": torch.rand(3), "coef": torch.rand(3, 3), "x0_coef": torch.rand(3, 2)}


def _body(tables: dict[str, Any] | None = None, **change: Any) -> bytes:
    return save(TABLES if tables is None else tables, metadata={"adascope_fast": json.dumps(ABOUT | change)})


def test_a_request_is_read_as_it_was_written():
    found = Request.read(REQUEST.write())
    assert (found.weights, found.prompts, found.seeds) == (REQUEST.weights, REQUEST.prompts, REQUEST.seeds)
    assert (found.start_seeds, found.guidance_scale, found.kind) == ([1, 1], 4.5, "gaussian")
    assert found.asks_x0 is True
    for name in TABLES:
        assert torch.equal(getattr(found.schedule, name), getattr(SCHEDULE, name))
    assert found.schedule.kind == "flow_sde"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (pickle.dumps(TABLES), "a safetensors file"),
        (b"", "a safetensors file, got 0 bytes"),
        (struct.pack("<Q", 2**40) + b"{}", "with a header of at most 16777216 bytes"),
        (save(TABLES), 'whose metadata has "adascope_fast"'),
        (_body()[:-4], "safetensors file"),
        (_body(version=2), "a request speaks version 2 of the wire, this adascope-fast 1"),
        (_body(prompts=[]), '"prompts" must be a list of 1 to 4096 texts'),
        (_body(prompts=["a", 1]), '"prompts" must be a list'),
        (_body(prompts=["a", "x" * 10_001]), "at most 10000 characters"),
        (_body(seeds=[1]), '"seeds" must be 2 whole numbers below 2\\^63'),
        (_body(seeds=[1, -1]), '"seeds" must be 2 whole numbers'),
        (_body(seeds=[1, 2**63]), '"seeds" must be 2 whole numbers'),
        (_body(seeds=[1, True]), '"seeds" must be 2 whole numbers'),
        (_body(start_seeds=None), '"start_seeds" must be 2 whole numbers'),
        (_body(guidance_scale="1"), '"guidance_scale" must be a number from 0 to 1000'),
        (_body(guidance_scale=1e6), '"guidance_scale" must be a number from 0 to 1000'),
        (_body(kind="sum"), '"kind" one of gaussian, squared_error'),
        (_body(x0=1), '"x0" must be true or false'),
        (_body(weights=None), '"weights" and "sampler" must be texts'),
        (_body(TABLES | {"more": torch.zeros(1)}), "the tensors must be timesteps, coef, x0_coef, got "),
        (_body(TABLES | {"coef": torch.rand(3, 3).double()}), "coef must be float32, got F64"),
        (_body(TABLES | {"coef": torch.rand(4, 3)}), r"coef must have a row a step, got shape \[4, 3\]; send \[3, 3\]"),
        (_body(TABLES | {"timesteps": torch.tensor(1.0)}), "timesteps must have a row a step"),
        (_body({name: table[:0] for name, table in TABLES.items()}), "timesteps must have a row a step"),
        (_body(TABLES | {"x0_coef": torch.full((3, 2), torch.inf)}), "x0_coef must be finite"),
        (_body(TABLES | {"coef": -torch.ones(3, 3)}), "the std of a step is 0 or more"),
    ],
)
def test_anything_else_is_refused_in_one_line(body: bytes, said: str):
    with pytest.raises(ValueError, match=said) as caught:
        Request.read(body)
    assert str(caught.value).isprintable()


def test_an_answer_that_nobody_could_hold_is_refused():
    REQUEST.refuse_more((4, 64, 64))
    with pytest.raises(ValueError, match="an answer has at most 2147483648 values, and this one has"):
        REQUEST.refuse_more((16, 4096, 4096))


def test_the_digest_is_as_documented():
    tensors = {"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor([0.5])}
    by_hand = b"a\n1\n" + struct.pack("<f", 0.5) + b"b\n1,2\n" + struct.pack("<2f", 1.0, 2.0)
    assert wire.digest(tensors) == hashlib.sha256(by_hand).hexdigest()
    assert wire.digest({"b": tensors["b"].T.contiguous(), "a": tensors["a"]}) != wire.digest(tensors)


def test_weights_are_the_file_that_diffusers_reads(tmp_path: Path):
    model = loaded()
    tensors, metadata = model.adapter_file()
    body, digest = wire.write_weights(tensors, metadata)
    model.save_adapter(tmp_path / "saved")
    (saved,) = (tmp_path / "saved").glob("*.safetensors")
    (tmp_path / "sent.safetensors").write_bytes(body)
    expected, found = load_file(saved), load_file(tmp_path / "sent.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert _metadata(saved.read_bytes()).items() <= _metadata(body).items()
    backbones.load("scenes", adapter=tmp_path / "sent.safetensors")  # refuses one that does not reach every layer
    read, told = wire.read_weights(body)
    assert told == digest
    model.load_adapter_file(read)
    with pytest.raises(ValueError, match=r"the model's trained weights are those of its unet, got 'other\.x'"):
        model.load_adapter_file(read | {"other.x": torch.zeros(1)})


def _metadata(body: bytes) -> dict[str, str]:
    (length,) = struct.unpack("<Q", body[:8])
    return json.loads(body[8 : 8 + length])["__metadata__"]


@pytest.mark.parametrize(
    ("tensors", "told", "said"),
    [
        ({"a": torch.ones(2)}, "0" * 64, "the digest of the weights is .*, got 0000"),
        ({"a": torch.ones(2)}, None, "the digest of the weights is .*, got None"),
        ({"a": torch.tensor([torch.nan])}, "", "trained weights are finite, and a is not"),
        ({"a": torch.ones(2).bfloat16()}, "", "a must be float32, got BF16"),
        ({}, "", "one tensor or more, got none"),
    ],
)
def test_other_weights_are_refused(tensors: Any, told: Any, said: str):
    told = wire.digest(tensors) if told == "" and all(v.dtype == torch.float32 for v in tensors.values()) else told
    body = save(tensors, metadata={"adascope_fast": json.dumps({"version": 1, "weights": told})})
    with pytest.raises(ValueError, match=said):
        wire.read_weights(body)


def test_noise_is_what_a_training_draws_on_the_cpu():
    generator = torch.Generator("cpu")
    generator.manual_seed(2**62 + 1)
    start, steps = torch.randn(4, 8, 8, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)
    assert torch.equal(wire.noise_of(2**62 + 1, (3, 4, 8, 8)), torch.cat([start[None], steps]))
    noise, table = OwnNoise(77), torch.empty(2, 3, 4, 8, 8)
    noise.fill([table[:, 0], table[:, 1:]], [5, 9])
    assert torch.equal(torch.stack([wire.noise_of(noise.seed(number), (3, 4, 8, 8)) for number in (5, 9)]), table)
