"""`adascope-fast rollout-server`: draws the images of a training on another GPU, and stands in for another engine."""

from importlib.metadata import version
from typing import Annotated

import typer

from adascope_fast.commands.configuration import ConfigArguments, configured

VARIABLE = "ADASCOPE_FAST_ROLLOUT_TOKEN"


def rollout_server(
    arguments: ConfigArguments = None,
    host: Annotated[str, typer.Option(help="Address of this machine; 0.0.0.0 for all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8410,
    token_env: Annotated[
        str, typer.Option(metavar="VAR", help="Environment variable with the token; without it a new one is printed.")
    ] = VARIABLE,
    max_bytes: Annotated[int, typer.Option(min=2**16, max=2**36, help="Of a request: the trained weights.")] = 2**30,
    digest: Annotated[
        bool, typer.Option("--digest", help="Print the model's digest, which a server of your own must tell, and end.")
    ] = False,
) -> None:
    """Serve rollouts over HTTP."""
    config = configured(arguments, command="rollout-server").changed(["log.trackers=[]"])
    from adascope_fast import serving
    from adascope_fast.remote_rollout import server  # refused here where FastAPI is missing, before weights are loaded
    from adascope_fast.remote_rollout.client import WORDS
    from adascope_fast.serving.announced import announced, token_of
    from adascope_fast.training.building import drawing_of

    token, is_new = token_of(token_env)
    serving.Guard(None, token=token, most_bytes=max_bytes)  # refuses a token that is too short
    drawing, model = drawing_of(config)
    if digest:
        print(model)
        return
    package = f"adascope-fast {version('adascope-fast')}"
    serving.serve(
        server.application(drawing, model=model, package=package, most_bytes=max_bytes),
        host=host,
        port=port,
        token=token,
        most_bytes=max_bytes,
        ready=lambda url: announced(
            "rollout",
            url,
            token_env=token_env,
            usual=VARIABLE,
            new_token=token if is_new else "",
            serves=f"rollouts of {config.model.name}",
            sent=WORDS.sent,
        ),
        grace=60,
    )
