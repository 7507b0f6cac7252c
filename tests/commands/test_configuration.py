"""What a command refuses of its configuration and prompts before torch is imported, and of its numbers."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import TINY, call, refused

from adascope_fast.commands.configuration import SAMPLES, configured
from adascope_fast.config import Config

PLAIN = "reward.name=jpeg_compressibility"


@pytest.mark.parametrize("command", SAMPLES)
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["prompts.train=animals:train"], 'error: reward.name = "scene_attributes" judges scene captions alone, got 36 '
         "others in prompts.train, first 'cat'; choose another reward, or captions such as"),
        (["prompts.train=scenes:train", "prompts.held_out=animals:train"], "got 36 others in prompts.held_out, first"),
        (["model.name=scene"], "error: prompts.train must be named where model.name is none of "
         'scenes, scenes-flow, got model.name = "scene" without prompts; set it to a file'),
        ([PLAIN, "prompts.train=TMP/a.txt"], "error: where no held-out prompts are named, prompts.held_out_share "
         "of the others must be 2 or more and leave one to train on, got 0.1 of the 3 different ones of "),
        ([PLAIN, "prompts.train=TMP/a.txt", "prompts.held_out=TMP/b.txt", "prompts.column=text"],
         "error: prompts.column names a column of a table or a field of a .jsonl, got 'text' with "),
        ([PLAIN, "prompts.train=TMP/a.txt", "prompts.held_out=TMP/b.txt"], "error: held-out prompts are judged by and "
         "never trained on, got 2 that are all in prompts.train, first 'two'; take them out of prompts.train, or name"),
        ([PLAIN, "prompts.train=TMP/a.txt", "prompts.held_out=TMP"], "which is a folder; check the path"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_meant_are_refused_at_once(
    tmp_path: Path, command: str, arguments: list[str], line: str
):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "b.txt").write_text("two\r\n\r\nthree \r\n")
    given = [argument.replace("TMP", str(tmp_path)) for argument in arguments]
    assert line in refused(command, TINY, f"run.folder={tmp_path / 'run'}", *given)
    assert not (tmp_path / "run").exists()


def test_a_plan_needs_no_prompts():
    assert configured([TINY, "model.name=somebody/some-model"], command="plan").prompts.train is None


def test_some_overlap_is_not_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("two\nthree\n")
    prompts = [f"prompts.train={tmp_path / 'a.txt'}", f"prompts.held_out={tmp_path / 'b.txt'}"]
    assert isinstance(configured([TINY, PLAIN, *prompts], command="train"), Config)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["sample", "RUN", "--prompt", "a", "--guidance", value] for value in ("inf", "-inf", "nan", "1e308", "-1")),
        ["sample", "RUN", "--prompt", "a", "--seed", "4294967296"],
        ["sample", "RUN", "--prompt", "a", "--steps", "1000000000"],
        ["sample", "RUN", "--prompt", "a", "--num", "1000000000"],
        *(["calibrate", TINY, option, value] for option in ("--start", "--end") for value in ("nan", "inf", "-1")),
        ["calibrate", TINY, "--stride", "7"],
        ["calibrate", TINY, "--prompts", "1000000000000"],
        *(["plan", TINY, "--tflops", value] for value in ("nan", "inf", "0", "1e308")),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused_by_their_option(tmp_path: Path, arguments: list[str]):
    finished = call(*[argument.replace("RUN", str(tmp_path)) for argument in arguments])
    assert finished.code == 2
    assert finished.out == ""
    last = finished.err.splitlines()[-1]
    assert arguments[-2] in last, last
    assert "Traceback" not in finished.err


@pytest.mark.parametrize("prompt", ["a\nb", "a\0b", "\ud800", " ", "x" * 2001])
def test_a_prompt_of_the_command_line_is_checked(tmp_path: Path, prompt: str):
    line = refused("sample", tmp_path, "--prompt", "a cat", "--prompt", prompt)
    assert line.startswith("error: a prompt has ")
    assert "--prompt" in line
    assert line.isprintable()


def test_mistakes_are_told_before_torch_is_imported(tmp_path: Path):
    program = (
        "import sys; from adascope_fast.commands.configuration import configured\n"
        f"try: configured([{TINY!r}, 'prompts.train=animals:train'], command='train')\n"
        "except ValueError: sys.exit('torch' in sys.modules)\nsys.exit(3)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
