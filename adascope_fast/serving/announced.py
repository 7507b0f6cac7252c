"""What a server of the command line prints as it starts: what its clients need, to be pasted."""

import os
import socket
import sys

from adascope_fast.serving.guard import new_token


def token_of(variable: str) -> tuple[str, bool]:
    """(token, whether it is new): that of an environment variable, or one that nobody knows yet."""
    token = os.environ.get(variable, "").strip()
    return token or new_token(), not token


def announced(section: str, url: str, *, token_env: str, usual: str, new_token: str, serves: str, sent: str) -> None:
    """Print the lines for a client's shell and configuration.

    Args:
        section: of the client's configuration.
        usual: what `token_env` is unless it is named.
        new_token: "" where the client knows it.
        serves: what it serves, in words.
        sent: what is read on the way where nothing is encrypted.
    """
    anywhere = url.replace("//0.0.0.0:", f"//{socket.gethostname()}:").replace("//[::]:", f"//{socket.gethostname()}:")
    known = f"export {token_env}={new_token}" if new_token else f"# {token_env} has the token, there as here"
    lines = [known, f"[{section}]", 'name = "remote"', f'url = "{anywhere}"']
    if token_env != usual:
        lines.append(f'token_env = "{token_env}"')
    if not url.startswith(("http://127.", "http://[::1]", "http://localhost")):
        print(f"this is not encrypted: whoever is on the way reads {sent}", file=sys.stderr)
    for line in [*lines, f"# serves {serves}; Ctrl-C ends it"]:
        print(line, flush=True)
