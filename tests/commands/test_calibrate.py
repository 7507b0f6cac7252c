"""`calibrate`: the page it writes, and what it refuses."""

from pathlib import Path

from command_line import TINY, call, refused


def test_calibrate_writes_a_page_and_refuses_in_one_line(tmp_path: Path):
    out = tmp_path / "calibration"
    outcome = call("calibrate", TINY, "--prompts", "1", "--out", out, "sampler.num_steps=5")
    assert outcome.code == 0, outcome
    assert "selector.kappa=" in outcome.out
    assert {path.name for path in out.iterdir()} == {f"calibration.{kind}" for kind in ("html", "json", "png")}
    assert refused("calibrate", TINY, "--start", "0.7", "--end", "0.6") == (
        "error: --start must be below --end, got 0.7 and 0.6; the paper has 0.106 and 0.636"
    )
    assert "got 1 and 1; the paper has" in refused("calibrate", TINY, "--start", "1")
    assert refused("calibrate", TINY, "--prompts", "1", "--out", out, "selector.rule=literal") == (
        "error: a calibration proposes selector.kappa and selector.phi_end, which have a meaning with selector.rule = "
        '"knee" or "knee_causal", got "literal"; set selector.rule = "knee"'
    )
    assert refused("calibrate", TINY, "--saturation", "0.2", "--end", "0.5") == (
        "error: --saturation is a share between 0 and 1 in place of --end, got 0.2 and --end 0.5; 0.2 is a start"
    )
    assert "got 1 and --end unset" in refused("calibrate", TINY, "--saturation", "1")
    assert "is a file; choose another place" in refused("calibrate", TINY, "--out", out / "calibration.json")
    assert "calibrate needs a configuration file first, got nothing" in refused("calibrate")
