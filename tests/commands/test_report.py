"""`report`: the page can be made from the folder alone."""

import re
import shlex
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, refused
from PIL import Image
from safetensors.torch import load_file


def test_report_is_written_again(run: Path):
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert call("report", run).out == f"{run / 'report.html'}\n"
    assert (run / "report.html").read_text() == before


SHOWN = ["config.toml", "run.json", "parts.json", "evaluation.json", "stats.jsonl", "samples/grid.json"]
SHOWN += ["samples/before.png", "samples/after.png"]


@pytest.mark.parametrize("damage", ["deleted", "garbage", "a folder"])
@pytest.mark.parametrize("name", SHOWN)
def test_what_it_cannot_show_is_named(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / name).unlink()
    if damage == "garbage":
        (folder / name).write_bytes(b"\xff\x00 no such thing")
    if damage == "a folder":
        (folder / name).mkdir()
    outcome = call("report", folder)
    assert (outcome.code, outcome.out) == (0, f"{folder / 'report.html'}\n")
    (line,) = caplog.messages
    assert line.startswith(f"made without {name}")


@pytest.mark.parametrize("text", ['{"before": 3, "after": []}', '{"before": {}}', "[]", '{"history": 1}'])
def test_an_evaluation_of_another_shape_is_named(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "evaluation.json").write_text(text)
    assert call("report", folder).code == 0
    assert caplog.messages[0].startswith("made without evaluation.json of ")


def test_an_image_of_another_size_is_named(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    Image.new("RGB", (1, 1)).save(folder / "samples" / "before.png")
    (folder / "samples" / "grid.json").write_text('{"prompts": ["a", "b", "c"], "columns": 1, "tile": 64}')
    assert call("report", folder).code == 0
    assert "samples/before.png" in caplog.messages[0]


def test_a_folder_that_is_no_run_has_no_report(tmp_path: Path):
    assert "a run's folder holds a config.toml" in refused("report", tmp_path)


def test_the_lines_of_the_page_draw_with_the_trained_weights(run: Path):
    page = (run / "report.html").read_text()
    lines = unescape(re.findall(r'<pre class="copy">(.*?)</pre>', page, flags=re.DOTALL)[-1])
    found: dict[str, Any] = {}
    exec(lines, found)
    assert found["pipeline"].get_active_adapters() == ["default_0"]
    assert found["picture"].size == (64, 64)


def test_the_command_of_the_page_repeats_the_run(run: Path):
    (command,) = re.findall(
        r"<pre class=\"copy\">(adascope-fast train .*?_again)</pre>", (run / "report.html").read_text()
    )
    assert call(*shlex.split(unescape(command))[1:]).code == 0
    again = run.with_name("run_again")
    assert (again / "stats.jsonl").read_text().count("\n") == (run / "stats.jsonl").read_text().count("\n")
    weights = [load_file(folder / "adapter" / "pytorch_lora_weights.safetensors") for folder in (run, again)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
