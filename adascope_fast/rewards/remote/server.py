"""A reward as a server: one call of it at a time, a bounded queue before it, and an answer to whatever is sent.

What the one who asks should do about a refusal is in its status: 4xx is to be told, 5xx to be tried again.

| status | what it was |
|---|---|
| 400, 413 | the request is malformed, or too large |
| 422 | the reward cannot judge these images or prompts, and says so itself |
| 500 | the reward raised |
| 503 | too many wait, or memory ran out for a single image; with Retry-After |
"""

import asyncio
import inspect
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from adascope_fast.serving.guard import NOT_INSTALLED
from adascope_fast.settings import one_line

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError:
    raise ValueError(NOT_INSTALLED) from None

MOST_WAITING = 32
MOST_IN_MEMORY = 4  # requests that have been read, or are being read
SECONDS_TO_SEND = 120.0
BUSY_SECONDS, MEMORY_SECONDS = 1, 10  # of Retry-After

logger = logging.getLogger(__name__)


class _MemoryError(Exception):
    """Memory ran out for a single image."""


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
    desk = _Desk(most_waiting)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
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

    @app.get("/health")
    async def _health() -> Response:
        return JSONResponse({"status": "ok", "waiting": desk.waiting})

    @app.get("/reward")
    async def _reward() -> Response:
        return JSONResponse(about.write())

    @app.post("/score")
    async def _score(request: Request) -> Response:
        return await desk.answer(request, wire.read, scores, reward)

    @app.post("/breakdown")
    async def _breakdown(request: Request) -> Response:
        return await desk.answer(request, wire.read, mean_parts, reward)

    @app.post("/check")
    async def _check(request: Request) -> Response:
        return await desk.answer(request, wire.read_json, refusal, reward)

    @app.exception_handler(HTTPException)
    async def _told(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        text = f"this server has GET /health, GET /reward, POST /score, /breakdown and /check, got {request.method} "
        return _line(status, one_line(f"{text}{request.url.path[:200]}; ask one of them"))

    return app


class _Desk:
    """Where requests wait. Some are read while another is judged; one is judged at a time, in a thread of its own."""

    def __init__(self, most_waiting: int) -> None:
        self.waiting, self._most = 0, most_waiting
        self._read, self._turn = asyncio.Semaphore(MOST_IN_MEMORY), asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "reward")

    async def answer(
        self, request: Request, read: Callable[[bytes], Any], work: Callable[[Any], dict[str, Any]], reward: Reward
    ) -> Response:
        """What `work` makes of the request as `read` reads it."""
        if self.waiting >= self._most:
            return _line(503, f"{self._most} requests wait for the reward already; come again", BUSY_SECONDS)
        self.waiting += 1
        try:
            async with self._read:
                return await self._answer(request, read, work, reward)
        except ClientDisconnect:
            return _line(400, "the request was not sent whole")
        finally:
            self.waiting -= 1

    async def _answer(
        self, request: Request, read: Callable[[bytes], Any], work: Callable[[Any], dict[str, Any]], reward: Reward
    ) -> Response:
        try:
            body = await asyncio.wait_for(request.body(), SECONDS_TO_SEND)
        except TimeoutError:
            return _line(408, f"a request must be sent within {SECONDS_TO_SEND:g} s; send fewer images at once")
        try:
            values = await asyncio.to_thread(read, body)
        except ValueError as error:
            return _line(400, str(error))
        del body
        async with self._turn:
            if await request.is_disconnected():  # it waits no longer, and has perhaps sent the same again
                return _line(400, "nobody waits for the answer")
            return await asyncio.get_running_loop().run_in_executor(self._thread, _worked, work, values, reward)


def _worked(work: Callable[[Any], dict[str, Any]], values: Any, reward: Reward) -> Response:
    try:
        return JSONResponse(work(values))
    except (_MemoryError, torch.OutOfMemoryError) as error:
        logger.warning("memory ran out: %s", one_line(str(error))[:200])
        return _line(503, f"memory ran out on the server ({str(error)[:200]}); come again", MEMORY_SECONDS)
    except BaseException as error:
        line = one_line(" ".join(str(error).split())) or type(error).__name__
        if _is_ours(reward) and isinstance(error, ValueError) and error.__cause__ is None:
            return _line(422, line)
        logger.warning("%s", line)
        return _line(500, line)


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
        raise _MemoryError(short)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    first, second = _halved(judge, batch[: count // 2]), _halved(judge, batch[count // 2 :])
    return {name: torch.cat([scores, second[name]]) for name, scores in first.items()}


def _is_ours(reward: Any) -> bool:
    own = inspect.unwrap(reward)
    return str(getattr(own, "__module__", "")).startswith("adascope_fast.")


def _line(status: int, text: str, retry_after: int | None = None) -> Response:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return PlainTextResponse(one_line(text), status, headers)
