"""Each family through the command line: two iterations, pictures, and a merged pipeline that plain diffusers loads."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import beside_progress, call
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from adascope_fast.training.draw import draw, initial_latents, load_run

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
CAPTION = "a red circle on a grey background"
FLOW = ["algorithm.name=grpo", "model.max_sequence_length=4"]
OVERRIDES = {
    "sd": [],
    "sd-v": ["selector.name=adascope"],
    "sdxl": ["sampler.guidance_scale=3.0"],
    "sd3": [*FLOW, "selector.name=adascope"],
    "sd35": [*FLOW, "sampler.guidance_scale=2.0"],
    "flux": [*FLOW, "model.resolution=16"],
}
SMALLEST = [
    "reward.name=jpeg_compressibility",
    "prompts.train=scenes:train",
    "sampler.num_steps=3",
    "selector.name=every_step",
    "train.prompts_per_iteration=1",
    "train.learning_rate=0.05",
    "evaluation.num_prompts=1",
    "evaluation.samples_per_prompt=1",
]


def _call(*arguments: str | Path) -> tuple[int, str, str]:
    outcome = call(*arguments)
    return outcome.code, outcome.out, outcome.err


def _train(tiny: Callable[[str], Path], family: str, folder: Path, *more: str) -> None:
    settings = [*SMALLEST, *OVERRIDES[family], f"model.name={tiny(family)}", f"run.folder={folder}", *more]
    code, _, err = _call("train", TINY, *settings)
    assert code == 0, err


def _plain_picture(pipeline: DiffusionPipeline, family: str, initial: torch.Tensor) -> torch.Tensor:
    options: dict = dict(num_inference_steps=3, guidance_scale=1.0, output_type="pt", latents=initial)
    if family in ("sd3", "sd35", "flux"):
        options["max_sequence_length"] = 4
    if family == "flux":
        options |= dict(guidance_scale=3.5, height=16, width=16, latents=pipeline._pack_latents(initial, 1, 4, 8, 8))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline([CAPTION], **options).images  # type: ignore[operator]


@pytest.mark.parametrize("family", OVERRIDES)
def test_two_iterations_then_pictures_and_a_whole_pipeline(tiny, family: str, tmp_path: Path):
    run, merged = tmp_path / "run", tmp_path / "merged"
    _train(tiny, family, run)
    assert json.loads((run / "run.json").read_text())["acceleration"]["attention"].startswith("sdpa: ")
    records = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert all(record["ratio_max_deviation"] == 0 and record["grad_norm"] > 0 for record in records)
    code, _, err = _call("sample", run, "--prompt", CAPTION, "--num", "2")
    assert code == 0, err
    assert (run / "samples" / "sample.png").stat().st_size > 500
    assert _call("merge", run, merged)[:2] == (0, f"{merged}\n")
    _, backbone = load_run(run)
    ours = draw(backbone, [CAPTION], [3], num_steps=3, guidance_scale=1.0)
    initial = initial_latents(backbone, [3])
    theirs = _plain_picture(DiffusionPipeline.from_pretrained(merged), family, initial)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    base = _plain_picture(DiffusionPipeline.from_pretrained(tiny(family)), family, initial)
    assert (theirs - base).abs().max() > 1e-3
    code, out, err = _call("merge", run, merged)
    assert (code, out) == (2, "")
    assert "merge never replaces what is there" in err


def _without(tiny: Callable[[str], Path], family: str, target: Path, **entries: list) -> Path:
    """The pipeline with other entries in its model_index.json, and without the folders of those that are null."""
    shutil.copytree(tiny(family), target)
    path = target / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    for name, entry in entries.items():
        if entry == [None, None]:
            shutil.rmtree(target / name, ignore_errors=True)
    return target


@pytest.mark.parametrize(
    ("family", "entries"),
    [
        ("sd", {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
                "feature_extractor": ["transformers", "CLIPImageProcessor"]}),
        ("sd3", {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}),
    ],
)  # fmt: skip
def test_a_run_without_optional_parts_becomes_a_plain_pipeline(tiny, tmp_path: Path, family: str, entries: dict):
    folder = _without(tiny, family, tmp_path / "model", **entries)
    run, merged = tmp_path / "run", tmp_path / "merged"
    mask = os.umask(0o027)
    try:
        assert _call("plan", TINY, f"model.name={folder}", *OVERRIDES[family])[0] == 0
        _train(lambda _: folder, family, run)
        code, out, err = _call("merge", run, merged, "--dtype", "bfloat16")
        assert (code, out, beside_progress(err)) == (0, f"{merged}\n", [])
        assert _call("merge", run, tmp_path / "float32")[0] == 0
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in merged.rglob("*") if path.is_file()} == {0o640}
    # Without its T5 diffusers reads no SD3 unless it is told so, the original folder as little as the merged one.
    absent: dict = {name: None for name in entries} if family == "sd3" else {}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "float32", **absent)
    assert all(pipeline.components[name] is None for name in entries)
    (ours,) = draw(load_run(run)[1], [CAPTION], [3], num_steps=3, guidance_scale=1.0)
    initial = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours, _plain_picture(pipeline, family, initial)[0], rtol=0, atol=1e-4)


def test_full_fine_tuning_with_an_average_resumes_samples_and_merges(tiny, tmp_path: Path):
    more = ["model.train=full", "model.ema_decay=0.9", "train.learning_rate=0.001"]
    _train(tiny, "sd", tmp_path / "once", *more)
    _train(tiny, "sd", tmp_path / "twice", *more, "train.iterations=1")
    code, _, err = _call("train", "--resume", tmp_path / "twice", "train.iterations=2")
    assert code == 0, err
    once, twice = (load_file(tmp_path / name / "checkpoints/000002/state.safetensors") for name in ("once", "twice"))
    assert any(name.startswith("ema.") for name in once)
    assert all(torch.equal(twice[name], value) for name, value in once.items())
    run, merged = tmp_path / "once", tmp_path / "merged"
    averaged = load_file(run / "adapter" / "unet" / "diffusion_pytorch_model.safetensors")
    assert any((averaged[name] - once[f"adapter.{name}"]).abs().max() > 0 for name in averaged)
    assert _call("sample", run, "--prompt", CAPTION, "--num", "1")[0] == 0
    assert _call("merge", run, merged, "--dtype", "float16")[0] == 0
    written = load_file(merged / "unet" / "diffusion_pytorch_model.safetensors")
    for name, value in averaged.items():
        assert torch.equal(written[name], value.half())
    assert _call("merge", run, tmp_path / "float32")[0] == 0
    unet = DiffusionPipeline.from_pretrained(tmp_path / "float32").components["unet"]
    assert all(torch.equal(value, averaged[name]) for name, value in unet.state_dict().items())


@pytest.mark.parametrize("family", ["sd-v", "sdxl", "sd35", "flux"])
def test_full_fine_tuning_of_each_family_becomes_a_whole_pipeline(tiny, family: str, tmp_path: Path):
    run, merged = tmp_path / "run", tmp_path / "merged"
    _train(tiny, family, run, "model.train=full", "train.learning_rate=0.001", "train.iterations=1")
    code, out, err = _call("merge", run, merged)
    assert (code, out, beside_progress(err)) == (0, f"{merged}\n", [])
    trained = load_file(run / "checkpoints/000001/state.safetensors")
    pipeline, base = (DiffusionPipeline.from_pretrained(folder) for folder in (merged, tiny(family)))
    name = "unet" if "unet" in pipeline.components else "transformer"
    before = base.components[name].state_dict()
    for key, value in pipeline.components[name].state_dict().items():
        assert torch.equal(value, trained[f"adapter.{key}"])
    assert any(not torch.equal(trained[f"adapter.{key}"], value) for key, value in before.items())
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    (ours,) = draw(load_run(run)[1], [CAPTION], [3], num_steps=3, guidance_scale=1.0)
    torch.testing.assert_close(ours, _plain_picture(pipeline, family, latents)[0], rtol=0, atol=1e-4)


def test_kl_draws_a_fully_trained_model_back_to_what_it_was(tiny, tmp_path: Path):
    more = ["model.train=full", "train.learning_rate=0.001", "train.updates_per_iteration=4"]
    _train(tiny, "sd", tmp_path / "free", *more)
    _train(tiny, "sd", tmp_path / "held", *more, "algorithm.kl_weight=1e4")
    base = load_file(tiny("sd") / "unet" / "diffusion_pytorch_model.safetensors")
    free, held = (load_file(tmp_path / name / "checkpoints/000002/state.safetensors") for name in ("free", "held"))
    far, near = (
        sum((run[f"adapter.{key}"] - value).abs().sum() for key, value in base.items()) for run in (free, held)
    )
    assert 0 < near < 0.9 * far


def test_a_model_that_cannot_be_trained_is_one_line(tiny, tmp_path: Path):
    code, out, err = _call("train", TINY, *SMALLEST, f"model.name={tiny('schnell')}", f"run.folder={tmp_path / 'run'}")
    assert (code, out) == (2, "")
    (line,) = beside_progress(err)
    assert "schnell) is refused for RL: it is distilled to draw in 1 to 4 steps" in line
    assert not (tmp_path / "run").exists()


def test_a_plan_is_printed_without_weights_and_a_missing_model_is_one_line(tiny, tmp_path: Path):
    folder = tmp_path / "no_weights"
    shutil.copytree(tiny("sdxl"), folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    code, out, err = _call("plan", TINY, f"model.name={folder}", "train.microbatch=2", "--tflops", "1")
    assert code == 0, err
    assert out.startswith(f"{folder}: StableDiffusionXL, 16 pixels, 4 pictures x 6 steps, guidance 1\n")
    assert "MiB at microbatch 2  <- as configured" in out
    assert "not measured        torch sees no GPU\n" in out
    code, out, err = _call("plan", TINY, "model.name=someone/missing")
    assert (code, out) == (2, "")
    assert "hf download someone/missing" in err
    assert "plan needs a configuration file first" in _call("plan")[2]


def _mistake(tiny: Callable[[str], Path], family: str, tmp_path: Path, *overrides: str, command: str = "train") -> str:
    """The one line that a user's mistake gets; nothing is left behind."""
    run = tmp_path / "run"
    settings = [*SMALLEST, *OVERRIDES.get(family, []), f"model.name={tiny(family)}", f"run.folder={run}", *overrides]
    code, out, err = _call(command, TINY, *settings)
    assert (code, out) == (2, ""), err
    (line,) = beside_progress(err)
    assert line.startswith("error: ")
    assert not run.exists()
    return line


@pytest.mark.parametrize(
    ("family", "override", "message"),
    [
        ("sd", 'model.lora_targets=["to_qq"]', "got 'to_qq', which names none; did you mean 'to_q'?"),
        (
            "sd",
            'model.lora_targets=["to_q", "to_outt.0"]',
            "got 'to_outt.0', which names none; did you mean 'to_out.0'?",
        ),
        ("sd", 'model.lora_targets=["norm1"]', "must name linear or convolution layers of the unet, got norm1"),
        ("sd", "model.resolution=15", "a multiple of 2 pixels for this model, got 15; set it to 14"),
        ("sd", "model.embedded_guidance=3.5", "model.embedded_guidance has no use for a StableDiffusion, got 3.5"),
        ("sdxl", "model.max_sequence_length=9", "model.max_sequence_length has no use for a StableDiffusionXL, got 9"),
        ("sd3", "model.embedded_guidance=2.0", "no use for a StableDiffusion3, got 2; remove it"),
        ("sd", "model.quantize=int8", 'model.quantize = "int8" needs'),
        ("sd", "model.revision=main", "model.revision is for a repository, got 'main' with the folder"),
        ("sd", "model.base=sdxl", "model.base is for a single .safetensors file, got 'sdxl'"),
        ("sd", "model.variant=fp16", "fp16"),
        ("schnell", "sampler.guidance_scale=3.0", "schnell) is refused for RL"),
    ],
)
def test_a_mistake_is_one_line(tiny, tmp_path: Path, family: str, override: str, message: str):
    assert message in _mistake(tiny, family, tmp_path, override)


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_a_scheduler_whose_steps_are_not_affine_is_refused_by_name(tiny, tmp_path: Path, option: str):
    folder = tmp_path / "model"
    shutil.copytree(tiny("sdxl"), folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"_class_name": "DDIMScheduler", option: True}
    path.write_text(json.dumps(config))
    line = _mistake(lambda _: folder, "sdxl", tmp_path)
    assert f"{option} of the scheduler must be False, got True: steps must be affine in the output; " in line


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_weight_that_is_not_in_its_file_is_refused_by_name(tiny, tmp_path: Path, part: str):
    folder = tmp_path / "model"
    shutil.copytree(tiny("sd"), folder)
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[len(tensors) // 2]
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    line = _mistake(lambda _: folder, "sd", tmp_path)
    assert f"the {part} of '{folder}' must have all its weights, and {name} is missing or of another shape; " in line
    assert line.endswith("save or download it again")


@pytest.mark.parametrize("train", ["lora", "full"])
def test_weights_of_another_model_are_refused_in_one_line(tiny, tmp_path: Path, train: str):
    run = tmp_path / "run"
    _train(tiny, "sd", run, f"model.train={train}", "train.iterations=1")
    text = (run / "config.toml").read_text()
    for old, new in [(str(tiny("sd")), str(tiny("sdxl"))), ("lora_rank = 4", "lora_rank = 8")][: 2 - (train == "full")]:
        assert old in text
        (run / "config.toml").write_text(text.replace(old, new))
        for command in (["sample", run, "--prompt", CAPTION], ["merge", run, tmp_path / "merged"]):
            code, out, err = _call(*command)
            assert (code, out, len(beside_progress(err))) == (2, "", 1)
            is_model = old == str(tiny("sd"))
            assert ("belong to the model that they were trained on" in err) == is_model
            assert ("must say what the run was made with, and model.lora_rank is another" in err) != is_model
