"""`adascope-fast init`: the presets in a list, and one as a file that trains."""

from pathlib import Path

from command_line import call, refused

from adascope_fast.config import Config, presets


def test_it_lists_the_presets_with_what_they_are():
    outcome = call("init")
    assert outcome.code == 0
    assert "sd15             DDPO with AdaScope on Stable Diffusion 1.5 at 512 pixels\n" in outcome.out
    assert set(presets.names()) <= set(outcome.out.replace(",", " ").split())


def test_what_it_prints_is_the_preset(tmp_path: Path):
    for name in ("quickstart", "sdxl-80gb"):
        outcome = call("init", name)
        assert outcome.code == 0
        (tmp_path / "mine.toml").write_text(outcome.out)
        assert Config.load(tmp_path / "mine.toml") == Config.load(name)


def test_a_mistyped_name_is_told_what_was_meant():
    assert refused("init", "sdlx").endswith("got 'sdlx'; did you mean sdxl?")
