"""Damaged files of a pipeline: one line that names the file or the component, for a plan and for a training alike."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, refused
from safetensors.torch import load_file, save_file

from adascope_fast import backbones

FAMILIES = ("sd", "sdxl", "sd3", "flux")
OPTIONS: dict[str, dict[str, Any]] = {
    "sd3": {"max_sequence_length": 4},
    "flux": {"max_sequence_length": 4, "resolution": 16},
}
SHAPES = (b"[]", b"{}", b"3", b'"text"', b"null", b"[[[[1]]]]")


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _damages(path: Path) -> dict[str, bytes | None]:
    content = path.read_bytes()
    damages: dict[str, bytes | None] = {
        "deleted": None,
        "empty": b"",
        "garbage": bytes(range(256)) * 3,
        "truncated": content[: len(content) // 2],
    }
    if path.suffix == ".json":
        damages |= {f"shape {shape.decode()}": shape for shape in SHAPES}
        damages["not utf-8"] = b'{"a": "\xff"}'
    if path.suffix == ".safetensors":
        length = 8 + int.from_bytes(content[:8], "little")
        for place in (0, 3, 7, 8, 9, length // 3, length // 2, length - 10):
            damages[f"byte {place}"] = content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
    return damages


@pytest.mark.parametrize(
    ("family", "every"), [("sd", 4), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in FAMILIES)]
)
def test_every_damaged_file_is_one_line_that_names_it(
    tiny: Callable[[str], Path], tmp_path: Path, family: str, every: int
):
    """Each damage of each file, or each fourth of them, another one of each file."""
    folder, options = tmp_path / "model", OPTIONS.get(family, {})
    shutil.copytree(tiny(family), folder)
    wrong = []
    for number, name in enumerate(_files(folder)):
        path, component = folder / name, name.split("/")[0]
        content = path.read_bytes()
        for damage, changed in list(_damages(path).items())[number % every :: every]:
            if changed is None:
                path.unlink()
            else:
                path.write_bytes(changed)
            told = []
            for read in (backbones.outline, backbones.load):
                try:
                    read(str(folder), **options)
                    told.append("")
                except ValueError as error:
                    told.append(str(error))
                except Exception as error:  # the others are what must not be
                    told.append(f"{type(error)}\n{error}")
            path.write_bytes(content)
            names_it = path.name in told[1] or component in told[1]
            if told[0] != told[1] or not told[1] or "\n" in told[1] or not names_it:
                wrong.append((name, damage, told))
    needless = [one for one in wrong if one[1] == "deleted" and one[0].endswith(("vocab.json", "merges.txt"))]
    assert [one for one in wrong if one not in needless] == []


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model_index.json", "["),
        ("unet/config.json", ""),
        ("scheduler/scheduler_config.json", "{}"),
        ("tokenizer/tokenizer_config.json", "[1]"),
        ("vae/diffusion_pytorch_model.safetensors", "weights"),
    ],
)
def test_the_command_line_says_it_in_one_line(tiny, tmp_path: Path, command: str, file: str, content: str):
    folder = tmp_path / "model"
    shutil.copytree(tiny("sd"), folder)
    (folder / file).write_text(content)
    prompts = ["prompts.train=scenes:train", "prompts.held_out=scenes:held_out"]
    assert file in refused(command, TINY, f"model.name={folder}", f"run.folder={tmp_path / 'run'}", *prompts)


VALUES = (10**9, -(10**9), -1, "text", [10**9], [], {}, True, 1e300, "", [[]], 0.5)
NUMBERS = {
    "unet/config.json": ("block_out_channels", "in_channels", "layers_per_block", "cross_attention_dim", "sample_size",
                         "attention_head_dim", "norm_num_groups"),
    "vae/config.json": ("block_out_channels", "latent_channels", "layers_per_block", "norm_num_groups"),
    "text_encoder/config.json": ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                 "max_position_embeddings", "intermediate_size"),
    "scheduler/scheduler_config.json": ("num_train_timesteps", "beta_schedule", "prediction_type"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in NUMBERS.items() for key in keys])
def test_an_absurd_value_is_one_line_that_names_its_component(tiny, tmp_path: Path, file: str, key: str):
    folder = tmp_path / "model"
    shutil.copytree(tiny("sd"), folder)
    before = json.loads((folder / file).read_text())
    component = f"(?i){file.split('/')[0]}"
    for value in VALUES:
        (folder / file).write_text(json.dumps(before | {key: value}))
        with pytest.raises(ValueError, match=component) as raised:
            backbones.outline(str(folder))
        assert "\n" not in str(raised.value), value
        with pytest.raises(ValueError, match=component) as again:
            backbones.load(str(folder))
        assert str(again.value) == str(raised.value), value


@pytest.mark.parametrize("part", ["safety_checker", "feature_extractor", "image_encoder"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_what_is_never_run_may_be_absent(tiny, tmp_path: Path, family: str, part: str):
    folder = tmp_path / "model"
    shutil.copytree(tiny(family), folder)
    index = json.loads((folder / "model_index.json").read_text())
    if part not in index:
        assert (family, part) != ("sd", "safety_checker")
        return
    classes = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }
    (folder / "model_index.json").write_text(json.dumps(index | {part: classes[part]}))
    options = OPTIONS.get(family, {})
    backbones.check(str(folder))
    backbones.outline(str(folder), **options)
    assert backbones.load(str(folder), **options).pipeline.components[part] is None


@pytest.mark.parametrize("family", ["sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd", "flux"))])
def test_a_part_that_is_run_must_be_there_for_plan_and_training_in_the_same_words(tiny, tmp_path: Path, family: str):
    options = OPTIONS.get(family, {})
    parts = backbones.family_of(json.loads((tiny(family) / "model_index.json").read_text())["_class_name"]).parts
    for part in parts:
        for how in ("folder", "null", "name", "class"):
            folder = tmp_path / f"{part}-{how}"
            shutil.copytree(tiny(family), folder)
            index = json.loads((folder / "model_index.json").read_text())
            if how == "folder":
                shutil.rmtree(folder / part)
            else:
                changed = {"null": [None, None], "class": ["diffusers", "UNet1DModel"]}
                index = {key: value for key, value in index.items() if key != part}
                index |= {part: changed[how]} if how in changed else {}
                (folder / "model_index.json").write_text(json.dumps(index))
            told = set()
            for use in (backbones.check, backbones.outline, backbones.load):
                with pytest.raises(ValueError, match=part) as raised:
                    use(str(folder), **({} if use is backbones.check else options))
                told.add(str(raised.value))
            assert len(told) == 1


def test_json_files_alone_are_enough_for_a_plan(tiny, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("sd"), folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    assert backbones.outline(str(folder)).resolution == 16
    with pytest.raises(ValueError, match=r"weights of .* are not all there|has no folder tokenizer"):
        backbones.load(str(folder))


def test_far_more_weights_than_the_file_has_are_refused_before_they_take_memory(tiny, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("sd"), folder)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"vocab_size": 2**23}))
    with pytest.raises(ValueError, match=r"the text_encoder of .* hold \d+ numbers where text_encoder/config.json"):
        backbones.load(str(folder))


def test_a_changed_name_in_a_header_is_told_when_weights_are_read(tiny, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("sd"), folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace("conv_in.", "conv_im."): value for name, value in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"the unet of .* conv_in.bias"):
        backbones.load(str(folder))
