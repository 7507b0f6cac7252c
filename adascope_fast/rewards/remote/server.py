"""A reward as a server: one call of it at a time, and an answer to whatever is sent.

It has the statuses of `serving.desk`: 422 where the reward cannot judge these images or prompts, and says so itself.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adascope_fast.rewards.remote import wire
from adascope_fast.rewards.remote.wire import Batch, Served
from adascope_fast.rewards.reward import (
    Reward,
    breakdown,
    check_prompts,
    hand_metadata,
    has_parts,
    parts,
    score_guesses,
    takes_metadata,
    weights,
)
from adascope_fast.serving.desk import MOST_WAITING, Desk, ShortOfMemoryError
from adascope_fast.serving.desk import application as new_application
from adascope_fast.serving.guard import NOT_INSTALLED
from adascope_fast.serving.wire import read_json
from adascope_fast.settings import one_line

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
except ImportError:
    raise ValueError(NOT_INSTALLED) from None


def served(reward: Reward, *, name: str, digest: str, package: str, most_bytes: int) -> Served:
    """What is said of a reward to those who ask.

    Args:
        digest: SHA-256 of what it is made of.
        package: the version of adascope-fast.
    """
    return Served(
        name=name,
        digest=digest,
        package=package,
        has_parts=has_parts(reward),
        weights=weights(reward) if has_parts(reward) else {},
        has_breakdown=hasattr(reward, "breakdown"),
        checks_prompts=hasattr(reward, "check_prompts"),
        takes_metadata=takes_metadata(reward),
        most_bytes=most_bytes,
    )


def application(reward: Reward, about: Served, *, device: str = "cpu", most_waiting: int = MOST_WAITING) -> FastAPI:
    """The server's application, to be asked behind a `Guard`.

    Args:
        device: where the images are put, and the reward follows them.
        most_waiting: requests that wait for the reward; the next one is told to come again.
    """
    desk = Desk(
        "reward", "send fewer images at once", lambda error: _is_refusal(reward, error), most_waiting=most_waiting
    )
    app = new_application(desk, "GET /reward, POST /score, /breakdown and /check")
    same = {"version": about.version, "digest": about.digest}

    def scores(body: Batch) -> dict[str, Any]:
        found = _halved(lambda part: _judged(reward, part, device), body)
        if "" in found:
            return same | {"scores": wire.write_scores(found[""])}
        return same | {"parts": {part: wire.write_scores(values) for part, values in found.items()}}

    def mean_parts(body: Batch) -> dict[str, Any]:
        hand_metadata(reward, dict(zip(body.prompts, body.metadata, strict=True)))
        return same | {"breakdown": breakdown(reward, body.images.to(device), body.prompts)}

    def refusal(values: dict[str, Any]) -> dict[str, Any]:
        try:
            named = wire.read_prompts(values.get("prompts"))
            hand_metadata(reward, dict(zip(named, wire.read_metadata(values, named), strict=True)))
            check_prompts(reward, named, str(values.get("where"))[:200])
        except ValueError as error:
            return same | {"refused": one_line(str(error))}
        return same | {"refused": None}

    @app.get("/reward")
    async def _reward() -> Response:
        return JSONResponse(about.write())

    @app.post("/score")
    async def _score(request: Request) -> Response:
        return await desk.answer(request, wire.read, scores)

    @app.post("/breakdown")
    async def _breakdown(request: Request) -> Response:
        return await desk.answer(request, wire.read, mean_parts)

    @app.post("/check")
    async def _check(request: Request) -> Response:
        return await desk.answer(request, read_json, refusal)

    return app


def _judged(reward: Reward, batch: Batch, device: str) -> dict[str, Tensor]:
    """Scores of each part by name, or of the reward itself under the name ""."""
    images = batch.images.to(device)
    hand_metadata(reward, dict(zip(batch.prompts, batch.metadata, strict=True)))
    if has_parts(reward):
        return {name: scores.cpu() for name, scores in parts(reward, images, batch.prompts).items()}
    return {"": score_guesses(reward, images, batch.prompts).cpu()}


def _halved(judge: Callable[[Batch], dict[str, Tensor]], batch: Batch) -> dict[str, Tensor]:
    """Scores of a batch, in halves where memory runs out for the whole."""
    count, short = len(batch.prompts), ""
    try:
        return judge(batch)
    except torch.OutOfMemoryError as error:
        short = str(error)  # told outside, where what the error holds on to is free again
    if count == 1:
        raise ShortOfMemoryError(short)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    first, second = _halved(judge, batch[: count // 2]), _halved(judge, batch[count // 2 :])
    return {name: torch.cat([scores, second[name]]) for name, scores in first.items()}


def _is_refusal(reward: Any, error: BaseException) -> bool:
    """Whether a reward of this package says what it cannot judge."""
    is_ours = str(getattr(inspect.unwrap(reward), "__module__", "")).startswith("adascope_fast.")
    return is_ours and isinstance(error, ValueError) and error.__cause__ is None
