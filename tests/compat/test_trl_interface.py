"""The names, arguments, fields and defaults of TRL 0.23.1, recorded from it, and what becomes of each field."""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from adascope_fast.backbones import ASSETS
from adascope_fast.compat import trl
from adascope_fast.compat.trl.step import scheduler_step

ROOT = Path(__file__).parents[2]
RECORDED: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "trl_epochs.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")


def _arguments(called: Any) -> list[list[str]]:
    found = inspect.signature(called).parameters.values()
    return [[one.name, one.kind.name, "" if one.default is one.empty else repr(one.default)] for one in found]


def _called(name: str) -> Any:
    if name == "pipeline_step":
        return trl.DefaultDDPOStableDiffusionPipeline.__call__
    if name == "scheduler_step":
        return scheduler_step
    owner, _, method = name.partition(".")
    return getattr(getattr(trl, owner), method)


def test_the_configuration_has_the_fields_and_defaults_in_order():
    config = trl.DDPOConfig(exp_name="")
    assert [(one.name, getattr(config, one.name)) for one in fields(config)] == list(RECORDED["fields"].items())


@pytest.mark.parametrize("name", RECORDED["signatures"])
def test_arguments_are_those_of_trl_and_more_come_after_by_keyword(name: str):
    want, got = RECORDED["signatures"][name], _arguments(_called(name))
    if name == "scheduler_step":
        want, got = want[1:], got[1:]  # of the scheduler, which it has as `self`
    assert got[: len(want)] == want
    assert all(kind == "KEYWORD_ONLY" for _, kind, _ in got[len(want) :])


def test_the_page_says_of_every_field_that_it_is_honoured_or_refused():
    told = dict(re.findall(r"^\| `(\w+)` \| (honoured|refused)", PAGE, flags=re.MULTILINE))
    assert list(told) == list(RECORDED["fields"])


def test_the_script_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    found = re.search(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert found is not None
    small = 'mixed_precision="no", accelerator_kwargs={"cpu": True}, num_epochs=1, sample_num_steps=2'
    script = found[1].replace("save_freq=10", small)
    exec(script.replace("runwayml/stable-diffusion-v1-5", str(ASSETS / "scenes")), {})
    assert "update: up to 32 (image, step) pairs in a forward" in capsys.readouterr().out
    assert (tmp_path / "trained" / "pytorch_lora_weights.safetensors").is_file()


def test_the_command_line_is_that_of_the_fields():
    parser: Any = HfArgumentParser(trl.DDPOConfig)  # type: ignore[arg-type]
    given = ["--num_epochs", "3", "--per_prompt_stat_tracking", "True", "--log_with", "tensorboard", "--seed", "5"]
    (config,) = parser.parse_args_into_dataclasses(given)
    assert (config.num_epochs, config.per_prompt_stat_tracking, config.log_with, config.seed) == (
        3,
        True,
        "tensorboard",
        5,
    )
    assert config.mixed_precision == "fp16"


def test_to_dict_flattens_nested_fields():
    told = trl.DDPOConfig(project_kwargs={"project_dir": "save", "total_limit": 3}).to_dict()
    assert told["project_kwargs/project_dir"] == "save"
    assert told["project_kwargs/total_limit"] == 3
    assert told["seed"] == 0


def test_eight_bit_adam_is_refused_without_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("adascope_fast.compat.trl.config.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"bitsandbytes.*pip install"):
        trl.DDPOConfig(train_use_8bit_adam=True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sample_eta": 0.0}, "sample_eta must be above 0, got 0.*no log_prob"),
    ({"train_timestep_fraction": 0.1}, "train_timestep_fraction must leave at least one of 3 steps, got 0.1"),
    ({"train_timestep_fraction": 1.5}, "train_timestep_fraction must leave"),
    ({"negative_prompts": ["a", "b"]}, "negative_prompts is one text.*got list"),
    ({"log_with": "no such tracker"}, "log_with must be an installed tracker.*got 'no such tracker'"),
    ({"train_batch_size": 3}, "sample_batch_size must be a multiple of train_batch_size, got 2 and 3"),
    ({"train_gradient_accumulation_steps": 3}, "images of an epoch.*must be a multiple.*got 4 and 6"),
    ({"resume_from": "."}, "resume_from must be a checkpoint or a folder with some"),
    ({"rollout_batch": 0}, "rollout_batch must be at least 1, got 0"),
    ({"microbatch": -1}, "microbatch must be at least 1, got -1"),
    ({"selector": "adascop"}, 'selector must be "every_step", "adascope" or a selector'),
    ({"selector": "adascope", "train_timestep_fraction": 0.7}, "train_timestep_fraction draws them, got 0.7"),
]


@pytest.mark.parametrize(("choices", "told"), REFUSED, ids=[" ".join(choices) for choices, _ in REFUSED])
def test_what_cannot_be_is_refused_by_name(make_trainer: Callable[..., Any], choices: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        make_trainer(**choices)
