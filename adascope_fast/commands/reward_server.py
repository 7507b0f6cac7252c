"""`adascope-fast reward-server`: a reward for trainings on other machines, or in other environments."""

import hashlib
import json
from importlib.metadata import version
from typing import Annotated, Any

import typer

from adascope_fast.config import Config, ConfigError

VARIABLE = "ADASCOPE_FAST_REWARD_TOKEN"
PLACEMENT = ("device", "batch")
"""Keys of a reward that change no score."""


def reward_server(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME|module:object [reward.key=value]...", help="What reward.name would be, then its keys."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address of this machine; 0.0.0.0 for all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8400,
    token_env: Annotated[
        str, typer.Option(metavar="VAR", help="Environment variable with the token; without it a new one is printed.")
    ] = VARIABLE,
    max_bytes: Annotated[int, typer.Option(min=2**16, max=2**32, help="Of a request.")] = 2**28,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N: where the images are put.")] = "auto",
) -> None:
    """Serve a reward over HTTP."""
    section = _section(arguments or [])
    from adascope_fast import rewards, serving
    from adascope_fast.rewards.remote import server  # refused here where FastAPI is missing, before weights are loaded
    from adascope_fast.rewards.remote.client import WORDS
    from adascope_fast.serving.announced import announced, token_of
    from adascope_fast.training import origin

    place = _device(device)
    token, is_new = token_of(token_env)
    serving.Guard(None, token=token, most_bytes=max_bytes)  # refuses a token that is too short
    reward = rewards.load(section)
    part = origin.of_object(reward, is_given=False)
    keys = {key: value for key, value in section.model_dump().items() if key not in PLACEMENT}
    made_of = json.dumps([part.name, part.digest, keys], sort_keys=True, default=str)
    about = server.served(
        reward,
        name=section.name,
        digest=hashlib.sha256(made_of.encode()).hexdigest(),
        package=version("adascope-fast"),
        most_bytes=max_bytes,
    )

    serving.serve(
        server.application(reward, about, device=place),
        host=host,
        port=port,
        token=token,
        most_bytes=max_bytes,
        ready=lambda url: announced(
            "reward",
            url,
            token_env=token_env,
            usual=VARIABLE,
            new_token=token if is_new else "",
            serves=section.name,
            sent=WORDS.sent,
        ),
        grace=60,
    )


def _section(arguments: list[str]) -> Any:
    """The reward's section as the arguments describe it; ConfigError where they do not."""
    if not arguments or "=" in arguments[0]:
        raise ConfigError(
            f"reward-server needs a reward first, got {repr(arguments[0]) if arguments else 'nothing'}; for example: "
            f"adascope-fast reward-server clip_similarity reward.clip=scenes-clip"
        )
    for override in arguments[1:]:
        if not override.strip().startswith("reward.") or override.split("=")[0].strip() == "reward.name":
            raise ConfigError(
                f"reward-server takes the keys of its reward, reward.key=value, got {override!r:.80}; remove it"
            )
    return Config.load(None, [f"reward.name={json.dumps(arguments[0])}", *arguments[1:]]).reward


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        got = f"{name!r:.40}" + (", and this torch finds no GPU" if kind == "cuda" else "")
        raise ConfigError(f"--device is auto, cpu, cuda or cuda:N, got {got}; choose another")
    return name
