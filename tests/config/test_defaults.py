"""The settings of a configuration that are its own."""

import tomllib

import pytest

from adascope_fast.config import Config
from adascope_fast.config.defaults import Change, changes


def changed(*overrides: str) -> dict[str, tuple[str, str]]:
    """What `changes` finds in the resolved TOML of a configuration."""
    found = changes(tomllib.loads(Config.load(None, overrides).to_toml()))
    return {change.key: (change.value, change.default) for change in found}


def test_the_defaults_are_no_changes():
    assert changed() == {}


def test_keys_are_compared_with_those_of_the_choice():
    assert changed("algorithm.name=grpo", "train.iterations=5", "model.lora_targets=['to_q']") == {
        "algorithm.name": ('"grpo"', '"ddpo"'),
        "train.iterations": ("5", "20"),
        "model.lora_targets": ('["to_q"]', "absent"),
    }
    assert changed("sensing.kind=reward_only") == {"sensing.kind": ('"reward_only"', '"latent"')}, "every is 2 there"
    assert changed("selector.name=static_range", "selector.start=2", "selector.end=5") == {
        "selector.name": ('"static_range"', '"adascope"'),
        "selector.start": ("2", ""),
        "selector.end": ("5", ""),
    }


def test_a_choice_of_ones_own_has_no_defaults():
    assert changed("selector.name=mine:Mine", "selector.size=3") == {
        "selector.name": ('"mine:Mine"', '"adascope"'),
        "selector.size": ("3", ""),
    }


def test_a_list_is_its_tuple():
    assert changed("selector.fallback=[0.1, 0.5]") == {"selector.fallback": ("[0.1, 0.5]", "absent")}


@pytest.mark.parametrize(
    "values",
    [{"algorithm": {"per_prompt_buffer": 32}}, {"unknown": {"key": 32}}, {"selector": {"name": "gone", "key": 32}}],
)
def test_what_this_version_does_not_know_is_the_configurations_own(values: dict[str, dict[str, object]]):
    assert changes(values)[-1][1:] == Change("", "32", "")[1:]


def test_what_is_no_section_is_left_out():
    assert changes({"run": 3, "train": {"iterations": 20}}) == []
