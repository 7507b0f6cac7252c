"""Whether a run's folder was made here, so that the code that it names may be imported.

A configuration with `module:object` imports Python code. Of a configuration that a user names that is what was asked
for; of a folder that came from somewhere else it is not. So a run that imports code of one's own is signed with a key
that never leaves the user's account, and to resume another one takes --trust-code.
"""

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

from adascope_fast.config import Config, ConfigError
from adascope_fast.rewards.settings import Mixed
from adascope_fast.settings import Own


def own_code(config: Config) -> list[str]:
    """`section.name = module:object` of each object that the configuration has imported."""
    sections = {"reward": config.reward, "algorithm": config.algorithm, "selector": config.selector}
    names = [f"{name}.name = {section.name}" for name, section in sections.items() if isinstance(section, Own)]
    parts = config.reward.parts if isinstance(config.reward, Mixed) else {}
    return names + [f"reward.parts has {name}" for name in parts if ":" in name]


def signature(config: Config) -> str:
    """What says that this user has made a run that imports this code; "" where there is none, or no key to be had."""
    names = own_code(config)
    key = _key() if names else b""
    return hmac.new(key, "\n".join(names).encode(), hashlib.sha256).hexdigest() if key else ""


def refuse_foreign(folder: Path, config: Config, signed: str, *, is_trusted: bool) -> list[str]:
    """The code that resuming the run will import; ConfigError where it was not made here and is not trusted."""
    names = own_code(config)
    if names and not is_trusted and not (signed and hmac.compare_digest(signed, signature(config))):
        raise ConfigError(
            f"resuming {str(folder)!r} would import {' and '.join(names)}, and that run was not made by this user "
            f"here; look at that code, then add --trust-code"
        )
    return names


def _key() -> bytes:
    """32 bytes in the user's state folder (XDG_STATE_HOME), made at first use; empty where that cannot be written."""
    try:
        home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        path = home / "adascope_fast" / "key"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"key.{os.getpid()}")
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
            with suppress(FileExistsError):
                os.link(partial, path)  # the first of two processes that start at once makes it
            partial.unlink()
        return path.read_bytes()
    except (OSError, RuntimeError):
        return b""
