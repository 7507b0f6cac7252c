"""What cannot be published, told before torch is imported."""

from pathlib import Path

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from adascope_fast.backbones.settings import EMBEDDED_NAMES
from adascope_fast.config import ConfigError
from adascope_fast.reporting.files import is_run, json_object, no_run, text_of

WEIGHTS = "*.safetensors"


def refuse_name(repo_id: str) -> None:
    """ConfigError unless it can be the name of a repository with its owner."""
    _refuse(repo_id, "a repository of the Hub is named owner/name", "name yours, such as me/shapes")


def refuse_base(base: str | None) -> None:
    """ConfigError unless it can be the name of a base model, where one is given."""
    if base is not None and base not in EMBEDDED_NAMES:
        _refuse(base, "--base is the repository of the model that was trained, owner/name", "name that")


def _refuse(repo_id: str, rule: str, advice: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        is_valid = False
    else:
        is_valid = repo_id.count("/") == 1
    if not is_valid:
        raise ConfigError(f"{rule}, of letters, digits, '-', '_' and '.', got {repo_id!r}; {advice}")


def refuse_unfinished(folder: Path) -> None:
    """ConfigError unless a folder holds a run that has ended and exported its weights."""
    if not is_run(folder):
        raise ConfigError(no_run(folder))
    status = json_object(text_of(folder / "run.json")).get("status", "unknown")
    if status != "finished":
        raise ConfigError(
            f"a run is published once it is finished, and the status of {str(folder)!r} is {status!r}; finish it with: "
            f"adascope-fast train --resume {folder}"
        )
    if not any((folder / "adapter").rglob(WEIGHTS)):
        raise ConfigError(
            f"a run is published with its trained weights, and {str(folder / 'adapter')!r} has none; restore that "
            f"folder, or train on with: adascope-fast train --resume {folder} train.iterations=..."
        )


def token_of_login(given: str | None = None) -> str:
    """The token to write with; ConfigError where there is none, or no network is to be used."""
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            "publishing needs the network, and HF_HUB_OFFLINE is set; unset it, or write the files alone with "
            "--dry-run FOLDER"
        )
    token = given or get_token()
    if not token:
        raise ConfigError(
            "publishing needs a login at Hugging Face, got none; log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write"
        )
    return token
