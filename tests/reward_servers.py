"""Reward servers in a thread of this process, and servers that answer what they are told to."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

from adascope_fast.rewards import Remote, given
from adascope_fast.rewards.remote.server import application, served
from adascope_fast.serving import Guard

TOKEN = "0123456789abcdef"


@contextmanager
def listening(
    app: Any, *, host: str = "127.0.0.1", port: int = 0, most_bytes: int = 2**24, token: str = TOKEN
) -> Iterator[str]:
    """The address of an application behind a `Guard`, in uvicorn."""
    guard = Guard(app, token=token, most_bytes=most_bytes)
    server = uvicorn.Server(
        uvicorn.Config(guard, host=host, port=port, lifespan="off", ws="none", log_level="critical")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def serving(
    reward: Any, *, digest: str = "first", most_bytes: int = 2**24, most_waiting: int = 32, token: str = TOKEN
) -> Iterator[str]:
    """The address of a server of `reward`."""
    reward = given(reward)
    about = served(reward, name="a reward", digest=digest, package="0.1.0", most_bytes=most_bytes)
    app = application(reward, about, most_waiting=most_waiting)
    with listening(app, most_bytes=most_bytes, token=token) as url:
        yield url


def ask(url: str, **keys: Any) -> Remote:
    """A client of the server, which waits for two seconds at most."""
    return Remote(url, **{"token": TOKEN, "patience": 2.0, "timeout": 2.0} | keys)


@contextmanager
def answering(answer: Callable[[str, int], bytes | None]) -> Iterator[str]:
    """The address of a server that answers each request with raw bytes.

    Args:
        answer: of the path of a request and the number of requests for it before; None leaves it without one.
    """
    counts: dict[str, int] = {}
    stopped = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def handle(connection: socket.socket) -> None:
        with connection:
            said = b""
            while b"\r\n\r\n" not in said:
                if not (piece := connection.recv(2**16)):
                    return
                said += piece
            head, _, body = said.partition(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            told = dict(line.lower().split(": ", 1) for line in lines[1:])
            left = int(told.get("content-length", "0")) - len(body)
            while left > 0 and (piece := connection.recv(2**16)):
                left -= len(piece)
            path = lines[0].split()[1]
            counts[path] = counts.get(path, -1) + 1
            found = answer(path, counts[path])
            if found is None:
                stopped.wait(5)
            else:
                connection.sendall(found)

    def quietly(connection: socket.socket) -> None:
        with suppress(OSError):  # whoever asked has gone
            handle(connection)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=quietly, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stopped.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def http(body: bytes | str, status: str = "200 OK", *headers: str) -> bytes:
    """An answer with status, headers and body."""
    body = body.encode() if isinstance(body, str) else body
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body
