"""Where pipelines come from: single files, Hugging Face's cache, and what is said where the weights are not."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file

from adascope_fast import backbones, ops
from adascope_fast.backbones import sources
from adascope_fast.training.draw import initial_latents

CAPTION = "a red circle on a grey background"


def _output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.predict(initial_latents(model, [1]), torch.tensor([400.0]), model.encode([CAPTION]))


UNET_NAMES = [
    (r"^conv_in", "input_blocks.0.0"),
    (r"^time_embedding.linear_1", "time_embed.0"),
    (r"^time_embedding.linear_2", "time_embed.2"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^down_blocks.0.resnets.0", "input_blocks.1.0"),
    (r"^down_blocks.0.attentions.0", "input_blocks.1.1"),
    (r"^down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
    (r"^down_blocks.1.resnets.0", "input_blocks.3.0"),
    (r"^mid_block.resnets.0", "middle_block.0"),
    (r"^mid_block.attentions.0", "middle_block.1"),
    (r"^mid_block.resnets.1", "middle_block.2"),
    (r"^up_blocks.0.resnets.(\d)", r"output_blocks.\1.0"),
    (r"^up_blocks.0.upsamplers.0", "output_blocks.1.1"),
    (r"^up_blocks.1.resnets.0", "output_blocks.2.0"),
    (r"^up_blocks.1.resnets.1", "output_blocks.3.0"),
    (r"^up_blocks.1.attentions.0", "output_blocks.2.1"),
    (r"^up_blocks.1.attentions.1", "output_blocks.3.1"),
]
RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_NAMES = [
    (r"down_blocks.(\d).resnets.(\d)", r"down.\1.block.\2"),
    (r"down_blocks.(\d).downsamplers.0", r"down.\1.downsample"),
    (r"up_blocks.0.resnets.(\d)", r"up.1.block.\1"),
    (r"up_blocks.1.resnets.(\d)", r"up.0.block.\1"),
    (r"up_blocks.0.upsamplers.0", "up.1.upsample"),
    (r"mid_block.resnets.0", "mid.block_1"),
    (r"mid_block.resnets.1", "mid.block_2"),
    (r"mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    (r"mid_block.attentions.0.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
]


def _original_unet(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A tiny UNet of ours by the names of the original Stable Diffusion code."""
    named = {}
    for name, value in state.items():
        new = name
        for pattern, replacement in UNET_NAMES:
            new = re.sub(pattern, replacement, new)
        if ".resnets." in name:
            layer = name.split(".")[-2]
            new = new.replace(f".{layer}.", f".{RESNET_NAMES[layer]}.")
        named[f"model.diffusion_model.{new}"] = value
    return named


def _original_vae(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = {}
    for name, value in state.items():
        new = name
        for pattern, replacement in VAE_NAMES:
            new = re.sub(pattern, replacement, new)
        is_projection = ".attn_1." in new and value.ndim == 2
        named[f"first_stage_model.{new}"] = value[:, :, None, None] if is_projection else value
    return named


@pytest.fixture
def single_file(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """The tiny SD in one .safetensors file, as checkpoints of the original code are."""
    folder = tiny("sd")
    tensors = _original_unet(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    tensors |= _original_vae(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    for name, value in load_file(folder / "text_encoder" / "model.safetensors").items():
        whole = name if name.startswith("text_model.") else f"text_model.{name}"
        tensors[f"cond_stage_model.transformer.{whole}"] = value
    path = tmp_path / "tiny.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def _configurations(folder: Path, target: Path) -> Path:
    """The folder without its weights."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def test_a_single_file_is_the_same_model(tiny, single_file: Path, tmp_path: Path):
    base = _configurations(tiny("sd"), tmp_path / "base")
    backbones.check(str(single_file), base=str(base))
    model, plain = (
        backbones.load(str(single_file), base=str(base), lora_rank=2),
        backbones.load(str(tiny("sd")), lora_rank=2),
    )
    assert torch.equal(_output(model), _output(plain))
    latents = initial_latents(model, [1])
    torch.testing.assert_close(model.decode(latents), plain.decode(latents))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (
            "model.diffusion_model.input_blocks.1.1.proj_in.weight",
            "the model in .* all its weights, and some are missing",
        ),
        ("first_stage_model.decoder.conv_out.weight", "the model in .* all its weights, and some are missing"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.weight",
            "the text_encoder of .* and final_layer_norm.weight is missing",
        ),
    ],
)
def test_a_single_file_without_a_weight_is_refused(tiny, single_file: Path, tmp_path: Path, lost: str, message: str):
    base = _configurations(tiny("sd"), tmp_path / "base")
    tensors = load_file(single_file)
    del tensors[lost]
    save_file(tensors, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=message):
        backbones.load(str(tmp_path / "broken.safetensors"), base=str(base))


def test_what_a_single_file_lacks_comes_from_its_base(tiny, single_file: Path, tmp_path: Path):
    tensors = {name: value for name, value in load_file(single_file).items() if name.startswith("model.diffusion")}
    alone = tmp_path / "denoiser.safetensors"
    save_file({name: value + 0.01 for name, value in tensors.items()}, alone)
    with pytest.warns(RuntimeWarning, match=r"lacks a component .*; all but the unet is taken from"):
        model = backbones.load(str(alone), base=str(tiny("sd")), lora_rank=2)
    plain = backbones.load(str(tiny("sd")), lora_rank=2)
    assert torch.equal(model.encode([CAPTION])["text"], plain.encode([CAPTION])["text"])
    with torch.no_grad():
        for parameter in plain.denoiser.parameters():
            if not parameter.requires_grad:
                parameter.add_(0.01)
    torch.testing.assert_close(_output(model), _output(plain))


def test_a_single_file_says_which_repository_describes_it(single_file: Path):
    with pytest.raises(ValueError, match="repository stable-diffusion-v1-5/stable-diffusion-v1-5 could not be read"):
        backbones.check(str(single_file))


@pytest.fixture
def cache(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hugging Face's cache with the repository `someone/tiny`, as after a download."""
    repository, commit = tmp_path / "hub" / "models--someone--tiny", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny("sd"), repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


def test_a_repository_is_read_from_the_cache_without_a_network(tiny, cache: Path):
    backbones.check("someone/tiny")
    model = backbones.load("someone/tiny", lora_rank=2)
    assert torch.equal(_output(model), _output(backbones.load(str(tiny("sd")), lora_rank=2)))


def test_a_repository_that_is_not_in_the_cache_says_what_to_download(cache: Path):
    with pytest.raises(ValueError, match=r"hf download someone/else` where there is a network.*set model.name to that"):
        backbones.check("someone/else")
    shutil.rmtree(cache / "snapshots" / ("0" * 40) / "vae")
    with pytest.raises(ValueError, match="someone/tiny"):
        backbones.load("someone/tiny")


def test_weights_that_are_pickles_are_not_read(tiny, tmp_path: Path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny("sd"), folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    backbones.check(str(folder))
    with pytest.raises(ValueError, match=r"are not all there as safetensors: .*; download or convert them into"):
        backbones.load(str(folder))


@pytest.mark.parametrize("shard", ["", "-00001-of-00002"])
def test_files_of_another_variant_are_named_and_read(tiny, tmp_path: Path, shard: str):
    folder = tmp_path / "half"
    shutil.copytree(tiny("sd"), folder)
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16{shard}.safetensors"))
    with pytest.raises(ValueError, match=r'files of another variant, set model.variant = "fp16"'):
        backbones.load(str(folder))
    if not shard:
        assert torch.equal(
            _output(backbones.load(str(folder), variant="fp16")), _output(backbones.load(str(tiny("sd"))))
        )


def test_a_part_that_is_missing_or_broken_is_named(tiny, tmp_path: Path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny("sd"), folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ValueError, match="is not a whole pipeline, it has no folder tokenizer; save or download it"):
        backbones.load(str(folder))
    for text, found in [("{", "must be JSON, got Expecting"), ("[1]", r"must be a JSON object, got \[1\]")]:
        (folder / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match=f"model_index.json of .* {found}.*download it again"):
            backbones.check(str(folder))


def test_a_repository_behind_a_licence_says_where_to_accept_it(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise GatedRepoError("403 Client Error", response=SimpleNamespace(headers={}, request=None))  # type: ignore

    monkeypatch.setattr(sources, "hf_hub_download", refuse)
    with pytest.raises(ValueError, match=r"accept it on https://huggingface.co/someone/gated, then .* `hf auth login`"):
        backbones.check("someone/gated")


def _unreachable(*_: Any) -> None:
    raise OSError("Name or service not known")


@pytest.mark.parametrize(
    ("is_offline", "proxies", "want"), [(False, {}, True), (True, {}, False), (False, {"https": "p"}, False)]
)
def test_where_the_hub_has_no_address_nothing_but_its_cache_is_asked_and_it_is_told(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_offline: bool,
    proxies: dict[str, str],
    want: bool,
):
    asked = []
    download = sources.hf_hub_download

    def watched(*arguments: Any, local_files_only: bool, **more: Any) -> str:
        asked.append(local_files_only)
        return download(*arguments, local_files_only=True, **more)

    monkeypatch.setattr(sources, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr(sources, "getproxies", lambda: proxies)
    monkeypatch.setattr(sources, "getaddrinfo", _unreachable)
    monkeypatch.setattr(sources, "hf_hub_download", watched)
    sources.has_no_network.cache_clear()
    try:
        backbones.check("someone/tiny")
    finally:
        sources.has_no_network.cache_clear()
    assert set(asked) == {want}
    told = [record.getMessage() for record in caplog.records if "cannot be reached" in record.getMessage()]
    assert len(told) == want, "once"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "WanPipeline"}, "supported pipelines are StableDiffusionPipeline, .*, got 'WanPipeline'"),
        ({"_class_name": ["x", "Y"]}, "supported pipelines are"),
    ],
)
def test_other_pipelines_are_refused_by_name(tiny, tmp_path: Path, change: dict, message: str):
    folder = _configurations(tiny("sd"), tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=message):
        backbones.check(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 9}, "as many input as output channels, got 9 and 4"),
        ({"time_cond_proj_dim": 256}, "distilled for guidance"),
    ],
)
def test_unets_of_other_tasks_are_refused_before_weights_are_read(tiny, tmp_path: Path, change: dict, message: str):
    folder = _configurations(tiny("sd"), tmp_path / "other")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        backbones.check(str(folder))


def test_schnell_is_refused_as_a_folder_and_as_a_pipeline(tiny):
    from diffusers import FluxPipeline

    with pytest.raises(ValueError, match=r"schnell.*use FLUX.1-dev"):
        backbones.check(str(tiny("schnell")))
    with pytest.raises(ValueError, match=r"schnell.*use FLUX.1-dev"):
        backbones.load(FluxPipeline.from_pretrained(tiny("schnell")))


def test_a_loaded_pipeline_is_taken_as_it_is(tiny):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny("sd"))
    assert torch.equal(
        _output(backbones.load(pipeline, lora_rank=2)), _output(backbones.load(str(tiny("sd")), lora_rank=2))
    )


@pytest.mark.parametrize(
    ("name", "resolution", "message"),
    [
        ("sd", 15, "a multiple of 2 pixels for this model, got 15; set it to 14"),
        ("flux", 18, "a multiple of 4 pixels for this model, got 18; set it to 16"),
        ("sd3", 64, "at most 32 pixels for this model, got 64"),
    ],
)
def test_a_resolution_that_does_not_fit_is_refused(tiny, name: str, resolution: int, message: str):
    with pytest.raises(ValueError, match=message):
        backbones.load(str(tiny(name)), resolution=resolution)


@pytest.mark.parametrize(("name", "choice"), [("sd", "xformers"), ("sd3", "xformers"), ("flux", "flash")])
def test_attention_falls_back_aloud_or_not_at_all(tiny, name: str, choice: Any):
    options: dict[str, Any] = {"resolution": 16} if name == "flux" else {}
    with pytest.warns(RuntimeWarning, match=f"model.attention = '{choice}' cannot serve: .*; sdpa serves instead"):
        model = backbones.load(str(tiny(name)), attention=choice, **options)
    assert model.attention.startswith("sdpa: ")
    with ops.strict(), pytest.raises(ValueError, match=f"model.attention = '{choice}' cannot serve"):
        backbones.load(str(tiny(name)), attention=choice, **options)


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_attention_is_switched_where_it_can_serve(tiny, name: str, monkeypatch: pytest.MonkeyPatch):
    """Without the package only the switch itself can be watched: which of diffusers' two it is, and with what."""
    monkeypatch.setattr("adascope_fast.backbones.attention._obstacle", lambda denoiser, choice: "")
    told = []
    pipeline = backbones.load(str(tiny(name))).pipeline
    denoiser = type(pipeline.components["transformer" if name != "sd" else "unet"])
    monkeypatch.setattr(denoiser, "set_attention_backend", lambda self, choice: told.append(("dispatcher", choice)))
    monkeypatch.setattr(
        denoiser, "enable_xformers_memory_efficient_attention", lambda self: told.append(("processors", "xformers"))
    )
    model = backbones.load(str(tiny(name)), attention="xformers")
    assert told == [("dispatcher" if name == "flux" else "processors", "xformers")]
    assert model.attention == "xformers: asked for"


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantised_weights_need_a_gpu_and_their_package(tiny, quantize: Any, monkeypatch: pytest.MonkeyPatch):
    if torch.cuda.is_available():
        pytest.skip("says what is missing where there is no GPU")
    with pytest.raises(ValueError, match=f'model.quantize = "{quantize}" needs a CUDA GPU'):
        backbones.load(str(tiny("sd")), quantize=quantize)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs bitsandbytes; pip install bitsandbytes"):
        backbones.load(str(tiny("sd")), quantize=quantize)


def test_quantisation_is_asked_of_diffusers_for_the_denoiser_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(__spec__=SimpleNamespace()))  # type: ignore
    asked = {}
    monkeypatch.setattr("diffusers.PipelineQuantizationConfig", lambda **settings: asked.update(settings))
    sources.quantization("transformer", torch.bfloat16, "nf4")
    assert asked == {
        "quant_backend": "bitsandbytes_4bit",
        "quant_kwargs": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        "components_to_quantize": ["transformer"],
    }


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_adapters_learn_over_quantised_weights(tiny, tmp_path: Path, quantize: Any, name: str, monkeypatch):
    """bitsandbytes also computes on a CPU; that diffusers asks for a GPU is left out here."""
    pytest.importorskip("bitsandbytes")
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *_, **__: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    monkeypatch.setattr("diffusers.models.modeling_utils._caching_allocator_warmup", lambda *_, **__: None)
    options: dict[str, Any] = {"resolution": 16, "max_sequence_length": 4} if name == "flux" else {}
    plain = backbones.load(str(tiny(name)), dtype="bfloat16", lora_rank=2, **options)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        # Out of training mode bitsandbytes takes another way on a CPU, which these widths are too small for.
        options |= {"gradient_checkpointing": True}
        model = backbones.load(str(tiny(name)), dtype="bfloat16", lora_rank=2, quantize=quantize, **options)
    kinds = {type(layer).__name__ for layer in model.denoiser.modules()}
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantize] in kinds
    model.to(torch.device("cpu"))
    output = model.predict(initial_latents(model, [1]), torch.tensor([400.0]), model.encode([CAPTION]))
    assert (output - _output(plain)).norm() < 0.5 * _output(plain).norm()
    output.sum().backward()
    assert {parameter.dtype for parameter in model.trainable_parameters()} == {torch.float32}
    assert any(p.grad is not None and p.grad.any() for p in model.trainable_parameters())
    model.save_adapter(tmp_path)
    plain.pipeline.load_lora_weights(tmp_path)
