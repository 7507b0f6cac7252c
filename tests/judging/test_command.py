"""`adascope-fast judge` as people run it: killed in the middle, started again, and told what it cannot do."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from arms_to_judge import arms, write_arm
from command_line import call, refused


@contextmanager
def _judging(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client, str]]:
    """The command as a process of its own, a client of it, and the address that it printed."""
    command = [sys.executable, "-m", "adascope_fast.cli", "judge", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        assert re.match(r"\d+ pairs of images by ", lines[0]), process.communicate()
        address = lines[1].split()[1]
        with httpx.Client(base_url=address.partition("/?")[0], follow_redirects=True) as client:
            assert client.get(address).status_code == 200
            yield process, client, address
    finally:
        process.kill()
        process.communicate()


def _vote(client: httpx.Client, pair: int, choice: str) -> None:
    body = {"rater": "jo", "pair": pair, "question": "fine_detail", "choice": choice}
    assert client.post("/api/pairs", json=body).status_code == 200


def test_a_kill_loses_no_vote_and_ctrl_c_ends_it_with_the_results(tmp_path: Path):
    paths, out = arms(tmp_path), tmp_path / "out"
    arguments = [*paths, "--out", out, "--questions", "fine_detail", "--name", "Jo É"]
    with _judging(*arguments) as (process, client, address):
        assert address.endswith("&as=Jo%20%C3%89")
        for pair in range(3):
            _vote(client, pair, "left")
        process.send_signal(signal.SIGKILL)
        process.wait()
    with _judging(*arguments) as (process, client, _):
        given = client.get("/api/pairs?rater=jo").json()["given"]
        assert given == {f"{pair}:fine_detail": "left" for pair in range(3)}
        for pair in range(3, 6):
            _vote(client, pair, "equal")
        process.send_signal(signal.SIGINT)
        shown, told = process.communicate()
    assert process.returncode == 130
    assert "interrupted; the same command goes on" in told
    assert "Traceback" not in told
    assert "jo: 6 answers" in shown
    assert "win rate by people" in shown
    assert json.loads((out / "results.json").read_text())["raters"]["jo"]["answers"] == 6
    again = call("judge", out, "--results")
    assert (again.code, again.out.splitlines()[-1]) == (0, str(out / "results.html"))
    other = arms(tmp_path / "other", shade_from=5)
    assert "must be on the same pairs" in refused("judge", *other, "--out", out)
    assert "must be on the same pairs" in refused("judge", *paths, "--out", out, "--seed", "1")


def test_what_it_cannot_do_is_one_line(tmp_path: Path):
    paths, out = arms(tmp_path), ["--out", tmp_path / "out"]
    assert "needs folders of images, got none" in refused("judge")
    assert "two folders of images or more" in refused("judge", paths[0], *out)
    assert "none in common" in refused("judge", paths[0], write_arm(tmp_path / "x", ["a cat"]), *out)
    line = refused("judge", *paths, *out, "--questions", "fine_detail,beauty")
    assert "structural_faithfulness, aesthetic_appeal" in line
    assert "'beauty'" in line
    assert "'none'" in refused("judge", *paths, *out, "--questions", ",")
    assert "a rater has a name" in refused("judge", *paths, *out, "--name", "model:x")
    assert "has pairs.json" in refused("judge", tmp_path, "--results")
    assert "one folder of judgments, got 2" in refused("judge", *paths, "--results")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"a free port, got 127.0.0.1:{port}" in refused("judge", *paths, *out, "--port", str(port))
    assert "an address of this machine" in refused("judge", *paths, *out, "--host", "192.0.2.1")


def test_a_damaged_image_is_told_before_anybody_looks(tmp_path: Path):
    paths = arms(tmp_path)
    (paths[1] / "0001_1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + os.urandom(50))
    assert "0001_1.png must be an image" in refused("judge", *paths, "--out", tmp_path / "out")


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from adascope_fast.serving import guard

    real: Any = guard.find_spec
    monkeypatch.setattr(guard, "find_spec", lambda name: None if name == "fastapi" else real(name))
    paths = arms(tmp_path)
    assert "pip install 'adascope-fast[serve]'" in refused("judge", *paths, "--out", tmp_path / "out")
