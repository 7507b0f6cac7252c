"""TRL 0.23.1's own example script and test file, run on ours with only the import changed.

Nothing of TRL is in this repository: ADASCOPE_TRL_SOURCE names its unpacked source distribution, or the archive
(`pip download trl==0.23.1 --no-deps --no-binary :all:`). They run on tiny local models, which lie where the names of
repositories lead when read as paths. Two things in the script's own reward are seen to from outside: its `.cuda()` does
nothing, and CLIP's features are the tensor that they were before transformers 5.
"""

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_pipelines import BUILDERS
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from adascope_fast.backbones import ASSETS

ROOT = Path(__file__).parents[2]
IMPORT = "from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline"
VERSION = "0.23.1"
CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
NOTHING = "def __getattr__(name):\n    raise AttributeError(name)\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("ADASCOPE_TRL_SOURCE")
    if not named:
        pytest.skip("ADASCOPE_TRL_SOURCE names no source distribution of trl 0.23.1")
    place = Path(named)
    if place.is_file():
        folder = tmp_path_factory.mktemp("trl")
        with tarfile.open(place) as archive:
            archive.extractall(folder, filter="data")
        place = folder / f"trl-{VERSION}"
    for name in ("examples/scripts/ddpo.py", "tests/test_ddpo_trainer.py"):
        if not (place / name).is_file():
            pytest.skip(f"ADASCOPE_TRL_SOURCE has no {name}")
    return place


def _changed(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    assert text.count(IMPORT) == 1
    return text.replace(IMPORT, IMPORT.replace("from trl import", "from adascope_fast.compat.trl import"))


def _tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(ASSETS / "scenes" / "tokenizer", model_max_length=77)


def _stable_diffusion(folder: Path) -> None:
    """Latents of 4 x 64 x 64 and embeddings of 77 x 32, which TRL's test asks for."""
    torch.manual_seed(0)
    pipeline, tokenizer = BUILDERS["sd"](), _tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64, layers_per_block=1, block_out_channels=(4, 8), down_block_types=("DownBlock2D", CROSS[0]),
        up_block_types=(CROSS[1], "UpBlock2D"), norm_num_groups=2, attention_head_dim=2, cross_attention_dim=32,
    )  # fmt: skip
    pipeline.register_modules(text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet)
    pipeline.save_pretrained(folder, safe_serialization=True)


def _environment(folder: Path) -> dict[str, str]:
    places = os.pathsep.join([str(folder), str(ROOT)])
    return os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}


def _run(folder: Path, *command: str) -> str:
    finished = subprocess.run(
        [sys.executable, *command], cwd=folder, env=_environment(folder), capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished.stdout + finished.stderr


def test_trls_own_tests_pass(source: Path, tmp_path: Path):
    _stable_diffusion(tmp_path / "hf-internal-testing" / "tiny-stable-diffusion-torch")
    for name in ("trl", "trls"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(NOTHING, encoding="utf-8")
    (tmp_path / "trl" / "import_utils.py").write_text("def is_diffusers_available():\n    return True\n")
    helpers = "import unittest\nTrlTestCase = unittest.TestCase\n\n\ndef require_diffusers(test):\n    return test\n"
    (tmp_path / "trls" / "testing_utils.py").write_text(helpers, encoding="utf-8")
    text = _changed(source / "tests" / "test_ddpo_trainer.py")
    (tmp_path / "trls" / "test_ddpo_trainer.py").write_text(text, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    told = _run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "trls/test_ddpo_trainer.py")
    assert re.search(r"\b6 passed", told), told


RUNNER = """
import runpy, sys, torch
from transformers import CLIPModel
torch.nn.Module.cuda = lambda module: module
features = CLIPModel.get_image_features
CLIPModel.get_image_features = lambda *given, **named: features(*given, **named).pooler_output
sys.argv = ["ddpo.py", *sys.argv[1:]]
runpy.run_path("ddpo.py", run_name="__main__")
"""


def test_trls_own_example_runs(source: Path, tmp_path: Path, tiny_folder: Callable[[str], Path]):
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=dict(vocab_size=len(_tokenizer()), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, bos_token_id=0, eos_token_id=1),
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                           image_size=16, patch_size=8),
        projection_dim=768,
    )  # fmt: skip
    clip = tmp_path / "openai" / "clip-vit-large-patch14"
    CLIPModel(config).save_pretrained(clip)
    sides = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=sides).save_pretrained(clip)
    _tokenizer().save_pretrained(clip)
    widths = [768, 1024, 128, 64, 16, 1]
    layers = {f"layers.{number}": number for number in (0, 2, 4, 6, 7)}
    judge = {}
    for (name, _), wide, narrow in zip(layers.items(), widths[:-1], widths[1:], strict=True):
        judge |= {f"{name}.weight": torch.randn(narrow, wide) / wide**0.5, f"{name}.bias": torch.zeros(narrow)}
    (tmp_path / "trl-lib" / "ddpo-aesthetic-predictor").mkdir(parents=True)
    torch.save(judge, tmp_path / "trl-lib" / "ddpo-aesthetic-predictor" / "aesthetic-model.pth")
    (tmp_path / "ddpo.py").write_text(_changed(source / "examples" / "scripts" / "ddpo.py"), encoding="utf-8")
    command = re.findall(r"--(\w+) (\S+) ?\\?", (tmp_path / "ddpo.py").read_text().split('"""')[1])
    given = dict(command) | {"num_epochs": "3", "sample_num_steps": "3", "tracker_project_name": "example"}
    assert given["sample_batch_size"] == "6"
    given |= {"mixed_precision": "no", "log_with": "tensorboard", "pretrained_model": str(tiny_folder("sd"))}
    _run(tmp_path, "-c", RUNNER, *(part for name, value in given.items() for part in (f"--{name}", value)))
    assert sorted(path.name for path in (tmp_path / "save" / "checkpoints").iterdir()) == [
        "checkpoint_0",
        "checkpoint_1",
    ]
    assert (tmp_path / "save" / "pytorch_lora_weights.safetensors").is_file()
    assert list((tmp_path / "logs" / "example").glob("events*"))
