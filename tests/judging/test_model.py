"""Pairs judged by a model behind an endpoint, of which there is a small false one here."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from arms_to_judge import arms, comparison_of
from command_line import call, refused

from adascope_fast.images import Image
from adascope_fast.judging import QUESTIONS, Comparison, VisionModel, ask_model
from adascope_fast.judging.model import answers_in
from adascope_fast.judging.pairs import Side
from adascope_fast.judging.results import results_of, votes_in

KEYS = [question.key for question in QUESTIONS]
Reply = tuple[int, dict[str, str], Any]


@contextmanager
def endpoint(reply: Callable[[dict[str, Any]], Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The base address of a server, and what it was asked; `reply` gives a text, or (status, headers, body)."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"path": self.path, "authorization": self.headers.get("Authorization")})
            told = reply(body)
            if isinstance(told, str):
                told = (200, {}, {"choices": [{"message": {"content": told}}]})
            status, headers, content = told
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def everywhere(answer: str) -> str:
    return json.dumps(dict.fromkeys(KEYS, answer))


def _shown(body: dict[str, Any]) -> list[np.ndarray]:
    """The two images of a request."""
    addresses = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    contents = [base64.b64decode(address.removeprefix("data:image/png;base64,")) for address in addresses]
    return [np.asarray(PIL.Image.open(io.BytesIO(content))) for content in contents]


def redder(body: dict[str, Any]) -> str:
    """What a model says that prefers red."""
    first, second = (image[..., 0].mean() for image in _shown(body))
    return f"Of course! {everywhere('first' if first > second else 'second')} Anything else?"


def judged(url: str, comparison: Comparison, out: Path) -> list[dict[str, Any]]:
    votes = votes_in(out)
    ask_model(VisionModel(url, "eye", "secret key", pause_s=0.01), comparison, QUESTIONS, votes)
    return list(votes_in(out))


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return comparison_of(arms(tmp_path), num=3)


def test_a_model_that_looks_is_believed_in_either_order(comparison: Comparison, tmp_path: Path):
    with endpoint(redder) as (url, asked):
        votes = judged(url, comparison, tmp_path / "out")
    assert len(votes) == 3 * 5

    def red(side: Side) -> float:
        return Image(Path(side.path), None).pixels()[..., 0].mean()

    for vote in votes:
        pair = comparison.pairs[vote["pair"]]
        assert vote["choice"] == ("left" if red(pair.left) > red(pair.right) else "right")
        assert vote["rater"] == "model:eye"
    assert len(asked) == 3 * 2
    assert {(one["path"], one["authorization"], one["model"], one["temperature"]) for one in asked} == {
        ("/v1/chat/completions", "Bearer secret key", "eye", 0)
    }
    one, other = _shown(asked[0]), _shown(asked[1])
    assert (one[0] == other[1]).all()
    assert (one[1] == other[0]).all()
    text = asked[0]["messages"][0]["content"][0]["text"]
    assert comparison.pairs[0].prompt in text
    assert "quokka" not in json.dumps(asked)


def test_one_that_favours_what_comes_first_has_no_say(comparison: Comparison, tmp_path: Path):
    with endpoint(lambda body: everywhere("first")) as (url, _):
        votes = judged(url, comparison, tmp_path / "out")
    assert {vote["choice"] for vote in votes} == {"equal"}
    assert results_of(comparison, votes)["position"]["model:eye"] == {"consistent": 0.0, "first": 1.0}


@pytest.mark.parametrize(
    "garbage",
    ["", "I like the first.", "{}", '{"fine_detail": "first"}', everywhere("left"), "[" * 9999, '{"a"', None, 7, [{}]],
)
def test_garbage_is_asked_for_again_then_fails_and_is_never_guessed(
    comparison: Comparison, tmp_path: Path, garbage: Any
):
    with endpoint(lambda body: (200, {}, {"choices": [{"message": {"content": garbage}}]})) as (url, asked):
        votes = judged(url, comparison, tmp_path / "out")
        assert {vote["choice"] for vote in votes} == {"failed"}
        assert len(asked) == 3 * 2 * 3
        assert "Answer with that object alone" in asked[1]["messages"][-1]["content"]
    assert results_of(comparison, votes)["raters"]["model:eye"] == {
        "answers": 0,
        "skipped": 0,
        "failed": 15,
        "median_seconds": pytest.approx(0, abs=60),
    }
    with endpoint(redder) as (url, asked):  # what failed is asked again, and nothing else ever is
        votes = judged(url, comparison, tmp_path / "out")
        assert {vote["choice"] for vote in votes} <= {"left", "right"}
        assert len(asked) == 6
        judged(url, comparison, tmp_path / "out")
        assert len(asked) == 6


def test_a_body_that_is_no_answer_at_all_is_garbage(comparison: Comparison, tmp_path: Path):
    with endpoint(lambda body: (200, {}, b"\xff<html>")) as (url, _):
        assert {vote["choice"] for vote in judged(url, comparison, tmp_path / "out")} == {"failed"}


def test_a_busy_server_is_asked_again(comparison: Comparison, tmp_path: Path):
    troubles: list[Reply] = [(503, {}, b""), (429, {"Retry-After": "0"}, b"slow down"), (500, {}, b"")]
    with endpoint(lambda body: troubles.pop() if troubles else redder(body)) as (url, asked):
        assert "failed" not in {vote["choice"] for vote in judged(url, comparison, tmp_path / "out")}
    assert len(asked) == 6 + 3


def test_one_that_stays_away_ends_it_and_what_was_said_is_kept(comparison: Comparison, tmp_path: Path):
    count = iter(range(100))
    with (
        endpoint(lambda body: redder(body) if next(count) < 2 else (503, {}, b"gone <b>home</b>")) as (url, _),
        pytest.raises(OSError, match=r"did not answer in 6 tries \(503 gone <b>home</b>\); what was answered"),
    ):
        judged(url, comparison, tmp_path / "out")
    assert len(list(votes_in(tmp_path / "out"))) == 5
    with pytest.raises(OSError, match="did not answer"):
        judged("http://127.0.0.1:9", comparison, tmp_path / "out")


@pytest.mark.parametrize("status", [301, 400, 401, 404])
def test_a_refusal_ends_it_at_once_and_no_redirect_gets_the_key(comparison: Comparison, tmp_path: Path, status: int):
    with (
        endpoint(redder) as (elsewhere, lured),
        endpoint(lambda body: (status, {"Location": elsewhere}, b"no images here")) as (url, asked),
    ):
        with pytest.raises(ValueError, match=f"got {status} no images here; check --model"):
            judged(url, comparison, tmp_path / "out")
        assert (len(asked), len(lured)) == (1, 0)


def test_answers_are_read_strictly():
    assert answers_in('x {"a": " First ", "b": "equal", "c": 1} y', ["a", "b"]) == {"a": "first", "b": "equal"}
    for text in ('{"a": "first"}', '{"a": "first", "b": null}', '{"a": "first", "b": "both"}', "{{}}", "}{"):
        assert answers_in(text, ["a", "b"]) is None


def test_the_command_asks_a_model_and_prints_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths, out = arms(tmp_path), tmp_path / "out"
    monkeypatch.setenv("EYE_KEY", "a key")
    with endpoint(redder) as (url, asked):
        ways = ["--model", url, "--model-name", "eye", "--key-env", "EYE_KEY", "--questions", "fine_detail"]
        outcome = call("judge", *paths, "--out", out, "--num", "4", *ways)
        assert (outcome.code, asked[0]["authorization"]) == (0, "Bearer a key")
    assert "4 pairs of images by quokka and zebra, 1 questions on each" in outcome.out
    assert "4 answers recorded, 0 of them failed" in outcome.out
    assert "win rate by model:eye" in outcome.out
    assert (out / "results.html").exists()
    assert "a key" not in "".join(path.read_text() for path in out.iterdir())


def test_half_a_model_is_refused(tmp_path: Path):
    paths = arms(tmp_path)
    assert "belong together" in refused("judge", *paths, "--model", "http://x")
    assert "--key-env is for --model" in refused("judge", *paths, "--key-env", "X")
    both = ["--model", "http://127.0.0.1:9", "--model-name", "eye"]
    assert "'NOT_SET' is not set" in refused("judge", *paths, *both, "--key-env", "NOT_SET")
    both[1] = "file:///etc/passwd"
    assert "begins with http:// or https://" in refused("judge", *paths, *both, "--out", tmp_path / "out")
