"""Whether a run's folder was made here, so that what it names may be imported, or be sent a token.

A configuration with `module:object` imports Python code, and one with a server's address sends it what an environment
variable holds. Of a configuration that a user names that is what was asked for; of a folder that came from somewhere
else it is not. So a run that does either is signed with a key that never leaves the user's account, and to resume
another one takes --trust-code, or the address on the command line.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from adascope_fast.config import Config, ConfigError
from adascope_fast.rewards.settings import Mixed
from adascope_fast.serving.settings import Asking
from adascope_fast.settings import Own, show


def own_code(config: Config) -> list[str]:
    """`section.name = module:object` of each object that the configuration has imported."""
    sections = {"reward": config.reward, "algorithm": config.algorithm, "selector": config.selector}
    names = [f"{name}.name = {section.name}" for name, section in sections.items() if isinstance(section, Own)]
    parts = config.reward.parts if isinstance(config.reward, Mixed) else {}
    return names + [f"reward.parts has {name}" for name in parts if ":" in name]


def tokens_sent(config: Config) -> dict[str, str]:
    """By the key of each server's address: the variable whose value is sent there, and the address, in words."""
    sections: dict[str, Any] = {"reward": config.reward, "rollout": config.rollout}
    if isinstance(config.reward, Mixed):
        sections |= {f"reward.parts.{name}": section for name, section in config.reward.sections().items()}
    return {
        f"{name}.url": f"the variable {section.token_env} to {name}.url = {show(section.url)}"
        for name, section in sections.items()
        if isinstance(section, Asking)
    }


def signature(config: Config) -> str:
    """What says that this user has made a run that imports this code and sends these tokens.

    "" where there is neither, or no key to be had.
    """
    names = [*own_code(config), *tokens_sent(config).values()]
    key = _key() if names else b""
    return hmac.new(key, "\n".join(names).encode(), hashlib.sha256).hexdigest() if key else ""


def is_signed(config: Config, signed: str) -> bool:
    """Whether this user has made the run of that configuration."""
    return bool(signed) and hmac.compare_digest(signed, signature(config))


def refuse_foreign(
    folder: Path, config: Config, signed: str, *, is_trusted: bool, named: Collection[str] = ()
) -> list[str]:
    """The code that resuming the run will import; ConfigError where it was not made here and is not trusted.

    Args:
        config: that of the folder.
        named: keys that the user gives other values.
    """
    code, sent = own_code(config), {key: words for key, words in tokens_sent(config).items() if key not in named}
    if (code or sent) and not is_trusted and not is_signed(config, signed):
        does = f"import {' and '.join(code)}" if code else f"send {' and '.join(sent.values())}"
        step = "look at that code, then add --trust-code"
        if not code:
            step = f"name the address yourself, as {next(iter(sent))}=..., or look at it, then add --trust-code"
        raise ConfigError(f"resuming {str(folder)!r} would {does}, and that run was not made by this user here; {step}")
    return code


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
