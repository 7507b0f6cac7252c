"""Every setting of a pipeline's components: drawn as plain diffusers draws it, or refused by name."""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from adascope_fast import backbones
from adascope_fast.backbones import flux
from adascope_fast.backbones.loading import FAMILIES
from adascope_fast.backbones.pipeline import keys
from adascope_fast.training.draw import draw, initial_latents

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CAPTION, DOCS = "a red circle on a grey background", Path(__file__).parents[3] / "docs"
NAMES = {"sd": "StableDiffusion", "sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux"}


@pytest.fixture
def pipeline_of(tiny: Callable[[str], Path]) -> Callable[[str], Any]:
    def load(family: str) -> Any:
        pipeline: Any = DiffusionPipeline.from_pretrained(tiny(family))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


def _options(family: str) -> dict[str, Any]:
    options: dict[str, Any] = {"max_sequence_length": 4} if family in ("sd3", "flux") else {}
    return options | ({"resolution": 16, "embedded_guidance": 2.5} if family == "flux" else {})


def _agrees(pipeline: Any, family: str) -> None:
    """One image of `pipe(prompt)` and of the backbone."""
    model = backbones.load(pipeline, lora_rank=2, **_options(family))
    latents = initial_latents(model, [5])
    options: dict[str, Any] = dict(num_inference_steps=3, guidance_scale=1.0, output_type="pt")
    if family in ("sd3", "flux"):
        options["max_sequence_length"] = 4
    if family == "flux":
        options |= dict(guidance_scale=2.5, height=16, width=16)
    given = flux.pack(latents) if family == "flux" else latents
    theirs = pipeline(CAPTION, latents=given.clone(), **options).images
    (ours,) = draw(model, [CAPTION], [5], num_steps=3, guidance_scale=1.0)
    torch.testing.assert_close(ours, theirs[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("class_name", FAMILIES)
def test_every_setting_of_the_installed_classes_has_a_verdict(class_name: str):
    family = backbones.family_of(class_name)
    for part, classes in family.parts.items():
        for name in classes:
            found = getattr(diffusers, name, None)
            if found is not None and not part.startswith("tokenizer"):
                for key in keys.defaults_of(found):
                    told = keys.find(family.__name__, part, [name], key)
                    assert told is not None, (name, key)
    for key in inspect.signature(getattr(diffusers, class_name)).parameters.keys() - family.parts.keys():
        if key not in ("safety_checker", "feature_extractor", "image_encoder"):
            assert keys.find(family.__name__, keys.PIPELINE, [keys.PIPELINE], key) is not None, key


def test_the_page_is_written_from_the_table():
    assert (DOCS / "pipeline_settings.md").read_text(encoding="utf-8") == keys.markdown()


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize(
    "settings",
    [
        {"latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [1.5, 0.7, 1.1, 2.0]},
        {"latents_mean": [0.3, -0.2, 0.1, 0.5]},
        {"scaling_factor": 0.31},
        {"shift_factor": 0.4},
        {"force_upcast": False},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_images_are_diffusers_own_whatever_the_vae_says(pipeline_of, family: str, settings: dict[str, Any]):
    pipeline = pipeline_of(family)
    pipeline.vae.register_to_config(**settings)
    _agrees(pipeline, family)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sd3", {"shift": 5.0}),
        ("sd3", {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 2.0, "time_shift_type": "linear"}),
        ("sd3", {"shift_terminal": 0.1}),
        ("sd3", {"use_karras_sigmas": True}),
        ("flux", {"base_shift": 0.2, "max_image_seq_len": 1000}),
        ("sd", {"timestep_spacing": "trailing"}),
        ("sd", {"timestep_spacing": "linspace"}),
        ("sd", {"set_alpha_to_one": True}),
        ("sd", {"beta_schedule": "linear", "beta_end": 0.02}),
        ("sd", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        ("sdxl", {"use_karras_sigmas": True, "timestep_spacing": "leading"}),
        ("sdxl", {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading"}),
    ],
    ids=str,
)
def test_images_are_diffusers_own_whatever_the_scheduler_says(pipeline_of, family: str, settings: dict[str, Any]):
    pipeline = pipeline_of(family)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **settings)
    _agrees(pipeline, family)


def _freeu(pipeline: Any) -> None:
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def _textual_inversion(pipeline: Any) -> None:
    pipeline.tokenizer.add_tokens(["<new>"])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("sd", _freeu),
        ("sdxl", _freeu),
        ("sd", lambda pipeline: pipeline.vae.enable_tiling()),
        ("sd", lambda pipeline: pipeline.vae.enable_slicing()),
        ("sd", _textual_inversion),
        ("sd", lambda pipeline: pipeline.unet.train()),
        ("sd3", lambda pipeline: pipeline.scheduler.set_shift(7.0)),
        ("sd3", lambda pipeline: pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)),
    ],
)
def test_what_was_done_to_a_pipeline_and_can_be_kept_is_kept(pipeline_of, family: str, change: Callable[[Any], None]):
    pipeline = pipeline_of(family)
    change(pipeline)
    if pipeline.components.get("unet") is not None:
        pipeline.unet.eval()
    _agrees(pipeline, family)


def _lora(part: str, name: str = "style") -> Callable[[Any], None]:
    def add(pipeline: Any) -> None:
        targets = ["q_proj"] if part.startswith("text") else ["to_q"]
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), pipeline.components[part], name)

    return add


def _offload(pipeline: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(pipeline.unet, torch.device("cpu"))


def _sliced(pipeline: Any) -> None:
    pipeline.enable_attention_slicing(1)


def _own_processor(pipeline: Any) -> None:
    class Mine(AttnProcessor2_0):
        pass

    pipeline.unet.set_attn_processor(Mine())


@pytest.mark.parametrize(
    ("family", "change", "told"),
    [
        ("sd", _lora("unet"), r"the unet .* got the adapter style; call pipe.fuse_lora\(\); pipe.unload_lora_weights"),
        ("sd", _lora("unet", "adascope"), "got the adapter adascope; load the pipeline anew"),
        ("sd", _lora("text_encoder"), "the text_encoder of the pipeline must be plain, got the adapter style"),
        ("sd3", _lora("text_encoder_2"), "the text_encoder_2 of the pipeline must be plain, got the adapter style"),
        ("flux", _lora("transformer"), "the transformer of the pipeline must be plain, got the adapter style"),
        ("sd", _offload, "accelerate's .*Hook"),
        ("sd", _sliced, "attention by SlicedAttnProcessor; call pipe.disable_attention_slicing"),
        ("sd", _own_processor, "attention by Mine; load the pipeline anew"),
        ("sdxl", lambda pipe: pipe.fuse_qkv_projections(vae=False), r"attention by Fused.*unfuse_qkv_projections"),
        ("sd", lambda pipe: pipe.unet.enable_layerwise_casting(torch.float16), "diffusers' hook layerwise_casting"),
        ("sd", lambda pipe: setattr(pipe.unet, "encoder_hid_proj", nn.Linear(2, 2)), "an IP-Adapter; call pipe.unload"),
        ("sd", lambda pipe: setattr(pipe, "unet", torch.compile(pipe.unet)), "got OptimizedModule"),
        ("sd", lambda pipe: pipe.vae.register_to_config(scaling_factor=0.0), "scaling_factor of the vae must be"),
        ("sd3", lambda pipe: pipe.vae.register_to_config(shift_factor=None), "shift_factor of the vae must be"),
        ("sd", lambda pipe: pipe.unet.register_to_config(class_embed_type="timestep"), "class_embed_type of the unet"),
        ("sd3", lambda pipe: pipe.scheduler.register_to_config(stochastic_sampling=True), "stochastic_sampling of the"),
        ("sd3", lambda pipe: pipe.scheduler.register_to_config(invert_sigmas=True), "invert_sigmas of the scheduler"),
        ("sd3", lambda pipe: pipe.register_modules(text_encoder_3=None), "together or not at all"),
        ("sd", lambda pipe: pipe.register_modules(text_encoder=None), "must have a text_encoder, got none"),
        (
            "sd3",
            lambda pipe: pipe.register_modules(scheduler=diffusers.UniPCMultistepScheduler(use_flow_sigmas=True)),
            "the scheduler of a StableDiffusion3 must be a FlowMatchEulerDiscreteScheduler, got UniPC",
        ),
        ("sdxl", lambda pipe: pipe.unet.register_to_config(sample_size=[8, 4]), "model.resolution must be set"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(pipeline_of, family: str, change: Callable[[Any], None], told: str):
    pipeline = pipeline_of(family)
    change(pipeline)
    with pytest.raises(ValueError, match=told) as raised:
        backbones.load(pipeline, **(_options(family)))
    assert "\n" not in str(raised.value)


def test_after_the_remedy_a_lora_is_part_of_the_model(pipeline_of):
    pipeline = pipeline_of("sd")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    with torch.no_grad():
        for name, value in pipeline.unet.named_parameters():
            if "lora_B" in name:
                value.add_(0.5)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    _agrees(pipeline, "sd")


def test_a_setting_that_nobody_knows_is_refused_or_told(pipeline_of, monkeypatch: pytest.MonkeyPatch):
    pipeline = pipeline_of("sd")
    pipeline.vae.register_to_config(new_trick=3)
    other = pipeline_of("sd")
    other.vae.register_to_config(new_trick=3)
    with pytest.warns(RuntimeWarning, match="new_trick = 3 of the vae is no setting that diffusers' AutoencoderKL"):
        backbones.load(other)
    monkeypatch.setattr(keys, "defaults_of", lambda component_class: {"new_trick": 2})
    keys.refuse_settings("StableDiffusion", "unet", pipeline.unet)
    with pytest.raises(ValueError, match="new_trick of the vae must be 2, its default, got 3: this version"):
        backbones.load(pipeline)
    pipeline.vae.register_to_config(new_trick=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbones.load(pipeline)


def test_dropout_stays_off_where_activations_are_recomputed(pipeline_of):
    pipeline = pipeline_of("sd")
    for layer in pipeline.unet.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.5
    model = backbones.load(pipeline, gradient_checkpointing=True)
    inputs = initial_latents(model, [1]), torch.tensor([400.0]), model.encode([CAPTION])
    assert torch.equal(model.predict(*inputs), model.predict(*inputs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("family", NAMES)
def test_an_image_that_is_not_finite_is_all_nan_and_its_neighbours_are_as_before(tiny, family: str, bad: float):
    model = backbones.load(str(tiny(family)), **_options(family))
    latents = initial_latents(model, [1, 2, 3])
    want = model.decode(latents)
    broken = latents.clone()
    broken[1, 2, 3, 1] = bad
    got = model.decode(broken)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    decode = model.vae.decode
    model.vae.decode = lambda *arguments, **options: (_with(decode(*arguments, **options)[0], bad),)
    got = model.decode(latents)
    assert got[2].isnan().all()
    assert torch.equal(got[:2], want[:2])
    assert want.isfinite().all()


def _with(images: torch.Tensor, bad: float) -> torch.Tensor:
    images = images.clone()
    images[2, 1, 4, 4] = bad
    return images
