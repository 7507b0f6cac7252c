"""What is published of a run: its words as words, and nothing of the machine."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from run_folders import HOSTILE

from adascope_fast.config import ConfigError
from adascope_fast.training import hub

PASSED = {"pipeline": {"name": "StableDiffusionPipeline", "digest": "", "is_given": True}}
PASSED |= {"reward": {"name": "mine:redness", "digest": "", "is_given": True}}


def published(run: Path, **given: Any) -> Path:
    """The folder that would be uploaded as me/shapes."""
    out = run.parent / "out"
    hub.write(run, out, "me/shapes", **given)
    return out


def metadata(out: Path) -> Any:
    """What the Hub reads of the card."""
    return ModelCard.load(out / "README.md").data


def test_the_words_of_others_stay_words(made: Any):
    text = (published(made()) / "README.md").read_text()
    shown = text.replace(json.dumps(HOSTILE), "")  # in the lines of Python, which are a block of code
    assert "<script" not in shown
    assert '1. &lt;script&gt;alert(1)&lt;/script&gt; &amp; "quotes"' in shown


def test_the_gain_is_told_with_what_was_tested(made: Any):
    out = published(made())
    text = (out / "README.md").read_text()
    assert "| difference | +0.186 | +0.151 to +0.222 |" in text
    assert "lies above 0: the reward rose. After 30 iterations." in text
    results = metadata(out).eval_results
    assert [(one.metric_type, one.metric_value) for one in results] == [("reward", 0.699), ("reward_gain", 0.186)]
    assert results[0].metric_name == "held-out reward scene_attributes, 95 % interval 0.669 to 0.728"


def test_settings_of_its_own_are_listed_and_the_command_repeats_it(made: Any):
    text = (published(made("train.iterations=30", "algorithm.name=grpo")) / "README.md").read_text()
    assert "| `train.iterations` | 30 | 20 |" in text
    assert '| `algorithm.name` | "grpo" | "ddpo" |' in text
    assert "adascope-fast train shapes/config.toml run.folder=shapes_again" in text


def test_nothing_of_the_machine_is_published(made: Any, tmp_path: Path):
    places = [
        f"prompts.train={tmp_path / 'secret' / 'mine.txt'}",
        f"prompts.held_out={tmp_path / 'secret' / 'other' / 'mine.txt'}",
        "reward.name=remote",
        "reward.url=https://gpu7.secret.example:8400",
        "rollout.name=remote",
        "rollout.url=http://10.1.2.3:8410",
        f"evaluation.clip={tmp_path / 'secret' / 'clip'}",
    ]
    run = made(*places)
    out = published(run)
    for path in out.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not [word for word in (b"secret", b"10.1.2.3", str(tmp_path).encode()) if word in content], path
    text = (out / "README.md").read_text()
    for key in ("prompts.train", "reward.url", "rollout.url", "evaluation.clip"):
        assert f"`{key}`" in text.partition("put your own for")[2]
    values = tomllib.loads((out / "config.toml").read_text())
    assert values["prompts"] | {"column": ""} == values["prompts"] | {
        "train": "mine.txt",
        "held_out": "held_out-mine.txt",
        "column": "",
    }
    assert values["evaluation"]["clip"] == "clip"


def test_a_local_base_is_named_by_hand(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    run = made("model.name=models/mine", "prompts.train=animals:train")
    with pytest.raises(ConfigError, match=r"this run's is the local 'mine'; name the repository .* --base owner/name"):
        published(run)
    monkeypatch.chdir(tmp_path / "secret")  # it is seen from where the run was started
    with pytest.raises(ConfigError, match="this run's is the local 'mine'"):
        published(run)
    out = published(run, base="some/model")
    assert metadata(out).base_model == "some/model"
    assert tomllib.loads((out / "config.toml").read_text())["model"]["name"] == "some/model"
    assert 'DiffusionPipeline.from_pretrained("some/model")' in (out / "README.md").read_text()


def test_what_was_passed_in_python_is_named(made: Any):
    run = made(parts=PASSED)
    with pytest.raises(ConfigError, match="this run was passed a pipeline in Python; name the repository"):
        published(run)
    out = published(run, base="some/model")
    assert "# reward = mine:redness: passed in Python\n" in (out / "config.toml").read_text()
    text = (out / "README.md").read_text()
    assert "reward=...).train()" in text
    assert "pipeline=..." not in text


def test_a_whole_denoiser_is_published_in_its_folder_without_its_origin(made: Any, tmp_path: Path):
    out = published(made("model.train=full", "model.name=some/model", "prompts.train=animals:train", full=True))
    assert json.loads((out / "unet" / "config.json").read_text()) == {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 8,
    }
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    data = metadata(out)
    assert "lora" not in data.tags
    assert data.to_dict()["base_model_relation"] == "finetune"
    text = (out / "README.md").read_text()
    assert 'unet = UNet2DConditionModel.from_pretrained("me/shapes", subfolder="unet")' in text
    assert 'DiffusionPipeline.from_pretrained("some/model", unet=unet)' in text


def test_prompts_are_shown_by_their_number_and_first_lines(made: Any):
    parts = {"train_prompts": {"name": "1364 prompts, 'a *red* circle' first", "digest": "", "is_given": False}}
    text = (published(made(parts=parts)) / "README.md").read_text()
    assert r"- Trained on 1364 prompts, 'a \*red\* circle' first, of scenes:train" in text


def test_no_more_prompts_are_shown_than_a_reader_looks_at(made: Any):
    run = made()
    told = json.loads((run / "samples" / "grid.json").read_text()) | {"prompts": [f"prompt {i}" for i in range(20)]}
    (run / "samples" / "grid.json").write_text(json.dumps(told))
    text = (published(run) / "README.md").read_text()
    assert "16. prompt 15\n\nAnd 4 more.\n" in text
    assert "prompt 16" not in text


def test_a_licence_that_is_not_found_is_to_be_checked(made: Any):
    out = published(made("model.name=some/model", "prompts.train=animals:train"))
    assert metadata(out).license == "other"
    assert "which was not found when this card was written: check it" in (out / "README.md").read_text()


def test_the_licence_file_of_a_local_base_goes_with_the_weights(made: Any, tmp_path: Path):
    model = tmp_path / "secret" / "model"
    model.mkdir(parents=True)
    (model / "LICENSE.md").write_text("You may.")
    out = published(made(f"model.name={model}", "prompts.train=animals:train"), base="some/model")
    assert (out / "LICENSE.md").read_text() == "You may."
    data = metadata(out)
    assert (data.license, data.license_link) == ("other", "LICENSE.md")
