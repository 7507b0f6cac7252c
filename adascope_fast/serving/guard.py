"""What every server here has in common: a token, a limit on what is sent, and loopback unless told otherwise.

A request has the token as `Authorization: Bearer TOKEN`. A page is opened with `?token=TOKEN`, which answers with a
cookie (HttpOnly, SameSite=Strict) and the address without it. A request whose Host is not the server's is refused, so
that no page elsewhere reaches a loopback server by a name of its own.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from http.cookies import SimpleCookie
from importlib.util import find_spec
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

COOKIE = "adascope_token"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
SHORTEST_TOKEN = 16
LINGER_S = 5.0
"""For which the body of a refused request is taken and dropped: who sends it reads no answer before its end."""


def new_token() -> str:
    """A token that nobody guesses: 32 characters of 24 random bytes."""
    return secrets.token_urlsafe(24)


class _TooLargeError(Exception):
    pass


class _HasSeen:
    """How much of a request's body has come, whether that was all, and whether its answer has begun."""

    num_bytes, is_whole, is_answered = 0, False, False


class Guard:
    """An ASGI application that only asks the one within what may be asked.

    Args:
        app: the application.
        token: what a request must have.
        most_bytes: the longest body of a request.
        hosts: names in a request's Host that are this server's, besides those of loopback; empty: any.
    """

    def __init__(self, app: Any, *, token: str, most_bytes: int, hosts: tuple[str, ...] = ()) -> None:
        if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError(
                f"a token must have at least {SHORTEST_TOKEN} printable ASCII characters without spaces, got "
                f"{len(token)}; use a longer one, or leave it out and take the one that is printed"
            )
        self.app, self.token, self.most_bytes, self.hosts = app, token, most_bytes, hosts
        # A browser sends a host's cookies to every port of it: two servers side by side must not share a name.
        self._cookie = f"{COOKIE}_{hashlib.sha256(token.encode()).hexdigest()[:8]}"

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        rest = None if headers.get("expect") else receive  # who expects to be told to go on has sent nothing yet
        query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        if not self._is_for_us(headers.get("host", "")):
            await _refuse(rest, send, 421, "this server has another name; ask it by the address that it printed")
        elif scope["method"] == "GET" and self._is_token(query.get("token", "")):
            await self._welcome(scope, query, send)
        elif not self._is_token(_bearer(headers)) and not self._is_token(_cookie(headers, self._cookie)):
            text = "the token is missing or wrong; send it as Authorization: Bearer TOKEN"
            await _refuse(rest, send, 401, text)
        elif _length(headers) > self.most_bytes:
            await self._refuse_size(rest, send)
        else:
            await self._ask(scope, receive, send)

    async def _ask(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        seen = _HasSeen()

        def is_over() -> bool:
            return seen.num_bytes > self.most_bytes and not seen.is_answered

        async def limited() -> Message:
            message = await receive()
            seen.num_bytes += len(message.get("body", b""))
            seen.is_whole = not message.get("more_body", False)
            if seen.num_bytes > self.most_bytes:
                raise _TooLargeError
            return message

        async def watched(message: Message) -> None:
            if not is_over():  # else the application answers that it failed, since a limit is no error that it knows
                seen.is_answered = True
                await send(message)

        try:
            await self.app(scope, limited, watched)
        except Exception:
            if seen.num_bytes <= self.most_bytes:
                raise
        if is_over():
            await self._refuse_size(None if seen.is_whole else receive, send)

    async def _refuse_size(self, receive: Receive | None, send: Send) -> None:
        await _refuse(receive, send, 413, f"a request has at most {self.most_bytes} bytes; send fewer images at once")

    async def _welcome(self, scope: MutableMapping[str, Any], query: dict[str, str], send: Send) -> None:
        """A cookie, and the same address without the token, which would stay in the browser's history."""
        rest = urlencode({name: value for name, value in query.items() if name != "token"})
        place = (quote(scope["path"].lstrip("/")) + (f"?{rest}" if rest else "")).encode()
        cookie = f"{self._cookie}={quote(self.token)}; Path=/; HttpOnly; SameSite=Strict".encode()
        headers = [(b"location", b"/" + place), (b"set-cookie", cookie), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())

    def _is_for_us(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        return not self.hosts or name.strip("[]").lower() in (*LOOPBACK, *self.hosts)


def serve(
    app: Any,
    *,
    host: str,
    port: int,
    token: str,
    most_bytes: int,
    ready: Callable[[str], None],
    grace: int = 3,
) -> None:
    """Serve `app` behind a `Guard` until the process is interrupted.

    Args:
        host: 127.0.0.1, or an address of this machine that others reach.
        port: 0 takes a free one.
        ready: told the address once requests are answered.
        grace: seconds for which requests in work are answered after an interruption; a second Ctrl-C ends at once.

    Raises:
        ValueError: the address is none of this machine, or is taken; FastAPI or uvicorn is not installed.
    """
    keys: dict[str, Any] = {"host": host, "port": port, "token": token, "most_bytes": most_bytes}
    server, listening, _ = _made(app, **keys, ready=ready, grace=grace)
    server.run(sockets=[listening])


class Aside:
    """The same in a thread of its own, from the first line on until `stop`; `address` is where it answers."""

    def __init__(self, app: Any, *, host: str, port: int, token: str, most_bytes: int) -> None:
        begun = threading.Event()
        keys: dict[str, Any] = {"host": host, "port": port, "token": token, "most_bytes": most_bytes}
        self._server, listening, self.address = _made(app, **keys, ready=lambda _: begun.set(), grace=3)
        self._thread = threading.Thread(target=self._server.run, args=([listening],), name="server", daemon=True)
        self._thread.start()
        while not begun.wait(0.1):
            if not self._thread.is_alive():
                raise OSError(f"the server at {self.address} could not be started; choose another port")

    def stop(self) -> None:
        """Answer what was asked, and end."""
        self._server.should_exit = True
        self._thread.join()


def _made(
    app: Any, *, host: str, port: int, token: str, most_bytes: int, ready: Callable[[str], None], grace: int
) -> tuple[Any, socket.socket, str]:
    """The server, what it listens at, and its address."""
    require()
    import uvicorn

    hosts = () if _is_any(host) else (host.lower(),)
    guard = Guard(app, token=token, most_bytes=most_bytes, hosts=hosts)
    listening = _listen(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    # A page's script may hold a request open; an answer is waited for, a connection without one is not.
    settings = uvicorn.Config(guard, log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=grace)
    return _Server(settings, lambda: ready(address)), listening, address


def require() -> None:
    """ValueError where what a server needs is not installed."""
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise ValueError(NOT_INSTALLED)


NOT_INSTALLED = "a server needs fastapi and uvicorn, which are not installed; pip install 'adascope-fast[serve]'"


def _Server(settings: Any, ready: Callable[[], None]) -> Any:  # noqa: N802 - a class that needs an optional package
    import uvicorn

    class Announced(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            ready()

    return Announced(settings)


def _listen(host: str, port: int) -> socket.socket:
    listening = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, UnicodeError) as error:
        if listening is not None:
            listening.close()
        raise ValueError(
            f"a server listens at an address of this machine and a free port, got {host}:{port} "
            f"({getattr(error, 'strerror', None) or error}); set --host and --port to others"
        ) from None
    return listening


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _bearer(headers: dict[str, str]) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _cookie(headers: dict[str, str], name: str) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", ""))
    except Exception:  # of another site's making
        return ""
    return unquote(found[name].value) if name in found else ""


def _length(headers: dict[str, str]) -> int:
    """What a request says of its body's length; what it does not say is counted as it comes."""
    told = headers.get("content-length", "")
    return int(told) if told.isdecimal() and len(told) < 20 else 0


async def _refuse(receive: Receive | None, send: Send, status: int, text: str) -> None:
    """Answer in one line and end the connection, once the rest of the body has come, if any is awaited."""
    if receive is not None:
        with suppress(TimeoutError):
            await asyncio.wait_for(_dropped(receive), LINGER_S)
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


async def _dropped(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass
