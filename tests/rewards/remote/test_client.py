"""A client of a reward server: patient with what may pass, plain about what will not."""

import json
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_servers import TOKEN, answering, ask, http, serving
from torch import Tensor

from adascope_fast import rewards
from adascope_fast.config import Config, ConfigError
from adascope_fast.rewards.remote.client import Remote
from adascope_fast.serving import client
from adascope_fast.serving.client import Client, in_order
from adascope_fast.training import origin

IMAGES, PROMPTS = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), list("abcd")
DESCRIPTION = {
    "version": 1,
    "name": "told",
    "digest": "d",
    "package": "0.1.0",
    "has_parts": False,
    "weights": {},
    "has_breakdown": False,
    "checks_prompts": False,
    "takes_metadata": False,
    "most_bytes": 2**24,
}
SCORES = {"version": 1, "digest": "d", "scores": [1.0, 2.0, 3.0, 4.0]}


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


def bright(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


def _well(path: str, description: dict[str, Any] = DESCRIPTION, scores: Any = SCORES) -> bytes:
    return http(json.dumps(description if path == "/reward" else scores))


def _first(*answers: bytes | None, path: str = "/score") -> Callable[[str, int], bytes | None]:
    """These answers first, then right ones."""
    return lambda asked, before: answers[before] if asked == path and before < len(answers) else _well(asked)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (http("service unavailable", "503 Service Unavailable"), "answered 503 (service unavailable)"),
        (http("busy", "429 Too Many Requests", "Retry-After: 0"), ""),
        (http("<html>\n<h1>Bad Gateway</h1>", "502 Bad Gateway"), "answered 502 (<html> <h1>Bad Gateway</h1>)"),
        (http("slow", "504 Gateway Timeout"), "answered 504"),
        (http("late", "408 Request Timeout"), "answered 408"),
        (http("it raised", "500 Internal Server Error"), "answered 500 (it raised)"),
        (b"", "does not answer (Remote end closed connection without response)"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}", "does not answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{", "does not answer"),
        (None, "did not answer within 0.3 s (reward.timeout)"),
    ],
)
def test_what_may_pass_is_tried_again_and_told_once(answer: bytes | None, said: str, caplog: pytest.LogCaptureFixture):
    with answering(_first(answer, answer)) as url:
        remote = ask(url, timeout=0.3 if answer is None else 5.0)
        assert remote(IMAGES, PROMPTS).tolist() == [1.0, 2.0, 3.0, 4.0]
    lines = [record.getMessage() for record in caplog.records]
    if said and not (answer or b"").startswith(b"HTTP/1.1 503"):
        assert len(lines) == 2, lines
        assert lines[0].startswith(f"the reward server at {url} {said}")
        assert lines[0].endswith("asked again, 3 times at most" if "500" in said else "waited for, 2 s at most")
        assert lines[1].startswith(f"the reward server at {url} answers again, after ")
    else:
        assert not lines, "a server that is busy for a moment is nothing to tell"


def test_patience_has_an_end_and_a_line(caplog: pytest.LogCaptureFixture):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(
        ConnectionError, match=rf"^the reward server at {url} does not answer \(Connection refused\), and not"
    ) as caught:
        ask(url, patience=0.3)
    assert time.monotonic() - start < 2
    assert "within 0.3 s; start it again (adascope-fast reward-server), then go on with train --resume" in str(
        caught.value
    )
    assert caught.value.errno is None, "so that the command line takes it for what came on the way"
    assert len(caplog.records) == 1


def test_pauses_grow_and_a_servers_own_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.5)
    pauses: list[float] = []
    monkeypatch.setattr(client, "_is_stopped_within", lambda pause, stop, is_over: bool(pauses.append(pause)))
    busy = http("busy", "503 Service Unavailable", "Retry-After: 7")
    with answering(_first(*[http("", "502 Bad Gateway")] * 8, busy)) as url:
        assert ask(url, patience=600.0)(IMAGES, PROMPTS).tolist() == [1.0, 2.0, 3.0, 4.0]
    expected = [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert [round(pause / want, 1) for pause, want in zip(pauses, expected, strict=False)] != [1.0] * 8, "jitter"
    assert all(0.5 * want <= pause <= 1.5 * want for pause, want in zip(pauses, expected, strict=False))
    assert pauses[8] >= 7
    assert len(pauses) == 9


def test_what_raises_again_and_again_is_told_before_patience_ends():
    def broken(images: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(len(images))
        raise ZeroDivisionError("division by zero")

    calls: list[int] = []
    with (
        serving(broken) as url,
        pytest.raises(ValueError, match=r"answered 500 .*raised ZeroDivisionError.*; correct the reward there$"),
    ):
        ask(url, patience=600.0)(IMAGES, PROMPTS)
    assert calls == [4] * 4


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (http("no\nsuch   page", "404 Not Found"), r"answered 404 \(no such page\); check that reward.url is that of"),
        (http("captions", "422 Unprocessable"), r"answered 422 \(captions\); correct what it names"),
        (http("", "400 Bad Request"), r"answered 400 \(Bad Request\)"),
        (http("x" * 5000, "400 Bad Request"), r"answered 400 \(x{500}\)"),
        (http("no", "401 Unauthorized"), "set the environment variable ADASCOPE_FAST_REWARD_TOKEN to the token"),
        (http("no", "403 Forbidden"), "set the environment variable"),
        (http("no", "413 Too Large"), "lower reward.batch, or raise --max-bytes there and at its proxy"),
        (http("", "302 Found", "Location: http://else.where/"), "leads to http://else.where/; set reward.url"),
        (http("<html>Log in</html>"), "gave no answer of a reward server: not JSON .*; check that reward.url"),
        (http(""), "gave no answer of a reward server: not JSON"),
        (http(b"\xff\xfe"), "gave no answer of a reward server: not JSON"),
        (http("[1, 2]"), "not an object of JSON, got list"),
        (http("[" * 100_000), "nested too deep"),
        (http("{}"), "does not say of which reward it is"),
        (http(json.dumps(SCORES | {"scores": [1.0, 2.0]})), "has not 4 scores, got 2"),
        (http(json.dumps(SCORES | {"scores": [1.0] * 5})), "has not 4 scores, got 5"),
        (http(json.dumps(SCORES | {"scores": ["1.0"] * 4})), "not numbers within float32, got '1.0'"),
        (http(json.dumps(SCORES | {"scores": [float("nan")] * 4})), "NaN is no number of JSON"),
        (http(json.dumps(SCORES | {"scores": [1e39] * 4})), "not numbers within float32"),
        (http(json.dumps({"version": 1, "digest": "d"})), "has not 4 scores, got NoneType"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", r"does not speak HTTP \(BadStatusLine: SSH-2.0"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n{}", r"does not speak HTTP \(HTTPException"),
    ],
)
def test_what_will_not_pass_is_told_at_once_in_one_line(answer: bytes, said: str):
    with answering(_first(*[answer] * 3)) as url, pytest.raises(ValueError, match=said) as caught:
        ask(url)(IMAGES, PROMPTS)
    assert str(caught.value).startswith(f"the reward server at {url} ")
    assert str(caught.value).isprintable()


def test_parts_that_are_none_are_told():
    for parts in (None, {}, [1.0], {"a": [1.0]}, {"a": "b"}):
        described = DESCRIPTION | {"has_parts": True, "weights": {"a": 1.0}}
        scores = SCORES | {"parts": parts}
        with (
            answering(lambda path, before, d=described, s=scores: _well(path, d, s)) as url,
            pytest.raises(ValueError, match="gave no answer of a reward server"),
        ):
            ask(url).parts(IMAGES, PROMPTS)


def test_an_answer_without_end_is_left():
    endless = b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (2**26 + 2**17)
    with answering(_first(endless)) as url, pytest.raises(ValueError, match="an answer of more than 67108864 bytes"):
        ask(url, timeout=20.0)(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "speaks version 2 of the wire, this adascope-fast 1; install the same release"),
        ({"version": None}, "speaks version None"),
        ({"digest": 3}, "has not the fields"),
        ({"has_parts": "yes"}, "has not the fields"),
        ({"weights": {"a": "1"}}, "has not the fields"),
        ({"most_bytes": 2.5}, "has not the fields"),
    ],
)
def test_a_description_that_is_none_is_told(change: dict[str, Any], said: str):
    with (
        answering(lambda path, before: http(json.dumps(DESCRIPTION | change))) as url,
        pytest.raises(ValueError, match=said),
    ):
        ask(url)


def test_a_server_that_is_not_there_yet_is_waited_for(caplog: pytest.LogCaptureFixture):
    with answering(_first(b"", b"", path="/reward")) as url:
        assert ask(url).served.name == "told"
    assert len(caplog.records) == 2


def test_another_reward_behind_the_address_is_refused_in_the_middle_of_a_run():
    def answer(path: str, before: int) -> bytes:
        if path == "/reward":
            return http(json.dumps(DESCRIPTION if not before else DESCRIPTION | {"name": "another", "digest": "e"}))
        return http(json.dumps(SCORES if not before else SCORES | {"digest": "e"}))

    with answering(answer) as url:
        remote = ask(url)
        assert remote(IMAGES, PROMPTS).tolist() == SCORES["scores"]
        with pytest.raises(ValueError, match="serves another reward than before: another, and it was told; serve the"):
            remote(IMAGES, PROMPTS)


def test_images_are_not_sent_to_another_reward_after_an_outage():
    sent: list[str] = []

    def answer(path: str, before: int) -> bytes:
        sent.append(path)
        if path == "/reward":
            return http(json.dumps(DESCRIPTION if not before else DESCRIPTION | {"digest": "e"}))
        return b""

    with answering(answer) as url, pytest.raises(ValueError, match="serves another reward than before"):
        ask(url)(IMAGES, PROMPTS)
    assert sent == ["/reward", "/score", "/reward"]


def test_pieces_keep_their_order_and_the_first_error_ends_all():
    def slow(piece: int, stop: threading.Event) -> int:
        time.sleep(0.002 * (8 - piece))
        return piece * piece

    assert in_order(slow, range(8), 4) == [piece * piece for piece in range(8)]
    assert in_order(slow, [], 4) == []
    came: list[tuple[int, int]] = []
    in_order(slow, range(8), 4, arrived=lambda place, value: came.append((place, value)))
    assert came == [(piece, piece * piece) for piece in range(8)], "though the last ones are done first"
    begun: list[int] = []
    stopped: list[bool] = []

    def fails(piece: int, stop: threading.Event) -> int:
        begun.append(piece)
        if piece == 1:
            raise ValueError("the second")
        stopped.append(stop.wait(3))
        return piece

    start = time.monotonic()
    with pytest.raises(ValueError, match="the second"):
        in_order(fails, range(100), 3)
    assert time.monotonic() - start < 1
    while len(stopped) < 2:
        time.sleep(0.01)
    time.sleep(0.05)
    assert stopped == [True, True], "those under way"
    assert len(begun) == 3, "and no other is begun"


def test_a_batch_is_cut_and_several_parts_are_under_way_at_once():
    sizes: list[int] = []

    def counted(images: Tensor, prompts: Sequence[str]) -> Tensor:
        sizes.append(len(images))
        return bright(images, prompts)

    images = torch.rand(11, 3, 8, 8)
    with serving(counted) as url:
        assert torch.equal(ask(url, batch=3, parallel=4)(images, ["a"] * 11), bright(images, []))
    assert sorted(sizes) == [2, 3, 3, 3]


def test_random_state_is_left_alone():
    with answering(_first(b"", b"")) as url:
        random.seed(0)
        state, torch_state = random.getstate(), torch.get_rng_state()
        ask(url)(IMAGES, PROMPTS)
        assert random.getstate() == state
        assert torch.equal(torch.get_rng_state(), torch_state)


def test_the_token_comes_from_the_environment_and_is_written_nowhere(monkeypatch: pytest.MonkeyPatch):
    with serving(bright) as url:
        config = Config.load(None, ["reward.name=remote", f"reward.url={url}", "reward.token_env=A_TOKEN"])
        monkeypatch.delenv("A_TOKEN", raising=False)
        with pytest.raises(ValueError, match="the environment variable A_TOKEN has none; set it with export A_TOKEN="):
            rewards.load(config.reward)
        monkeypatch.setenv("A_TOKEN", "wrong" * 4)
        with pytest.raises(ValueError, match=r"answered 401 .*; set the environment variable A_TOKEN to the token"):
            rewards.load(config.reward)
        monkeypatch.setenv("A_TOKEN", TOKEN + "\n")
        assert torch.equal(rewards.score(rewards.load(config.reward), IMAGES, PROMPTS), bright(IMAGES, PROMPTS))
        assert TOKEN not in config.to_toml()
        monkeypatch.setenv("A_TOKEN", "with a\rline")
        with pytest.raises(ValueError, match="printable ASCII characters without spaces"):
            rewards.load(config.reward)


def test_a_token_in_the_clear_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Client, "exchange", lambda *_: json.dumps(DESCRIPTION).encode())
    for url in ("http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "https://far.example"):
        Remote(url, token=TOKEN)
    assert not caplog.records
    Remote("http://far.example:8400", token=TOKEN)
    assert "http://far.example:8400 is not encrypted" in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("reward.url=ftp://a/b", 'reward.url must be http://HOST:PORT or https://HOST:PORT, got "ftp://a/b"'),
        ("reward.url=127.0.0.1:8400", "reward.url must be http"),
        ("reward.url=http://", "reward.url must be http"),
        ("reward.url=http://a:99999", "reward.url must be http"),
        ("reward.url=http://[::1", "reward.url must be http"),
        ("reward.url=http://a b/", "reward.url must be http"),
        ("reward.url=http://a/?token=secret", "reward.url must be http"),
        ("reward.url=http://me:secret@a", "got one with a name or password; leave it out"),
        ("reward.token_env=abc-def", "must be the name of an environment variable, got another text"),
        ("reward.encoding=jpeg", "reward.encoding must be one of safetensors, png"),
        ("reward.timeout=0", "reward.timeout must be above 0"),
        ("reward.parallel=0", "reward.parallel must be at least 1"),
    ],
)
def test_keys_are_checked_before_anything_is_asked(override: str, said: str):
    with pytest.raises(ConfigError) as caught:
        Config.load(None, ["reward.name=remote", override])
    assert said in str(caught.value)
    assert "secret@" not in str(caught.value)


def test_a_remote_reward_is_a_part_of_a_mixed_one(monkeypatch: pytest.MonkeyPatch):
    with serving(bright) as url:
        monkeypatch.setenv("ADASCOPE_FAST_REWARD_TOKEN", TOKEN)
        parts = f'reward.parts={{remote={{weight=2.0, url="{url}"}}, jpeg_compressibility=1.0}}'
        mixed = rewards.load(Config.load(None, ["reward.name=mixed", parts]).reward)
        parts = mixed.parts(IMAGES, PROMPTS)  # type: ignore[attr-defined]
        assert torch.equal(parts["remote"], bright(IMAGES, PROMPTS))


def test_what_a_run_was_made_of_knows_the_reward_behind_the_address():
    with serving(bright, digest="one") as first, serving(bright, digest="one") as moved:
        before, after = (origin.of_object(ask(url), is_given=False) for url in (first, moved))
        given = origin.of_object(ask(first, token=TOKEN), is_given=True)
    assert before == after == origin.Part("a reward of a server", "one", False)
    assert (given.digest, given.is_given) == ("one", True)
    with serving(bright, digest="two") as url:
        changed = origin.of_object(ask(url), is_given=False)
        mixed = rewards.Mixed({"a": ask(url), "b": bright}, {"a": 1.0, "b": 1.0})
    assert origin.differences({"reward": before}, {"reward": changed}) == [
        "reward is called a reward of a server as before, but is not what it was"
    ]
    with serving(bright, digest="three") as url:
        other = rewards.Mixed({"a": ask(url), "b": bright}, {"a": 1.0, "b": 1.0})
    assert origin.of_object(mixed, is_given=False).digest != origin.of_object(other, is_given=False).digest


def test_a_call_that_is_interrupted_ends_at_once():
    with answering(_first(*[None] * 100)) as url:
        remote = ask(url, batch=1, parallel=2, timeout=60.0, patience=60.0)
        main = threading.get_ident()
        threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            remote(IMAGES, PROMPTS)
        assert time.monotonic() - start < 2


def test_a_thread_that_a_training_left_behind_stops_waiting():
    """On a GPU scores come from a thread of the engine, which a process waits for at its end."""
    ended: list[float] = []
    with answering(_first(*[None] * 100)) as url:
        for parallel in (1, 2):
            remote = ask(url, batch=6 // parallel, parallel=parallel, timeout=60.0, patience=60.0)
            remote.training_begins(Path("run"), {})

            def score(remote: Remote = remote) -> None:
                with suppress(Exception):
                    remote(IMAGES, PROMPTS)
                ended.append(time.monotonic())

            thread = threading.Thread(target=score)
            thread.start()
            time.sleep(0.3)
            assert thread.is_alive()
            start = time.monotonic()
            remote.training_ends()
            thread.join(5)
            assert not thread.is_alive()
            assert ended[-1] - start < 3
