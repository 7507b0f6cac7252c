"""What a `DDPOTrainer` writes: checkpoints it resumes from, models that plain diffusers loads, cards, uploads."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from adascope_fast.compat.trl import (
    DDPOTrainer,
    DefaultDDPOStableDiffusionPipeline,
    DefaultDDPOStableDiffusionXLPipeline,
)

Make = Callable[..., Any]
PROJECT = {"project_dir": "save", "automatic_checkpoint_naming": True}


def _prompts() -> tuple[str, dict]:
    return str(np.random.choice(["a red circle", "a blue square"])), {}


def _weights(trainer: DDPOTrainer) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in trainer.trainable_layers]).clone()


CHOICES: dict[str, Any] = {
    "prompts": _prompts,
    "project_kwargs": PROJECT,
    "save_freq": 1,
    "per_prompt_stat_tracking": True,
    "per_prompt_stat_tracking_min_count": 2,
    "train_gradient_accumulation_steps": 1,
}


def test_a_resumed_run_repeats_the_one_that_was_left_alone(make_trainer: Make):
    whole = make_trainer(**CHOICES)
    whole.train(epochs=4)
    folders = sorted(path.name for path in Path("save/checkpoints").iterdir())
    assert folders == ["checkpoint_0", "checkpoint_1", "checkpoint_2"]
    resumed = make_trainer(**CHOICES, resume_from="save/checkpoints/checkpoint_0")
    assert resumed.first_epoch == 2
    assert not torch.equal(_weights(resumed), _weights(whole))
    with pytest.raises(ValueError, match=r"from checkpoint_1 on, and .*checkpoint_2' is there already"):
        resumed.train(epochs=4)
    for number in (1, 2):
        Path(f"save/checkpoints/checkpoint_{number}").rename(f"{number}")
    resumed.train(epochs=4)
    assert torch.equal(_weights(resumed), _weights(whole))
    assert resumed.stat_tracker.state_dict() == whole.stat_tracker.state_dict()
    assert sorted(path.name for path in Path("save/checkpoints").iterdir()) == folders


def test_the_newest_whole_checkpoint_of_a_folder_is_taken(make_trainer: Make, caplog: pytest.LogCaptureFixture):
    trainer = make_trainer(**CHOICES)
    trainer.train(epochs=4)
    newest = make_trainer(**CHOICES, resume_from="save/checkpoints")
    assert newest.first_epoch == 4
    assert torch.equal(_weights(newest), _weights(trainer))
    file = Path("save/checkpoints/checkpoint_2/state.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert make_trainer(**CHOICES, resume_from="save/checkpoints").first_epoch == 3
    assert "damaged checkpoint left out, checkpoint_2" in caplog.text


def test_a_checkpoint_is_safetensors_and_json_and_diffusers_loads_its_lora(make_trainer: Make):
    make_trainer(**CHOICES).train(epochs=2)
    folder = Path("save/checkpoints/checkpoint_0")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "SHA256SUMS", "pytorch_lora_weights.safetensors", "state.json", "state.safetensors",
    }  # fmt: skip
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    assert (state["epoch"], state["global_step"], state["exp_name"]) == (1, 4, "tests")
    assert any("lora" in name for name in load_file(folder / "pytorch_lora_weights.safetensors"))


def test_checkpoints_without_a_project_go_to_logdir_and_the_oldest_go(make_trainer: Make):
    make_trainer(save_freq=1, logdir="kept", num_checkpoint_limit=2).train(epochs=4)
    assert sorted(path.name for path in Path("kept/checkpoints").iterdir()) == ["checkpoint_1", "checkpoint_2"]


def test_another_runs_checkpoints_are_not_overwritten(make_trainer: Make):
    make_trainer(**CHOICES).train(epochs=2)
    with pytest.raises(ValueError, match="checkpoint_0' is there already; set resume_from"):
        make_trainer(**CHOICES).train(epochs=2)


def test_a_checkpoint_of_other_layers_or_settings_is_refused(make_trainer: Make):
    make_trainer(**CHOICES).train(epochs=2)
    choices = CHOICES | {"resume_from": "save/checkpoints"}
    with pytest.raises(ValueError, match="must be of the same layers"):
        make_trainer(use_lora=False, **choices)
    with pytest.raises(ValueError, match="per_prompt_stat_tracking that it began with, got False; set it to True"):
        make_trainer(**choices | {"per_prompt_stat_tracking": False})
    for name in ("state.safetensors", "state.json"):
        (Path("save/checkpoints/checkpoint_0") / name).unlink()
    with pytest.raises(ValueError, match=r"whole checkpoint of this trainer.*only the LoRA"):
        make_trainer(**choices)


@pytest.mark.parametrize("use_lora", [True, False])
def test_a_saved_model_is_what_diffusers_loads(make_trainer: Make, use_lora: bool):
    trainer = make_trainer(use_lora=use_lora)
    trainer.train(epochs=1)
    trainer.save_pretrained("saved")
    plain: Any = StableDiffusionPipeline.from_pretrained("saved")
    if use_lora:
        plain.load_lora_weights("saved", weight_name="pytorch_lora_weights.safetensors")
    torch.manual_seed(0)
    given = torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.randn(2, 16, 16)
    unet = trainer.sd_pipeline.unet.eval()
    with torch.no_grad():
        torch.testing.assert_close(plain.unet(*given).sample, unet(*given).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "kind"), [("sd", DefaultDDPOStableDiffusionPipeline), ("sdxl", DefaultDDPOStableDiffusionXLPipeline)]
)
def test_training_goes_on_from_the_lora_beside_the_model(make_trainer: Make, model: str, kind: Any):
    first = make_trainer(model=model)
    first.train(epochs=1)
    first.save_pretrained("saved")
    again = kind("saved", use_lora=False)
    assert again.use_lora
    second = make_trainer(pipeline=again)
    assert torch.equal(_weights(second), _weights(first))
    before = _weights(second)
    second.train(epochs=1)
    assert not torch.equal(_weights(second), before)
    again.save_checkpoint([again.unet], [], "one")
    want = _weights(second)
    with torch.no_grad():
        for one in second.trainable_layers:
            one.zero_()
    again.load_checkpoint([again.unet], "one")
    assert torch.equal(_weights(second), want)


def test_the_card_says_how_it_was_trained(make_trainer: Make):
    trainer = make_trainer(run_name="red things", project_kwargs=PROJECT)
    trainer.create_model_card(dataset_name="shapes", tags="art")
    text = Path("save/README.md").read_text(encoding="utf-8")
    for part in ("# red things", "- shapes", "- art", "- ddpo", "arxiv.org/abs/2305.13301", "| sample_num_steps | 3 |"):
        assert part in text, part


def test_a_model_is_pushed_through_the_hubs_client(make_trainer: Make, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, Any]] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, **given: Any) -> Any:
            calls.append(("create_repo", repo_id))
            return type("Made", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, *, repo_id: str, folder_path: Path, **given: Any) -> str:
            files = {path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()}
            calls.append((repo_id, files))
            calls.append(("card", (folder_path / "README.md").read_text(encoding="utf-8")))
            return "https://example.com/commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    trainer = make_trainer()
    assert trainer.push_to_hub("shapes", token="secret", dataset_name="drawings") == "https://example.com/commit"
    told = dict(calls)
    assert told["token"] == "secret"
    assert told["create_repo"] == "shapes"
    assert {"README.md", "config.json", "model_index.json", "pytorch_lora_weights.safetensors"} <= told["me/shapes"]
    assert "drawings" in told["card"]
    assert "secret" not in told["card"]
    trainer.push_to_hub()
    assert dict(calls)["create_repo"] == "tests"
    trainer.config.exp_name = ""
    with pytest.raises(ValueError, match="needs the name of a repository"):
        trainer.push_to_hub()


def test_a_tracker_of_accelerate_is_told(make_trainer: Make):
    trainer = make_trainer(log_with="tensorboard", project_kwargs={"logging_dir": "logged"}, tracker_project_name="p")
    trainer.train(epochs=1)
    trainer.accelerator.end_training()
    assert list(Path("logged/p").glob("events*"))
