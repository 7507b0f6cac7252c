"""The guard as a real server has it: what goes over a socket, and that the connection and the server live on."""

import http.client
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from fastapi import FastAPI, Request
from reward_servers import TOKEN, listening

MOST = 2**20
BEARER = f"Authorization: Bearer {TOKEN}\r\n"

app = FastAPI()


@app.get("/health")
async def _health() -> str:
    return "well"


@app.post("/count")
async def _count(request: Request) -> int:
    return len(await request.body())


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with listening(app, most_bytes=MOST) as url:
        yield url


@contextmanager
def _connected(url: str) -> Iterator[http.client.HTTPConnection]:
    with closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)) as connection:
        yield connection


def _said(url: str, request: bytes) -> bytes:
    """All that the server says to these bytes, until it ends the connection."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        said = b""
        while piece := connection.recv(2**16):
            said += piece
        return said


def _is_well(url: str) -> bool:
    with _connected(url) as connection:
        connection.request("GET", "/health", headers={"Authorization": f"Bearer {TOKEN}"})
        return connection.getresponse().read() == b'"well"'


def test_several_requests_go_over_one_connection(url: str):
    with _connected(url) as connection:
        for size in (0, 5, MOST):
            connection.request("POST", "/count", b"x" * size, {"Authorization": f"Bearer {TOKEN}"})
            assert connection.getresponse().read() == str(size).encode()
        assert connection.sock is not None


@pytest.mark.parametrize("size", [MOST + 1, 2 * MOST, 20 * MOST])
def test_a_body_that_is_too_large_is_answered_so_that_its_sender_can_read_it(url: str, size: int):
    with _connected(url) as connection:
        connection.request("POST", "/count", b"x" * size, {"Authorization": f"Bearer {TOKEN}"})
        response = connection.getresponse()
        assert response.status == 413
        assert response.read().startswith(f"a request has at most {MOST} bytes".encode())
    assert _is_well(url)


def test_a_body_that_does_not_say_its_size_is_counted(url: str):
    pieces = iter([b"x" * 2**16] * 17)
    with _connected(url) as connection:
        connection.request("POST", "/count", pieces, {"Authorization": f"Bearer {TOKEN}"}, encode_chunked=True)
        assert connection.getresponse().status == 413, "and not that an application failed, stopped in its middle"
    assert _is_well(url)


def test_a_large_body_without_the_token_is_told_so(url: str):
    with _connected(url) as connection:
        connection.request("POST", "/count", b"x" * MOST)
        assert connection.getresponse().status == 401
    assert _is_well(url)


def test_who_waits_to_be_told_to_go_on_is_refused_before(url: str):
    head = f"POST /count HTTP/1.1\r\nHost: a\r\nContent-Length: {MOST + 1}\r\nExpect: 100-continue\r\n{BEARER}\r\n"
    said = _said(url, head.encode())
    assert said.startswith(b"HTTP/1.1 413")
    assert b"100 Continue" not in said


def test_head_has_no_body(url: str):
    said = _said(url, b"HEAD /health HTTP/1.1\r\nHost: a\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 401")
    assert said.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",
        f"POST /count HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n{BEARER}\r\n12345".encode(),
        f"POST /count HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n{BEARER}\r\n12345".encode(),
    ],
    ids=["tls", "two lengths", "negative length"],
)
def test_what_is_no_request_is_400(url: str, request_: bytes):
    assert _said(url, request_).startswith(b"HTTP/1.1 400")
    assert _is_well(url)


def test_a_header_without_end_ends_the_connection(url: str):
    try:
        said = _said(url, b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 2**22)
    except (ConnectionResetError, BrokenPipeError):
        said = b""
    assert said.startswith(b"HTTP/1.1 400") or not said
    assert _is_well(url)


def test_it_serves_at_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with listening(app, host="::1") as url:
        assert _is_well(url)
