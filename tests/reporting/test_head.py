"""What a run is, and how to have it again."""

import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from run_folders import HOSTILE, make_run, page_of, words_of

from adascope_fast.config import Config
from adascope_fast.reporting import head

REWARD = {"reward": {"name": "mine:redness", "digest": "", "is_given": True}}
PIPELINE = {"pipeline": {"name": "StableDiffusionPipeline", "digest": "", "is_given": True}}


def config_of(*overrides: str) -> dict[str, Any]:
    return tomllib.loads(Config.load(None, overrides).to_toml())


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A folder with an adapter in it."""
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").touch()
    return tmp_path / "run"


def test_the_head_says_what_the_run_is(tmp_path: Path):
    words = words_of(page_of(make_run(tmp_path / "run")))
    for expected in (
        "model scenes algorithm ddpo reward scene_attributes steps trained by adascope",
        "an iteration 8 prompts of 4 pictures, 20 steps seed 0 date 2026-11-29 19:10 UTC time in all 2 min 51 s",
        "peak memory 1,834 MB versions torch 2.13.0, diffusers 0.42.1 commit 0123abc",
        "not as by default value default train.iterations 30 20 train.updates_per_iteration 2 1",
        "Started with adascope-fast train configs/quickstart.toml",
        "No weights were exported",
    ):
        assert expected in words, expected
    assert "run.folder " not in words.partition("Configuration, resolved")[0].partition("Started with")[0]


def test_what_was_passed_in_python_is_named_in_its_place():
    facts = dict(head.facts({}, config_of(), {"parts": PIPELINE | REWARD}, "redness"))
    assert (facts["model"], facts["reward"], facts["algorithm"]) == ("StableDiffusionPipeline", "redness", "ddpo")


def test_a_run_is_repeated_from_its_own_configuration():
    assert head.command(Path("runs/it's"), {"command": "adascope-fast train x.toml"}, {}) == {
        "started": "adascope-fast train x.toml",
        "repeat": shlex.join(["adascope-fast", "train", "runs/it's/config.toml", "run.folder=runs/it's_again"]),
        "language": "a shell",
    }


def test_a_run_with_parts_of_ones_own_is_repeated_in_python():
    found = head.command(Path("runs/mine"), {}, {"parts": REWARD})
    assert found["language"] == "Python"
    assert found["repeat"].splitlines() == [
        "from adascope_fast import Config, Trainer",
        "",
        'Trainer(Config.load("runs/mine/config.toml", ["run.folder=runs/mine_again"]), reward=...).train()',
    ]


@pytest.mark.parametrize(
    ("overrides", "parts", "want"),
    [
        ([], {}, ['DiffusionPipeline.from_pretrained(folder_of("scenes"))', "load_lora_weights("]),
        (
            ["model.name=some/model", "model.revision=main", "model.variant=fp16", "model.dtype=bfloat16"],
            {},
            [
                'from_pretrained("some/model", revision="main", variant="fp16", dtype=torch.bfloat16)',
                "import torch\nfrom diffusers",
                "load_lora_weights(",
            ],
        ),
        (["model.name=some/model.safetensors"], {}, ["# first, in a shell: adascope-fast merge ", '_merged")']),
        (["model.train=full"], {}, ["# first, in a shell: adascope-fast merge ", '_merged")']),
        ([], {"parts": PIPELINE}, ["pipeline = ...  # the one that was passed to Trainer", "load_lora_weights("]),
    ],
    ids=["embedded", "repository", "file", "full", "passed"],
)
def test_the_lines_that_use_the_weights_suit_the_model(
    exported: Path, overrides: list[str], parts: dict[str, Any], want: list[str]
):
    lines = head.use(exported, config_of("prompts.train=animals:train", *overrides), parts, 'a "red" circle')
    compile(lines, "lines", "exec")
    assert all(part in lines for part in want)
    assert 'pipeline("a \\"red\\" circle", num_inference_steps=20, guidance_scale=1.0)' in lines


def test_texts_in_the_code_are_escaped_on_the_page(tmp_path: Path):
    run = make_run(tmp_path / "run")
    (run / "adapter").mkdir()
    (run / "adapter" / "a.safetensors").touch()
    record = json.loads((run / "run.json").read_text()) | {"command": HOSTILE, "device": HOSTILE}
    (run / "run.json").write_text(json.dumps(record))
    page = page_of(run)
    assert "<script" not in page
    assert "&#34;&lt;script&gt;alert(1)&lt;/script&gt; &amp; \\&#34;quotes\\&#34;&#34;" in page


def test_a_prompt_is_the_example_where_one_was_shown():
    assert head.example(["a red circle", "b"]) == "a red circle"
    assert head.example([]) == head.example(None) == head.example("text") == "a cat"
