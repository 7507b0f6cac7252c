import asyncio
from typing import Any
from urllib.parse import quote

import pytest

from adascope_fast.serving import Guard, new_token

TOKEN = "0123456789abcdef"


def ask(method: str = "GET", path: str = "/", *, query: str = "", body: tuple[bytes, ...] = (b"",), **headers: str):
    """Status, headers and body that a guarded application answers; it echoes the number of bytes that it got."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        taken, more = 0, True
        while more:
            message = await receive()
            taken, more = taken + len(message["body"]), message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(taken).encode()})

    pieces = [
        {"type": "http.request", "body": piece, "more_body": place + 1 < len(body)} for place, piece in enumerate(body)
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return pieces.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    told = {"host": "127.0.0.1:80"} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in told.items()],
    }
    guard = Guard(app, token=TOKEN, most_bytes=10, hosts=("192.0.2.7",))
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


BEARER = f"Bearer {TOKEN}"


def test_a_request_with_the_token_is_answered():
    assert ask(authorization=BEARER, method="POST", body=(b"12345", b"678")) == (200, {}, b"8")


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer x", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer é"])
def test_a_request_without_it_is_not(authorization: str):
    status, _, told = ask(authorization=authorization)
    assert status == 401
    assert b"Authorization: Bearer" in told


def test_the_address_of_a_page_gives_a_cookie_and_then_serves_without_the_token():
    status, headers, _ = ask(path="/page", query=f"token={TOKEN}&as=jo")
    assert (status, headers[b"location"]) == (303, b"/page?as=jo")
    cookie = headers[b"set-cookie"].decode()
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert ask(cookie=cookie.split(";")[0])[0] == 200


def test_an_address_never_leads_to_another_site():
    assert ask(path="//elsewhere.example/x", query=f"token={TOKEN}")[1][b"location"] == b"/elsewhere.example/x"


def test_a_token_in_an_address_is_not_taken_for_what_changes_something():
    assert ask(method="POST", query=f"token={TOKEN}")[0] == 401


@pytest.mark.parametrize("told", [{"content_length": "11"}, {}, {"content_length": "x"}])
def test_a_request_has_a_size(told: dict[str, str]):
    status, _, text = ask(method="POST", body=(b"123456", b"78901"), authorization=BEARER, **told)
    assert status == 413
    assert b"at most 10 bytes" in text


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", ""])
def test_another_name_is_refused(host: str):
    assert ask(authorization=BEARER, host=host)[0] == 421


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "[::1]", "192.0.2.7:1"])
def test_its_own_names_are_not(host: str):
    assert ask(authorization=BEARER, host=host)[0] == 200


def test_a_short_token_is_refused():
    with pytest.raises(ValueError, match="at least 16"):
        Guard(None, token="short", most_bytes=1)
    assert len(new_token()) == 32


@pytest.mark.parametrize("path", ["/a b", "/é\r\nx: y", "/\\elsewhere.example", "/\u2028"])
def test_a_path_of_any_characters_is_spelled_as_an_address_has_it(path: str):
    place = ask(path=path, query=f"token={TOKEN}")[1][b"location"]
    assert place == ("/" + quote(path[1:])).encode()
