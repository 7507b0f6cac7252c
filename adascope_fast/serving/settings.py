"""What the sections that ask a server have in common: its address, where its token is, how long it is waited for.

Nothing here imports torch.
"""

import re
from typing import Annotated, ClassVar
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, field_validator

from adascope_fast.settings import Positive, PositiveOrZero, Section, Text, show


class Asking(Section):
    """A section whose component asks a server; each has an address, a variable and a time of its own as defaults."""

    section: ClassVar[str]
    """What it is called in a configuration."""

    url: Text
    token_env: Text
    timeout: Positive
    patience: PositiveOrZero = 600.0
    """Seconds for which a server that does not answer is waited for."""
    parallel: Annotated[int, Field(ge=1, le=64)] = 2
    """Requests at once: one is on its way while another is served."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        address(url, cls.section)
        return url

    @field_validator("token_env")
    @classmethod
    def _is_a_variable(cls, name: str) -> str:
        return variable(name, cls.section, cls.model_fields["token_env"].default)


def address(url: str, section: str) -> SplitResult:
    """A server's address in parts; ValueError unless it is http or https, a host, and perhaps a port and a path."""
    rule = f"{section}.url must be http://HOST:PORT or https://HOST:PORT"
    if "@" in url:
        raise ValueError(f"{rule}, got one with a name or password; leave it out, {section}.token_env names the token")
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, a bracket without its other
        raise ValueError(f"{rule}, got {show(url)}; correct it") from None
    if not is_right or not re.fullmatch(r"[!-~]+", url) or "?" in url or "#" in url:
        raise ValueError(f"{rule}, got {show(url)}; write it so, as the server printed it")
    return parts


def variable(name: str, section: str, usual: str) -> str:
    """The name of an environment variable; ValueError for another text, which is perhaps the token and is not shown."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(
            f"{section}.token_env must be the name of an environment variable, got another text, which is not shown: "
            f"it may be the token; export {usual}=... and leave {section}.token_env out"
        )
    return name
