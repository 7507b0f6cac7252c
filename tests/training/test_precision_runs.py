"""Runs under float16 autocast, on a CPU: as in float32 but for rounding; what a device or an optimiser cannot have."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import CAPTIONS, SMALLEST, TINY, lines_of, redness
from torch import Tensor

from adascope_fast.backbone import in_double
from adascope_fast.config import Config, ConfigError
from adascope_fast.training.building import accelerator_of, suited
from adascope_fast.training.trainer import Trainer


def _trainer(folder: Path, *overrides: str) -> Trainer:
    config = Config.load(TINY, [*SMALLEST, f"run.folder={folder}", "train.iterations=1", *overrides])
    return Trainer(config, reward=redness, train_prompts=CAPTIONS[:1], held_out_prompts=CAPTIONS[1:], quiet=True)


@pytest.mark.parametrize(
    "more", [[], ["train.update=one_pass", "selector.name=every_step"]], ids=["replay", "one_pass"]
)
def test_float16_autocast_trains_as_float32_but_for_rounding(tmp_path: Path, more: list[str]):
    found, types = {}, {}
    for precision in ("no", "fp16"):
        trainer = _trainer(tmp_path / precision, f"train.mixed_precision={precision}", *more)
        trainer.train()
        (found[precision],) = lines_of(tmp_path / precision)
        types[precision] = trainer.backbone._gradient_scale
        assert {parameter.dtype for parameter in trainer.backbone.trainable_parameters()} == {torch.float32}
    assert types == {"no": 1.0, "fp16": float(math.prod(trainer.backbone.latent_shape))}
    assert found["fp16"]["ratio_max_deviation"] == 0, "the first update compares with itself"
    assert found["fp16"]["updates_skipped"] == 0
    assert found["fp16"]["grad_norm"] == pytest.approx(found["no"]["grad_norm"], rel=0.05)
    assert found["fp16"]["reward_mean"] == pytest.approx(found["no"]["reward_mean"], abs=5e-3)
    assert found["fp16"]["reward_mean"] != found["no"]["reward_mean"], "it rounds otherwise"


def test_images_are_decoded_without_autocast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = _trainer(tmp_path / "run", "train.mixed_precision=fp16")
    trainer.prepare()
    seen, decode = [], trainer.backbone.decode

    def watched(latents: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return decode(latents)

    monkeypatch.setattr(trainer.backbone, "decode", watched)
    monkeypatch.setattr(trainer, "prepare", lambda: None)
    trainer.train()
    assert seen
    assert not any(seen)


@pytest.mark.parametrize(
    ("override", "device"), [("train.optimizer=adamw_8bit", "cpu"), ("train.optimizer=adamw", "mps")]
)
def test_an_optimiser_that_cannot_be_fused_is_not(override: str, device: str):
    config = Config.load(None, [override])
    assert not suited(config, torch.device(device)).acceleration.is_fused
    asked = Config.load(None, [override, "acceleration.fused_optimizer=on"])
    with pytest.raises(ConfigError, match=r'fused_optimizer is for AdamW of torch .* got "on", .*; set it to "auto"'):
        suited(asked, torch.device(device))
    assert suited(Config.load(None, []), torch.device("cuda")).acceleration.is_fused


def test_what_apples_gpus_have_not_is_computed_on_the_cpu():
    """By a stand-in: none of this project's machines has one."""
    stands_in: Any = SimpleNamespace(device=SimpleNamespace(type="mps"), cpu=lambda: torch.ones(2))
    assert in_double(stands_in).dtype == torch.float64
    here: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), double=lambda: "not moved")
    assert in_double(here) == "not moved"


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has an Apple GPU")
def test_an_apple_gpu_that_is_not_there_is_told():
    with pytest.raises(ConfigError, match=r'train\.device = "mps" needs an Apple GPU, .*; use "auto" or "cpu"'):
        accelerator_of(Config.load(None, ["train.device=mps"]))


def test_bitsandbytes_that_is_not_there_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch):
    config = Config.load(None, ["train.optimizer=adamw_8bit"])
    monkeypatch.setattr("adascope_fast.config.sections.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs bitsandbytes, which is not installed; pip install 'adascope-fast\[bnb\]'"
    ):
        config.train.examine()
    Config.load(None, []).train.examine()
