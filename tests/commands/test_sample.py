"""`sample`: the same seeds, with and without the adapter."""

from pathlib import Path

from command_line import call
from PIL import Image


def test_sample_draws_the_trained_adapter_beside_the_base(run: Path, tmp_path: Path):
    caption = "a large red circle on a grey background"
    arguments = ("sample", run, "--prompt", caption, "--prompt", caption, "--num", "3", "--steps", "2")
    first = call(*arguments, "--out", tmp_path / "first.png")
    assert (first.code, first.out) == (0, f"{tmp_path / 'first.png'}\n")
    with Image.open(tmp_path / "first.png") as image:
        assert image.width > 3 * 128
        assert image.height > 4 * 128, "a row for the base and one for the adapter, twice"
    call(*arguments, "--out", tmp_path / "second.png")
    assert (tmp_path / "second.png").read_bytes() == (tmp_path / "first.png").read_bytes()
