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


def test_a_model_of_this_machine_is_a_configuration_too(tmp_path: Path):
    config = configured(["scenes-flow", "train.iterations=3"], command="train")
    assert config == Config.load(None, ["model.name=scenes-flow", "train.iterations=3"])
    (tmp_path / "model_index.json").write_text("{}")
    assert configured([str(tmp_path), *OTHER], command="train").model.name == str(tmp_path)
    assert "a configuration is a .toml file, or a preset: " in refused("train", "scenes-flwo")


def test_a_plan_needs_no_prompts():
    assert configured([TINY, "model.name=somebody/some-model"], command="plan").prompts.train is None


@pytest.mark.parametrize("command", ["make-preferences", "train-preference-model"])
def test_what_makes_a_folder_may_be_told_of_it_before(tmp_path: Path, command: str):
    offline = ["algorithm.name=diffusion_dpo", f"algorithm.preferences={tmp_path / 'set'}"]
    spo = ["algorithm.name=spo", f"algorithm.preference_model={tmp_path / 'model'}", "selector.name=every_step"]
    for settings in (offline, spo):
        assert configured([TINY, *settings], command=command).algorithm.name == settings[0].partition("=")[2]


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


OTHER = [PLAIN, "prompts.train=animals:train"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", TINY, "prompts.train=animals:train"], 'reward.name = "scene_attributes" judges scene captions'),
        (["train", TINY, "reward.name=nowhere:score"], "there is no module nowhere"),
        (["train", TINY, "reward.name=math:sqroot"], "has no sqroot; did you mean sqrt?"),
        (
            ["train", TINY, "reward.name=json:JSONDecoder", "reward.size=3"],
            "could not be made from size: TypeError: got a",
        ),
        (["train", TINY, "reward.name=hpsv2", "prompts.train=animals:train"], "the folder that import-weights wrote"),
        (
            ["train", TINY, "reward.name=mixed", "reward.parts={jpeg_compressibility = 1.0, 'nowhere:score' = 1.0}"],
            "there is no module nowhere",
        ),
        (["train", TINY, PLAIN, "prompts.train=TMP/none.txt", "prompts.held_out=TMP/b.txt"], "which is no file"),
        (["train", TINY, PLAIN, "prompts.train=TMP/empty.txt", "prompts.held_out=TMP/b.txt"], "is empty; add at least"),
        (["train", TINY, *OTHER, "model.name=TMP"], "the folder of a saved diffusers pipeline (with model_index.json)"),
        (["train", TINY, *OTHER, "model.name=TMP/model.ckpt"], "must not be a pickle"),
        (["calibrate", TINY, *OTHER, "model.name=TMP/model.safetensors"], "is no file here"),
        (["plan", TINY, "model.name=TMP"], "the folder of a saved diffusers pipeline (with model_index.json)"),
        (["train", "--resume", "TMP"], "--resume names the folder of a run"),
        (["sample", "TMP", "--prompt", "a cat"], "a run's folder holds a config.toml"),
        (["merge", "TMP", "TMP/out"], "a run's folder holds a config.toml"),
        (["report", "TMP"], "a run's folder holds a config.toml"),
        (["train", TINY, *OTHER, "model.name=./models/none"], "the folder of a saved diffusers pipeline"),
        (
            ["train", TINY, "algorithm.name=diffusion_dpo", "algorithm.preferences=TMP/no"],
            "algorithm.preferences is a folder, got ",
        ),
        (
            ["train", TINY, "algorithm.name=spo", "algorithm.preference_model=TMP/no", "selector.name=every_step"],
            "algorithm.preference_model is a folder with config.json and model.safetensors, got ",
        ),
        (["train", TINY, "model.variant=fp16"], "got 'fp16' and 'scenes' has none called so; remove it"),
        (["train", TINY, "run.folder=TMP"], "a run never replaces what is there"),
        (["train", TINY, "run.folder=TMP", "--overwrite"], "--overwrite replaces runs only"),
        (["train", TINY, "run.folder=TMP/b.txt/run"], "run.folder must be writable"),
        (["train", TINY, "prompts.held_out_share=0.2"], "got 0.2 with the held-out prompts scenes:held_out; remove it"),
        (["merge", "TMP/run", "TMP"], "merge never replaces what is there"),
        (["make-preferences", TINY, "--out", "TMP"], "a set never replaces what is there"),
        (["evaluate", "nowhere", "--out", "TMP/out"], "a source is a run, a model, a LoRA or a folder of images"),
    ],
)
def test_mistakes_are_told_before_torch_is_imported(tmp_path: Path, arguments: list[str], line: str):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "b.txt").write_text("two\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    given = ["adascope-fast", *(argument.replace("TMP", str(tmp_path)) for argument in arguments)]
    program = (
        f"import sys; from adascope_fast import cli\nsys.argv = {given!r}\n"
        "try: cli.main()\nexcept SystemExit as stopped: sys.exit(100 if 'torch' in sys.modules else stopped.code)"
    )
    stopped = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert stopped.returncode == 2, stopped
    (told,) = stopped.stderr.splitlines()
    assert told.startswith("error: ")
    assert line in told
