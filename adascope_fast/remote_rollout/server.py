"""Rollouts as a server: it holds the weights that it was sent last, and draws with no others.

It has the statuses of `serving.desk`: 409 where it holds other weights than a rollout is asked for with.
"""

from typing import Any

from adascope_fast.remote_rollout import wire
from adascope_fast.remote_rollout.drawing import Drawing
from adascope_fast.remote_rollout.wire import Request as Asked
from adascope_fast.remote_rollout.wire import Served
from adascope_fast.serving.desk import MOST_WAITING, ConflictError, Desk
from adascope_fast.serving.desk import application as new_application
from adascope_fast.serving.guard import NOT_INSTALLED

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
except ImportError:
    raise ValueError(NOT_INSTALLED) from None


def application(
    drawing: Drawing, *, model: str, package: str, most_bytes: int, most_waiting: int = MOST_WAITING
) -> FastAPI:
    """The server's application, to be asked behind a `Guard`.

    Args:
        model: SHA-256 of what the model is made of.
        package: the version of adascope-fast.
        most_waiting: requests that wait; the next one is told to come again.
    """
    desk = Desk("model", "send less at once", _is_refusal, most_waiting=most_waiting)
    app = new_application(desk, "GET /rollout, POST /weights and /rollout")

    def described() -> dict[str, Any]:
        return Served(
            name=drawing.backbone.name,
            model=model,
            package=package,
            latent_shape=list(drawing.backbone.latent_shape),
            weights=drawing.weights,
            noise="seeds",
            has_x0=True,
            has_correlations=True,
            shares_start=True,
            kinds=list(wire.KINDS),
            most_bytes=most_bytes,
        ).write()

    def hold(given: tuple[dict[str, Any], str]) -> dict[str, Any]:
        drawing.take(*given)
        return {"version": wire.VERSION, "weights": drawing.weights}

    def draw(asked: Asked) -> bytes:
        if asked.weights != drawing.weights:
            held = f"those with the digest {drawing.weights:.12}" if drawing.weights else "none"
            raise ConflictError(
                f"this server draws with the weights that it holds, {held}, got a rollout for {asked.weights:.12}; "
                f"send these first, and let no other training use this server"
            )
        return drawing(asked).write(weights=drawing.weights, model=model)

    @app.get("/rollout")
    async def _described() -> Response:
        return JSONResponse(described())

    @app.post("/weights")
    async def _weights(request: Request) -> Response:
        return await desk.answer(request, wire.read_weights, hold)

    @app.post("/rollout")
    async def _rollout(request: Request) -> Response:
        return await desk.answer(request, Asked.read, draw)

    return app


def _is_refusal(error: BaseException) -> bool:
    """Whether this package says what cannot be done."""
    return isinstance(error, ValueError) and error.__cause__ is None
