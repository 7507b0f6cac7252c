"""Each family through the command line: two iterations, pictures, and a merged pipeline that plain diffusers loads."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from adascope_fast import cli
from adascope_fast.sampling import draw, initial_latents, load_run

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
CAPTION = "a red circle on a grey background"
FLOW = ["algorithm.name=grpo", "model.max_sequence_length=4"]
OVERRIDES = {"sd": [], "sdxl": [], "sd35": FLOW, "flux": [*FLOW, "model.resolution=16"]}
SMALLEST = [
    "reward.name=jpeg_compressibility",
    "sampler.num_steps=3",
    "selector.name=every_step",
    "train.prompts_per_iteration=1",
    "train.learning_rate=0.05",
    "evaluation.num_prompts=1",
    "evaluation.samples_per_prompt=1",
]


def _call(*arguments: str | Path) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["adascope-fast", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, out.getvalue(), err.getvalue()


def _train(tiny: Callable[[str], Path], family: str, folder: Path, *more: str) -> None:
    settings = [*SMALLEST, *OVERRIDES[family], f"model.name={tiny(family)}", f"run.folder={folder}", *more]
    code, _, err = _call("train", TINY, *settings)
    assert code == 0, err


def _plain_picture(pipeline: DiffusionPipeline, family: str, initial: torch.Tensor) -> torch.Tensor:
    options: dict = dict(num_inference_steps=3, guidance_scale=1.0, output_type="pt", latents=initial)
    if family in ("sd35", "flux"):
        options["max_sequence_length"] = 4
    if family == "flux":
        options |= dict(guidance_scale=3.5, height=16, width=16, latents=pipeline._pack_latents(initial, 1, 4, 8, 8))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline([CAPTION], **options).images  # type: ignore[operator]


@pytest.mark.parametrize("family", OVERRIDES)
def test_two_iterations_then_pictures_and_a_whole_pipeline(tiny, family: str, tmp_path: Path):
    run, merged = tmp_path / "run", tmp_path / "merged"
    _train(tiny, family, run)
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


def test_a_model_that_cannot_be_trained_is_one_line(tiny, tmp_path: Path):
    code, out, err = _call("train", TINY, f"model.name={tiny('schnell')}", f"run.folder={tmp_path / 'run'}")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert "schnell) is refused for RL: it is distilled to draw in 1 to 4 steps" in line
    assert not (tmp_path / "run").exists()


def test_a_plan_is_printed_without_weights_and_a_missing_model_is_one_line(tiny, tmp_path: Path):
    folder = tmp_path / "no_weights"
    shutil.copytree(tiny("sdxl"), folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    code, out, err = _call("plan", TINY, f"model.name={folder}", "train.microbatch=2", "--tflops", "1")
    assert code == 0, err
    assert out.startswith(f"{folder}: StableDiffusionXL, 16 pixels, 4 pictures x 6 steps, guidance 1\n")
    assert "GiB at microbatch 2  <- as configured" in out
    code, out, err = _call("plan", TINY, "model.name=someone/missing")
    assert (code, out) == (2, "")
    assert "hf download someone/missing" in err
    assert "plan needs a configuration file first" in _call("plan")[2]
