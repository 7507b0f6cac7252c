"""What accelerate's configuration may say of the processes of a run, and what goes with a model in parts."""

from types import SimpleNamespace
from typing import Any

import pytest

from adascope_fast.config import Config, ConfigError
from adascope_fast.training.building import accelerator_of
from adascope_fast.training.sharing import settled

SEVERAL: Any = SimpleNamespace(is_alone=False)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One whose configuration says FSDP."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2)))


def test_a_model_in_parts_goes_without_what_needs_it_whole(accelerator: Any) -> None:
    config = Config.load(None, ["model.name=scenes"])
    found = settled(config, accelerator, SEVERAL).acceleration
    assert (found.cuda_graphs, found.channels_last, found.fold_adapter) == ("off", "off", "off")
    assert found.compile == config.acceleration.compile
    alone: Any = SimpleNamespace(is_alone=True)
    assert settled(config, accelerator, alone) is config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("acceleration.cuda_graphs=on", r'cuda_graphs needs the whole model .* got "on" with FSDP; set it to "auto"'),
        ("acceleration.channels_last=on", r"channels_last needs the whole model"),
        ("acceleration.fold_adapter=on", r"fold_adapter needs the whole model"),
        ("model.dtype=float16", r'model\.dtype = "float16"; set it to "bfloat16"'),
        ("train.mixed_precision=fp16", r'train\.mixed_precision = "fp16"; set it to "bf16"'),
        ("train.optimizer=adamw_8bit", r'train\.optimizer = "adamw_8bit" with FSDP; set it to "adamw"'),
    ],
)
def test_what_was_asked_for_by_name_is_refused(accelerator: Any, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settled(Config.load(None, ["model.name=scenes", override]), accelerator, SEVERAL)


def test_the_first_fsdp_is_refused(accelerator: Any) -> None:
    accelerator.state.fsdp_plugin.fsdp_version = 1
    with pytest.raises(ConfigError, match=r"by FSDP2, got fsdp_version = 1 .* launch fsdp2"):
        settled(Config.load(None, ["model.name=scenes"]), accelerator, SEVERAL)


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_other_engines_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ConfigError, match=r"a model is shared by FSDP2, got (DeepSpeed|Megatron)"):
        accelerator_of(Config.load(None, ["model.name=scenes"]))
