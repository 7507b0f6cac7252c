"""How weights come into a model: the same bits come out wherever in a file, or in memory, they lay."""

import os
import shutil
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from adascope_fast import backbones
from adascope_fast.adascope.decoders import TinyDecoder
from adascope_fast.backbones import PipelineBackbone
from adascope_fast.loading import align, aligned, follow_umask, not_whole, quiet
from adascope_fast.rewards.clip import SCENES_CLIP, ClipSimilarity
from adascope_fast.training import checkpoint
from adascope_fast.training.draw import initial_latents

CAPTION = "a red circle on a grey background"


def _offsets(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.data_ptr() % 64 for tensor in tensors}


def _weights(model: PipelineBackbone) -> list[Tensor]:
    parts = [part for part in model.pipeline.components.values() if isinstance(part, nn.Module)]
    return [tensor for part in parts for tensor in chain(part.parameters(), part.buffers())]


def _moved(folder: Path, target: Path, num_bytes: int) -> Path:
    """The same pipeline, its tensors that many bytes further down their files."""
    shutil.copytree(folder, target)
    for path in target.rglob("*.safetensors"):
        save_file(load_file(path), path, {"format": "pt"} | ({"pad": "x" * num_bytes} if num_bytes else {}))
    return target


def _outputs(model: PipelineBackbone) -> list[Tensor]:
    """Of one row, whose products of a matrix and a vector depend most on where the matrix lies."""
    latents, condition = initial_latents(model, [1]), model.encode([CAPTION])
    with torch.no_grad():
        output = model.predict(latents, torch.tensor([400.0]), condition)
    return [*condition.values(), output, model.decode(latents)]


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_same_weights_give_the_same_bits_wherever_they_lie(tiny: Callable[[str], Path], tmp_path: Path, name: str):
    folder = tiny(name)
    in_memory: Any = DiffusionPipeline.from_pretrained(folder)
    for part in in_memory.components.values():
        if isinstance(part, nn.Module):
            for tensor in part.parameters():
                tensor.data = tensor.data.clone()
    want = _outputs(backbones.load(in_memory, lora_rank=2))
    for num_bytes in (0, 8, 16, 24, 32, 40, 48, 56):
        model = backbones.load(str(_moved(folder, tmp_path / str(num_bytes), num_bytes)), lora_rank=2)
        for got, wanted in zip(_outputs(model), want, strict=True):
            assert torch.equal(got, wanted)
        assert _offsets(_weights(model)) == {0}


@pytest.mark.parametrize("use", ["encode", "predict", "decode"])
def test_the_first_use_on_a_cpu_aligns_the_weights(tiny: Callable[[str], Path], tmp_path: Path, use: str):
    folder = _moved(tiny("sd"), tmp_path / "moved", 8)
    condition, latents = backbones.load(str(folder)).encode([CAPTION]), torch.zeros(1, 4, 8, 8)
    model = backbones.load(str(folder))
    assert _offsets(_weights(model)) != {0}, "the file's own places"
    uses: dict[str, Callable[[], Any]] = {
        "encode": lambda: model.encode([CAPTION]),
        "predict": lambda: model.predict(latents, torch.tensor([400.0]), condition),
        "decode": lambda: model.decode(latents),
    }
    uses[use]()
    assert _offsets(_weights(model)) == {0}


def test_aligning_keeps_values_layout_and_identity():
    buffer = torch.arange(1.0, 200.0)
    layer = nn.Conv2d(2, 3, 3)
    parameter, last = layer.weight, torch.channels_last
    parameter.data = buffer[1:55].view(3, 3, 3, 2).permute(0, 3, 1, 2)
    layer.register_buffer("count", buffer[3:5])
    want, strides = parameter.detach().clone(), parameter.stride()
    align(layer)
    assert layer.weight is parameter
    assert torch.equal(parameter, want)
    assert parameter.stride() == strides
    assert parameter.is_contiguous(memory_format=last)
    assert _offsets([parameter, layer.get_buffer("count")]) == {0}
    there = parameter.data_ptr()
    align(layer)
    assert parameter.data_ptr() == there, "once is enough"


def test_a_checkpoint_is_read_into_aligned_memory(tmp_path: Path):
    checkpoint.save(tmp_path / "1", {"a": torch.arange(3.0), "b": torch.arange(5.0)}, {})
    tensors = checkpoint.load(tmp_path / "1").tensors
    assert _offsets(tensors.values()) == {0}
    assert torch.equal(tensors["b"], torch.arange(5.0))
    assert _offsets(load_file(tmp_path / "1" / "state.safetensors").values()) != {0}, "which the file does not give"
    assert aligned({}) == {}


def test_judges_and_decoders_are_read_into_aligned_memory(tmp_path: Path, save_tiny: Callable[..., Any]):
    assert _offsets(load_file(SCENES_CLIP / "model.safetensors").values()) != {0}
    clip = ClipSimilarity.load().model
    assert _offsets(chain(clip.parameters(), clip.buffers())) == {0}
    save_tiny(tmp_path / "tiny")
    tiny_decoder = TinyDecoder(str(tmp_path / "tiny")).model
    assert _offsets(chain(tiny_decoder.parameters(), tiny_decoder.buffers())) == {0}


def _without(folder: Path, target: Path, name: str = "", **others: Tensor) -> Path:
    """The same model without a weight, and with others."""
    shutil.copytree(folder, target)
    (path,) = target.glob("*.safetensors")
    tensors = {key: value for key, value in load_file(path).items() if key != name}
    save_file(tensors | others, path, {"format": "pt"})
    return target


def test_a_clip_without_a_weight_is_refused(tmp_path: Path):
    folder = _without(SCENES_CLIP, tmp_path / "clip", "visual_projection.weight")
    with pytest.raises(ValueError, match=r"all its weights, and visual_projection.weight is missing"):
        ClipSimilarity.load(str(folder))


def test_a_tiny_decoder_without_a_weight_is_refused(tmp_path: Path, save_tiny: Callable[..., Any]):
    save_tiny(tmp_path / "tiny")
    folder = _without(tmp_path / "tiny", tmp_path / "broken", "decoder.layers.0.bias")
    with pytest.raises(ValueError, match=r"all its weights, and decoder.layers.0.bias is missing"):
        TinyDecoder(str(folder))


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_weights_of_another_name_or_shape_are_told(tiny: Callable[[str], Path], tmp_path: Path, part: str):
    folder = tmp_path / "model"
    shutil.copytree(tiny("sd"), folder)
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    first, second, *_ = sorted(tensors)

    def load(changes: dict[str, Tensor], without: str = "") -> None:
        kept = {name: value for name, value in tensors.items() if name != without}
        save_file(kept | changes, path, {"format": "pt"})
        backbones.load(str(folder))

    with pytest.warns(RuntimeWarning, match=f"the {part} of .* has weights that are not used, other.bias$"):
        load({"other.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=rf"{first} is missing .* its file has names unknown here, other.bias$"):
        load({"other.bias": tensors[first]}, without=first)
    with pytest.raises(ValueError, match=second):
        load({second: torch.zeros(3, 5)})


def test_names_are_counted_where_there_are_many():
    assert "and a and 2 more are missing" in not_whole("the unet", ["a", "b", "c"])
    assert "and some are missing" in not_whole("the unet", [])


def test_quiet_within_quiet_stays_quiet():
    before = transformers_logging.is_progress_bar_enabled()
    with quiet():
        with quiet():
            pass
        assert not transformers_logging.is_progress_bar_enabled()
        assert not diffusers_logging.is_progress_bar_enabled()
    assert transformers_logging.is_progress_bar_enabled() == before


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_get_the_mode_that_the_umask_gives(tmp_path: Path, mask: int):
    (tmp_path / "part").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "part" / "a.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "b.safetensors")
    before = os.umask(mask)
    try:
        follow_umask(tmp_path / "part")
        follow_umask(tmp_path / "b.safetensors")
        (tmp_path / "new").touch()
        assert os.umask(mask) == mask, "the umask is left as it was"
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(["a.safetensors", "b.safetensors", "new"], 0o666 & ~mask)
