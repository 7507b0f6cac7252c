"""A run's repository: what is in it, written into a folder, and uploaded.

Weights, README.md, config.toml, the pictures before and after, and the base's licence file where it has one; of the
run's folder nothing else.
"""

import errno
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors import SafetensorError, safe_open

from adascope_fast.backbones.settings import EMBEDDED_NAMES
from adascope_fast.config import Config, ConfigError
from adascope_fast.reporting import head
from adascope_fast.reporting.files import json_object, mapping, text_of
from adascope_fast.training import checkpoint
from adascope_fast.training.hub.card import Published, model_card
from adascope_fast.training.hub.licence import licence_of
from adascope_fast.training.hub.refusals import (
    WEIGHTS,
    refuse_base,
    refuse_name,
    refuse_unfinished,
    token_of_login,
)
from adascope_fast.training.hub.settings_shown import settings_shown, without_places
from adascope_fast.training.lock import refuse_existing
from adascope_fast.training.monitoring.progress import Progress
from adascope_fast.training.run_folder import load_config

logger = logging.getLogger(__name__)

TRANSPORT: Any = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
"""What the Hub's client raises where nothing answers; of the HTTP library that its release uses."""
PICTURES = {"before": "samples/before.png", "after": "samples/after.png"}
HEADING = "# A run of adascope-fast as it was published: places on the machine that it ran on are left out.\n"


def push(
    folder: Path | str,
    repo_id: str,
    *,
    base: str | None = None,
    private: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Upload a finished run as a repository of the Hugging Face Hub, made if it is not there; its address.

    Args:
        repo_id: "owner/name".
        base: repository of the model that was trained, where the run has it from a local folder or a file, or was
            passed it in Python.
        private: only you, or your organisation, see it. A repository that is there must be private already.
        token: of a login that may write; None: that of `hf auth login`, or HF_TOKEN.
        progress: what tells how far it is; None: it is quiet.

    Raises:
        ConfigError: what is asked for cannot be published, or not there.
        FloatingPointError: the weights are not finite.
        OSError: the Hub does not answer, or failed.
    """
    folder, progress = Path(folder), progress or Progress(quiet=True)
    refuse_name(repo_id)
    refuse_base(base)
    refuse_unfinished(folder)
    api = HfApi(token=token_of_login(token))
    with TemporaryDirectory(prefix="adascope-fast-") as staged:
        _write(folder, Path(staged), repo_id, base, progress, lambda source, target: target.symlink_to(source))
        with progress.stage(f"uploading to {repo_id}"):
            return _uploaded(api, Path(staged), repo_id, is_private=private)


def write(
    folder: Path | str, out: Path | str, repo_id: str, *, base: str | None = None, progress: Progress | None = None
) -> None:
    """Write what `push` would upload into a new folder; arguments and errors are those of `push`."""
    folder, out, progress = Path(folder), Path(out), progress or Progress(quiet=True)
    refuse_name(repo_id)
    refuse_base(base)
    refuse_unfinished(folder)
    refuse_existing(out, "--dry-run")
    _write(folder, out, repo_id, base, progress, lambda source, target: shutil.copyfile(source, target) and None)


def _write(
    folder: Path,
    out: Path,
    repo_id: str,
    base: str | None,
    progress: Progress,
    place: Callable[[Path, Path], None],
) -> None:
    """Check everything, then write it; `place` puts a file that is published as it is."""
    config, files = load_config(folder), {name: json_object(text_of(folder / name)) for name in JSON}
    passed = head.given(files["parts.json"])
    base = base or _base_of(folder, config, passed)
    with progress.stage("reading the weights"):
        weights, descriptions, denoiser = _weights(folder / "adapter")
    shown, left_out = settings_shown(config, name=repo_id.rpartition("/")[2], base=base, folder=folder)
    local = Path(config.model.name)
    licence = licence_of(
        base, local if local.is_dir() and base not in EMBEDDED_NAMES else None, revision=shown.model.revision
    )
    prompts = files["samples/grid.json"].get("prompts")
    parts = {name: part for name, part in mapping(files["parts.json"].get("parts")).items() if name != "pipeline"}
    published = Published(
        repo_id=repo_id,
        base=base,
        config=shown.model_dump(exclude_none=True),
        left_out=left_out,
        run=files["run.json"],
        evaluation=files["evaluation.json"],
        parts={"parts": parts, "changes": files["parts.json"].get("changes")},
        prompts=[str(prompt) for prompt in prompts] if isinstance(prompts, list) else [],
        pictures={when: name for when, name in PICTURES.items() if _is_picture(folder / name)},
        denoiser=denoiser,
        licence=licence,
    )
    lacking = [PICTURES[when] for when in PICTURES if when not in published.pictures]
    if lacking := [*(name for name in JSON if not files[name]), *lacking]:
        logger.warning("published without %s of %s, which cannot be read", ", ".join(lacking), folder)
    heading = HEADING + "".join(
        f"# {name} = {without_places(' '.join(called.split()))}: passed in Python\n" for name, called in passed.items()
    )
    texts = {"README.md": model_card(published), "config.toml": f"{heading}\n{shown.to_toml()}", **descriptions}
    copied = weights | {name: folder / name for name in published.pictures.values()}
    copied |= {licence.file.name: licence.file} if licence.file is not None else {}
    for name, text in texts.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    for name, source in copied.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        place(source.resolve(), out / name)


JSON = ("run.json", "evaluation.json", "parts.json", "samples/grid.json")
"""What the card is written from."""


def _base_of(folder: Path, config: Config, passed: Mapping[str, str]) -> str:
    """The model's own name; ConfigError where it is none that others can load."""
    name = config.model.name
    again = f"name the repository that it came from with --base owner/name (base= in Python) for {str(folder)!r}"
    if "pipeline" in passed:
        raise ConfigError(f"a card names the base model, and this run was passed a pipeline in Python; {again}")
    if name in EMBEDDED_NAMES:
        return name
    near = [Path.cwd(), *folder.resolve().parents]
    if Path(name).suffix == ".safetensors" or any((place / name).exists() for place in near):
        raise ConfigError(f"a card names the base model, and this run's is the local {Path(name).name!r}; {again}")
    refuse_base(name)
    return name


def _weights(adapter: Path) -> tuple[dict[str, Path], dict[str, str], tuple[str, str] | None]:
    """(files by their name in the repository, descriptions, class and folder of a whole denoiser), all finite.

    A denoiser's description says where it was loaded from, which is left out.
    """
    found = sorted(adapter.rglob(WEIGHTS))
    for path in found:
        _refuse_not_finite(path)
    files = {path.relative_to(adapter).as_posix(): path for path in found}
    texts: dict[str, str] = {}
    denoiser = None
    for path in sorted(adapter.rglob("*.json")):
        name = path.relative_to(adapter).as_posix()
        values = json_object(text_of(path))
        if path.name == "config.json":
            denoiser = str(values.get("_class_name")), path.parent.name
            if not denoiser[0].isidentifier():
                raise ConfigError(f"{path} must name the class of its model, and does not; restore it")
            values = {key: value for key, value in values.items() if key != "_name_or_path"}
        if path.name == "config.json" or path.name.endswith(".safetensors.index.json"):
            texts[name] = json.dumps(values, indent=2) + "\n"
    return files, texts, denoiser


def _refuse_not_finite(path: Path) -> None:
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if checkpoint.not_finite({name: file.get_tensor(name)}):
                    raise FloatingPointError(
                        f"weights that are published must be finite, and {name} of {path} is not; train again with a "
                        f"lower train.learning_rate"
                    )
    except SafetensorError as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore it, or train the run again") from None


def _is_picture(path: Path) -> bool:
    """Whether there is a picture; one that is missing or cut off is not shown."""
    try:
        with Image.open(path) as picture:
            picture.verify()
    except (OSError, ValueError, SyntaxError):
        return False
    return True


def _uploaded(api: HfApi, staged: Path, repo_id: str, *, is_private: bool) -> str:
    try:
        address = str(api.create_repo(repo_id, private=is_private or None, exist_ok=True))
        if is_private and not api.repo_info(repo_id).private:
            raise ConfigError(
                f"--private is for a repository that is private or new, and {repo_id} is there and public; make it "
                f"private on {address}/settings, or name another"
            )
        api.upload_folder(repo_id=repo_id, folder_path=staged, commit_message="Upload a run of adascope-fast")
    except HfHubHTTPError as error:
        raise _told(error, repo_id) from None
    except TRANSPORT as error:
        raise _not_answered(error) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        raise _not_answered(error) from None
    return address


def _told(error: HfHubHTTPError, repo_id: str) -> Exception:
    """What the Hub refused in one line: a mistake of the user's, or its own failure."""
    status = getattr(error.response, "status_code", None)
    if status == 401:
        return ConfigError("the login at Hugging Face is not valid any more; log in again with `hf auth login`")
    if status in (403, 404):
        return ConfigError(
            f"{repo_id} must be a repository that your login may write to, and the Hub refuses it ({status}); name one "
            f"of your own, or log in with `hf auth login` and a token that may write"
        )
    words = " ".join(str(error).split())[:200]
    return OSError(f"the Hub failed to take {repo_id} ({status}: {words}); try again")


def _not_answered(error: Exception) -> OSError:
    words = " ".join(str(error).split())[:200] or type(error).__name__
    return OSError(f"the Hub does not answer ({words}); try again where there is a network")
