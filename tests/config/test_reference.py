"""The page of the configuration is made of the classes that declare it: nothing is left out, nothing is said twice."""

import tomllib

import pytest

from adascope_fast.config import Config, ConfigError, reference
from adascope_fast.settings import OWN, choices_of, key_of


def test_every_key_of_every_choice_is_listed_once_with_its_default():
    shown = {(entry.section, entry.choice): entry for entry in reference.entries()}
    assert len(shown) == len(reference.entries())
    for section, info in Config.model_fields.items():
        for choice, part in choices_of(info.annotation).items():
            entry = shown[section, choice]
            names = [key.name for key in entry.keys]
            hidden = set() if choice == OWN else {key_of(info.annotation)}
            assert sorted(names) == sorted(part.model_fields.keys() - hidden)
            for key in entry.keys:
                field = part.model_fields[key.name]
                if key.default in ("", reference.ABSENT):
                    assert field.is_required() or field.default is None
                else:
                    value = tomllib.loads(f"x = {key.default}")["x"]
                    assert value == field.default or tuple(value) == field.default
                assert key.meaning
                assert "\n" not in key.meaning


def test_a_section_or_a_choice_is_found_by_name():
    (window,) = reference.find("window")
    assert window.title == '[selector] name = "window"'
    said = reference.text([window])
    assert "  window_size = 2  (a whole number, at least 1, at most 10000)\n      Steps in the window.\n" in said
    assert 'Only with shift_decay = "linear".' in said
    names = [entry.choice for entry in reference.find("sensing")]
    assert names == ["latent", "semantic", "reward_only"]
    assert [entry.choice for entry in reference.entries() if entry.is_default] == [
        "scene_attributes",
        "local",
        "ddpo",
        "adascope",
        "latent",
    ]


def test_bounds_and_choices_are_told():
    (sampler,) = reference.find("sampler")
    told = {key.name: key.values for key in sampler.keys}
    assert told["eta"] == "a number, at least 0, at most 1"
    assert told["train_guidance"] == "both, conditional"
    (adascope,) = reference.find("adascope")
    assert {key.name: key.values for key in adascope.keys}["fallback"].startswith("2 numbers")


def test_the_page_has_a_table_of_each_entry_and_escapes_bars():
    page = reference.markdown(reference.entries())
    assert page.count("\n## [") + page.startswith("## [") == len(Config.model_fields)
    for line in page.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 5


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"^config shows a section .*, got 'windw'; did you mean window\?$"):
        reference.find("windw")
    with pytest.raises(ConfigError, match="the sections are run, model"):
        reference.find("xyzzy")
