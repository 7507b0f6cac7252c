"""Presets: each is a valid configuration, its text is its values, and what is no preset is told."""

import tomllib
from pathlib import Path

import pytest

from adascope_fast.backbones import PUBLISHED
from adascope_fast.config import Config, ConfigError, presets

MODELS = ["flux_dev", "sd15", "sd21", "sd35_large", "sd35_medium", "sdxl"]
MEMORY = tomllib.loads((presets.FOLDER / "memory.toml").read_text())


def test_there_is_one_for_each_described_model_and_the_embedded_ones():
    assert presets.bases() == sorted([*MODELS, "quickstart", "quickstart_flow"])
    described = [PUBLISHED[Config.load(name).model.name] for name in MODELS]
    assert sorted(described) == sorted(set(PUBLISHED.values()))
    for name in MODELS:
        assert [f"{name}-{size}gb" in presets.names() for size in (24, 40, 80, 81)] == [True, True, True, False]


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_valid_says_what_it_is_and_writes_to_a_folder_of_its_own(name: str):
    config, base = Config.load(name), name.partition("-")[0]
    assert config.run.folder == f"runs/{base}"
    assert presets.title(base)
    head = presets.text(name).split("[run]")[0].splitlines()
    assert all(line.startswith("# ") for line in head)
    if base in MODELS:
        assert "Not run: no such weights were at hand." in "\n".join(head)
        assert f"`adascope-fast plan {name}`" in "\n".join(head)
        assert f"Planned for {(name.partition('-')[2] or '24gb')[:-2]} GB" in "\n".join(head)


@pytest.mark.parametrize(("base", "size"), [(base, size) for base in MEMORY for size in MEMORY[base]])
def test_a_variant_differs_in_the_keys_of_its_memory_alone(base: str, size: str):
    want = Config.load(base).model_dump()
    for section, fields in MEMORY[base][size].items():
        want[section] |= fields
    assert Config.load(f"{base}-{size}").model_dump() == want
    lines = zip(presets.text(base).splitlines(), presets.text(f"{base}-{size}").splitlines(), strict=True)
    changed = [after for before, after in lines if before != after and not before.startswith("#")]
    assert all("#" not in line for line in changed), "the comment was on the other value"
    assert len(changed) == sum(
        Config.load(base).model_dump()[section][key] != value
        for section, fields in MEMORY[base][size].items()
        for key, value in fields.items()
    )


def test_overrides_go_on_top_of_a_preset():
    config = Config.load("sd15-80gb", ["reward.name=jpeg_incompressibility", "train.microbatch=3"])
    assert (config.reward.name, config.train.microbatch) == ("jpeg_incompressibility", 3)
    assert config.train.rollout_batch == Config.load("sd15-80gb").train.rollout_batch


def test_a_file_of_the_same_name_is_told_and_a_folder_is_not_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd15").write_text("[run]\nseed = 7\n")
    with pytest.raises(ConfigError, match=r"sd15 is a preset and a file here; write \./sd15 for the file, or rename"):
        Config.load("sd15")
    assert Config.load("./sd15").run.seed == 7
    (tmp_path / "sdxl").mkdir()
    assert Config.load("sdxl").model.name.startswith("stabilityai/")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("sd_15", "a configuration is a .toml file, or a preset: flux_dev, .*, sdxl; got 'sd_15', did you mean sd15?"),
        ("mine", "a configuration is a .toml file, or a preset: .* got 'mine', `adascope-fast init` says what each is"),
        ("sd15-48gb", "got 'sd15-48gb', did you mean sd15-80gb?|did you mean sd15-40gb?"),
        ("configs/sd15.toml", "a configuration file must exist, got configs/sd15.toml; did you mean the preset sd15?"),
        ("configs/mine.toml", "a configuration file must exist, got configs/mine.toml; "),
    ],
)
def test_what_is_neither_file_nor_preset_is_one_line(name: str, line: str):
    with pytest.raises(ConfigError, match=line):
        Config.load(name)
