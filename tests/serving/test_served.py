"""A server that really listens: refused requests hear why, and two of them share a browser."""

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from adascope_fast.serving import Aside, new_token


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


@pytest.fixture
def servers() -> Iterator[list[tuple[Aside, str]]]:
    made = []
    for _ in range(2):
        token = new_token()
        made.append((Aside(_echo, host="127.0.0.1", port=0, token=token, most_bytes=1000), token))
    yield made
    for server, _ in made:
        server.stop()


def test_two_servers_of_one_host_do_not_take_each_others_cookie(servers: list[tuple[Aside, str]]):
    with httpx.Client(follow_redirects=True) as browser:
        for server, token in servers:
            assert browser.get(f"{server.address}/page?token={token}").text == "/page"
        for server, _ in servers:
            assert browser.get(f"{server.address}/again").text == "/again"


@pytest.mark.parametrize("size", [1001, 500_000])
def test_who_sends_too_much_or_without_a_token_hears_so(servers: list[tuple[Aside, str]], size: int):
    server, token = servers[0]
    for told, status in ({"Authorization": f"Bearer {token}"}, 413), ({}, 401):
        for _ in range(5):
            assert httpx.post(server.address, content=b"x" * size, headers=told).status_code == status


def test_a_stopped_server_is_gone_and_its_port_free(servers: list[tuple[Aside, str]]):
    server, token = servers[0]
    server.stop()
    port = int(server.address.rpartition(":")[2])
    again = Aside(_echo, host="127.0.0.1", port=port, token=token, most_bytes=1000)
    assert again.address == server.address
    with pytest.raises(ValueError, match=f"a free port, got 127.0.0.1:{port} "):
        Aside(_echo, host="127.0.0.1", port=port, token=token, most_bytes=1000)
    again.stop()
    with pytest.raises(ValueError, match="an address of this machine"):
        Aside(_echo, host="no.such.host.invalid", port=0, token=token, most_bytes=1000)


def test_an_address_of_ipv6_has_brackets():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    server = Aside(_echo, host="::1", port=0, token=(token := new_token()), most_bytes=1000)
    assert server.address.startswith("http://[::1]:")
    assert httpx.get(f"{server.address}/x", headers={"Authorization": f"Bearer {token}"}).text == "/x"
    server.stop()
