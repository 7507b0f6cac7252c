"""`push`: what would be uploaded works in plain diffusers, and what cannot be published is one line."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from command_line import beside_progress, call, refused
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

from adascope_fast import Config, Trainer

FILES = {"README.md", "config.toml", "pytorch_lora_weights.safetensors", "samples/before.png", "samples/after.png"}
WEIGHTS = "adapter/pytorch_lora_weights.safetensors"


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


class Hub:
    """What the Hub's client was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.is_private = False
        self.error: Exception | None = None
        self.files: dict[str, bytes] = {}

    def create_repo(self, api: HfApi, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        assert exist_ok
        self.calls.append(("create_repo", (api.token, repo_id, private)))
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id: str) -> Any:
        self.calls.append(("repo_info", repo_id))
        return type("Info", (), {"private": self.is_private})

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("upload_folder", repo_id))
        self.files = {name: (folder_path / name).read_bytes() for name in names_in(folder_path)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub that one is logged in at, in this process."""
    found = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(HfApi, "create_repo", lambda api, *args, **given: found.create_repo(api, *args, **given))
    monkeypatch.setattr(HfApi, "repo_info", lambda api, repo_id: found.repo_info(repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **given: found.upload_folder(**given))
    return found


def answer(status: int) -> HfHubHTTPError:
    request = httpx.Request("POST", "https://huggingface.co/api")
    response: Any = httpx.Response(status, request=request)
    return HfHubHTTPError(f"{status} said the Hub", response=response)


def test_what_would_be_uploaded_is_written_and_nothing_is_uploaded(run: Path, tmp_path: Path, hub: Hub):
    outcome = call("push", run, "me/shapes", "--dry-run", tmp_path / "out")
    assert (outcome.code, outcome.out) == (0, f"{tmp_path / 'out'}\n")
    assert names_in(tmp_path / "out") == FILES
    assert hub.calls == []


def test_what_is_uploaded_is_what_a_dry_run_writes(run: Path, tmp_path: Path, hub: Hub):
    call("push", run, "me/shapes", "--dry-run", tmp_path / "out")
    outcome = call("push", run, "me/shapes")
    assert (outcome.code, outcome.out) == (0, "https://huggingface.co/me/shapes\n")
    assert hub.calls == [("create_repo", ("hf_secret", "me/shapes", None)), ("upload_folder", "me/shapes")]
    assert hub.files == {name: (tmp_path / "out" / name).read_bytes() for name in FILES}
    assert not any(b"hf_secret" in content for content in hub.files.values())


def test_the_lines_of_the_card_draw_with_the_published_weights(run: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert call("push", run, "me/shapes", "--dry-run", out).code == 0
    (lines,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    found: dict[str, Any] = {}
    exec(lines.replace('"me/shapes"', json.dumps(str(out))), found)
    assert found["picture"].size == (64, 64)
    state = {name: value for name, value in found["pipeline"].unet.state_dict().items() if "lora" in name}
    published = load_file(out / "pytorch_lora_weights.safetensors")
    assert len(state) == len(published) > 0
    total = sum(value.double().abs().sum() for value in state.values())
    torch.testing.assert_close(total, sum(value.double().abs().sum() for value in published.values()))


def test_the_card_and_the_settings_are_read_by_their_own_readers(run: Path, tmp_path: Path):
    assert call("push", run, "me/shapes", "--dry-run", tmp_path / "out").code == 0
    card: Any = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict()["license"] == "apache-2.0"
    assert {"lora", "text-to-image", "adascope"} <= set(card.data.tags)
    assert Config.load(tmp_path / "out" / "config.toml").run.folder == "runs/shapes"
    for text in (card.content, (tmp_path / "out" / "config.toml").read_text()):
        assert str(run.parent) not in text


def test_a_trainer_publishes_its_run(run: Path, hub: Hub):
    trainer = Trainer(Config.load(run / "config.toml"), quiet=True)
    hub.is_private = True
    assert trainer.push_to_hub("me/shapes", private=True, token="hf_given") == "https://huggingface.co/me/shapes"
    assert hub.calls[0] == ("create_repo", ("hf_given", "me/shapes", True))
    assert hub.files.keys() == FILES


def test_a_private_run_never_goes_to_a_public_repository(run: Path, hub: Hub):
    assert "me/shapes is there and public; make it private on" in refused("push", run, "me/shapes", "--private")
    assert ("upload_folder", "me/shapes") not in hub.calls


@pytest.mark.parametrize("repo_id", ["shapes", "me/shapes/three", "me/sha pes", "me/-shapes", "https://me/shapes"])
def test_a_name_that_is_none_of_a_repository_is_refused(run: Path, repo_id: str):
    assert "a repository of the Hub is named owner/name" in refused("push", run, repo_id)
    assert "--base is the repository of the model" in refused("push", run, "me/shapes", "--base", repo_id)


def test_a_run_that_is_not_finished_is_refused(copy: Path, tmp_path: Path):
    assert "a run's folder holds a config.toml" in refused("push", tmp_path / "none", "me/shapes")
    (copy / "run.json").write_text('{"status": "interrupted"}')
    line = refused("push", copy, "me/shapes")
    assert "'interrupted'; finish it with: adascope-fast train --resume" in line


def test_a_run_without_weights_is_refused(copy: Path):
    shutil.rmtree(copy / "adapter")
    assert "a run is published with its trained weights" in refused("push", copy, "me/shapes")


def test_without_a_login_it_is_said_how_to_log_in(run: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub, tmp_path: Path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    assert "log in with `hf auth login`" in refused("push", run, "me/shapes")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it, or write the files alone with --dry-run" in refused(
        "push", run, "me/shapes"
    )


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (401, 2, "the login at Hugging Face is not valid any more"),
        (403, 2, "must be a repository that your login may write to, and the Hub refuses it (403)"),
        (404, 2, "must be a repository that your login may write to, and the Hub refuses it (404)"),
        (500, 1, "the Hub failed to take me/shapes (500: 500 said the Hub); try again"),
    ],
)
def test_what_the_hub_refuses_is_one_line(run: Path, hub: Hub, status: int, code: int, told: str):
    hub.error = answer(status)
    outcome = call("push", run, "me/shapes")
    (line,) = beside_progress(outcome.err)
    assert (outcome.code, outcome.out) == (code, "")
    assert told in line


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline"), ConnectionError("no route"), TimeoutError("slow")])
def test_a_hub_that_does_not_answer_is_told(run: Path, hub: Hub, error: Exception):
    hub.error = error
    outcome = call("push", run, "me/shapes")
    assert outcome.code == 1
    assert f"error: the Hub does not answer ({error}); try again where there is a network" in outcome.err


def test_an_error_of_the_hubs_http_library_is_told(run: Path, hub: Hub):
    library = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    hub.error = library("name not known")
    outcome = call("push", run, "me/shapes")
    assert (outcome.code, "the Hub does not answer (name not known)" in outcome.err) == (1, True)


def test_weights_that_are_not_finite_are_not_published(copy: Path, tmp_path: Path, hub: Hub):
    tensors = load_file(copy / WEIGHTS)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, copy / WEIGHTS)
    outcome = call("push", copy, "me/shapes")
    assert outcome.code == 1
    assert "weights that are published must be finite, and unet." in outcome.err
    assert hub.calls == []
    assert call("push", copy, "me/shapes", "--dry-run", tmp_path / "out").code == 1
    assert not (tmp_path / "out").exists()


def test_weights_that_are_cut_off_are_refused(copy: Path, hub: Hub):
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(content[: len(content) // 2])
    outcome = call("push", copy, "me/shapes")
    assert (outcome.code, hub.calls) == (2, [])
    assert "cannot be read" in outcome.err


def test_a_folder_is_never_replaced(run: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "--dry-run never replaces what is there" in refused("push", run, "me/shapes", "--dry-run", tmp_path / "out")


@pytest.mark.parametrize("name", ["samples/before.png", "evaluation.json", "parts.json"])
def test_what_the_card_lacks_is_named(copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str):
    (copy / name).write_text("cut of")
    assert call("push", copy, "me/shapes", "--dry-run", tmp_path / "out").code == 0
    assert caplog.messages == [f"published without {name} of {copy}, which cannot be read"]
    assert (tmp_path / "out" / "README.md").is_file()
    assert ("samples/before.png" in names_in(tmp_path / "out")) == (name != "samples/before.png")
