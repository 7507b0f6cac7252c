"""Where the requests of a server wait: one is worked on at a time, with a bounded queue before it.

What the one who asks should do about a refusal is in its status: 4xx is to be told, 5xx to be tried again.

| status | what it was |
|---|---|
| 400, 413 | the request is malformed, or too large |
| 409 | what is asked for does not fit what the server holds |
| 422 | it cannot be done, and the line says why |
| 500 | the work raised |
| 503 | too many wait, or memory ran out; with Retry-After |
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

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


class ShortOfMemoryError(Exception):
    """Memory ran out for as little as can be worked on at once."""


class ConflictError(Exception):
    """What is asked for does not fit what the server holds."""


class Desk:
    """Some requests are read while another is worked on; one is worked on at a time, in a thread of its own.

    Args:
        what: what requests wait for, in words.
        fewer: what to do about a request that takes too long to send.
        is_told: whether an error of the work is a refusal that its line explains, and no fault.
        most_waiting: requests that wait; the next one is told to come again.
    """

    def __init__(
        self,
        what: str,
        fewer: str,
        is_told: Callable[[BaseException], bool],
        *,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self.waiting, self._most = 0, most_waiting
        self._what, self._fewer, self._is_told = what, fewer, is_told
        self._read, self._turn = asyncio.Semaphore(MOST_IN_MEMORY), asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, what)

    async def answer(self, request: Request, read: Callable[[bytes], Any], work: Callable[[Any], Any]) -> Response:
        """What `work` makes of the request as `read` reads it: values, which become JSON, or bytes."""
        if self.waiting >= self._most:
            return line(503, f"{self._most} requests wait for the {self._what} already; come again", BUSY_SECONDS)
        self.waiting += 1
        try:
            async with self._read:
                return await self._answer(request, read, work)
        except ClientDisconnect:
            return line(400, "the request was not sent whole")
        finally:
            self.waiting -= 1

    async def _answer(self, request: Request, read: Callable[[bytes], Any], work: Callable[[Any], Any]) -> Response:
        try:
            body = await asyncio.wait_for(request.body(), SECONDS_TO_SEND)
        except TimeoutError:
            return line(408, f"a request must be sent within {SECONDS_TO_SEND:g} s; {self._fewer}")
        try:
            values = await asyncio.to_thread(read, body)
        except ValueError as error:
            return line(400, str(error))
        del body
        async with self._turn:
            if await request.is_disconnected():  # it waits no longer, and has perhaps sent the same again
                return line(400, "nobody waits for the answer")
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._worked, work, values)

    def _worked(self, work: Callable[[Any], Any], values: Any) -> Response:
        try:
            found = work(values)
            if isinstance(found, bytes):
                return Response(found, media_type="application/octet-stream")
            return JSONResponse(found)
        except (ShortOfMemoryError, torch.OutOfMemoryError) as error:
            logger.warning("memory ran out: %s", one_line(str(error))[:200])
            return line(503, f"memory ran out on the server ({str(error)[:200]}); come again", MEMORY_SECONDS)
        except ConflictError as error:
            return line(409, str(error))
        except BaseException as error:
            text = one_line(" ".join(str(error).split())) or type(error).__name__
            if self._is_told(error):
                return line(422, text)
            logger.warning("%s", text)
            return line(500, text)


def application(desk: Desk, others: str) -> FastAPI:
    """An application that says how it is, and tells whoever asks for something else what there is.

    Args:
        others: the requests besides GET /health, in words.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def _health() -> Response:
        return JSONResponse({"status": "ok", "waiting": desk.waiting})

    @app.exception_handler(HTTPException)
    async def _told(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        text = f"this server has GET /health, {others}, got {request.method} {request.url.path[:200]}"
        return line(status, one_line(f"{text}; ask one of them"))

    return app


def line(status: int, text: str, retry_after: int | None = None) -> Response:
    """An answer of one line."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return PlainTextResponse(one_line(text), status, headers)
