"""Runs under float16 autocast, on a CPU: as in float32 but for rounding, with gradients that do not underflow."""

import math
from pathlib import Path

import pytest
import torch
from small_runs import CAPTIONS, SMALLEST, TINY, lines_of, redness
from torch import Tensor

from adascope_fast.config import Config, ConfigError
from adascope_fast.training.building import suited
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
