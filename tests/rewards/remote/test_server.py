"""A reward server as its clients have it: right scores for each, a status that says what to do, and it lives on."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch
from reward_servers import TOKEN, ask, serving
from torch import Tensor

from adascope_fast import rewards
from adascope_fast.config import Config
from adascope_fast.rewards.remote import wire
from adascope_fast.serving import client

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = [f"a prompt {number}" for number in range(6)]
CAPTION = "a large red circle on a grey background"


def lengths(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])


def built(*overrides: str) -> rewards.Reward:
    return rewards.load(Config.load(None, list(overrides)).reward)


def _raw(url: str, method: str, path: str, body: bytes = b"", token: str = TOKEN) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers of an answer."""
    with closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)) as connection:
        connection.request(method, path, body, {"Authorization": f"Bearer {token}"} if token else {})
        response = connection.getresponse()
        return response.status, response.read().decode(), dict(response.headers)


BODY = wire.write(IMAGES, PROMPTS, encoding="safetensors")


def test_four_clients_at_once_get_the_scores_of_their_own_images():
    calls: list[int] = []

    def slow(images: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(threading.get_ident())
        assert not busy.locked(), "two calls of the reward at once"
        with busy:
            time.sleep(0.02)
            return lengths(images, prompts)

    busy, found = threading.Lock(), {}
    with serving(slow) as url:

        def run(number: int) -> None:
            images, prompts = IMAGES * (number + 1) / 4, [prompt * (number + 1) for prompt in PROMPTS]
            scores = rewards.score(ask(url, batch=2), images, prompts)
            found[number] = torch.equal(scores, lengths(images, prompts))

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == dict.fromkeys(range(4), True)
    assert len(calls) == 12
    assert len(set(calls)) == 1


@pytest.mark.parametrize("name", ["jpeg_compressibility", "jpeg_incompressibility", "scene_attributes"])
def test_scores_are_those_of_the_reward_here(name: str):
    reward, prompts = built(f"reward.name={name}"), [CAPTION] * 6
    rounded = (IMAGES * 255).round() / 255
    with serving(reward) as url:
        assert torch.equal(rewards.score(ask(url), IMAGES, prompts), rewards.score(reward, IMAGES, prompts))
        assert torch.equal(
            rewards.score(ask(url, encoding="png"), IMAGES, prompts), rewards.score(reward, rounded, prompts)
        )


def test_a_mixed_reward_has_its_parts_weights_and_breakdown_there_and_its_prompts_are_checked():
    mixed = built("reward.name=mixed", "reward.parts={scene_attributes=1.0, jpeg_compressibility=-0.25}")
    prompts = [CAPTION] * 6
    with serving(mixed) as url:
        remote = ask(url, batch=4)
        assert rewards.has_parts(remote)
        assert remote.weights == {"scene_attributes": 1.0, "jpeg_compressibility": -0.25}
        want, want_parts = rewards.Scorer(mixed).with_parts(IMAGES, prompts)
        scores, parts = rewards.Scorer(rewards.given(remote)).with_parts(IMAGES, prompts)
        assert torch.equal(scores, want)
        assert {name: part.tolist() for name, part in parts.items()} == {
            name: part.tolist() for name, part in want_parts.items()
        }
        assert torch.equal(remote(IMAGES, prompts), want)
        assert rewards.breakdown(remote, IMAGES, prompts) == rewards.breakdown(mixed, IMAGES, prompts)
        rewards.check_prompts(remote, prompts * 300, "prompts.train")
        with pytest.raises(ValueError, match=r"1 others in prompts\.train, first 'a cat'"):
            rewards.check_prompts(remote, [*prompts * 300, "a cat"], "prompts.train")


def test_a_plain_reward_has_none_of_these():
    with serving(lengths) as url:
        remote = ask(url)
        assert not rewards.has_parts(remote)
        assert rewards.breakdown(remote, IMAGES, PROMPTS) == {}
        rewards.check_prompts(remote, ["anything"], "prompts.train")


def test_metadata_reach_a_reward_that_takes_them():
    def counted(images: Tensor, prompts: Sequence[str], metadata: list[dict[str, Any]]) -> list[float]:
        return [float(one.get("count", -1)) for one in metadata]

    metadata = {prompt: {"count": number} for number, prompt in enumerate(PROMPTS)}
    with serving(counted) as url:
        remote = ask(url, batch=4)
        assert rewards.takes_metadata(remote)
        assert remote(IMAGES, PROMPTS).tolist() == [-1.0] * 6
        rewards.reward.hand_metadata(remote, metadata)
        assert remote(IMAGES, PROMPTS).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        assert ask(url)(IMAGES, PROMPTS).tolist() == [-1.0] * 6, "what one client told is not another's"
    with serving(lengths) as url:
        assert not rewards.takes_metadata(ask(url))


def test_a_score_that_is_not_finite_stays_so():
    with serving(lambda images, prompts: [1.0, float("nan"), float("inf")]) as url:
        found = rewards.score_guesses(ask(url), IMAGES[:3], PROMPTS[:3])
        assert found.isnan().tolist() == [False, True, True]
        with pytest.raises(ValueError, match=r"'remote \(a reward\)' must be finite, got nan for 'a prompt 1'"):
            rewards.score(ask(url), IMAGES[:3], PROMPTS[:3])


def test_health_is_told_while_the_reward_works():
    started, release = threading.Event(), threading.Event()

    def held(images: Tensor, prompts: Sequence[str]) -> Tensor:
        started.set()
        release.wait(10)
        return lengths(images, prompts)

    with serving(held) as url:
        thread = threading.Thread(target=_raw, args=(url, "POST", "/score", BODY))
        thread.start()
        assert started.wait(5)
        assert json.loads(_raw(url, "GET", "/health")[1]) == {"status": "ok", "waiting": 1}
        release.set()
        thread.join()
        assert json.loads(_raw(url, "GET", "/health")[1])["waiting"] == 0


def test_one_too_many_is_told_to_come_again_and_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    started, release = threading.Event(), threading.Event()

    def held(images: Tensor, prompts: Sequence[str]) -> Tensor:
        started.set()
        release.wait(10)
        return lengths(images, prompts)

    with serving(held, most_waiting=1) as url:
        remote = ask(url, patience=10.0, timeout=10.0)
        thread = threading.Thread(target=_raw, args=(url, "POST", "/score", BODY))
        thread.start()
        assert started.wait(5)
        status, text, headers = _raw(url, "POST", "/score", BODY)
        assert (status, headers["retry-after"]) == (503, "1")
        assert text == "1 requests wait for the reward already; come again"
        threading.Timer(0.2, release.set).start()
        assert torch.equal(remote(IMAGES, PROMPTS), lengths(IMAGES, PROMPTS))
        thread.join()


def test_a_request_whose_sender_has_gone_is_not_judged():
    started, release, judged = threading.Event(), threading.Event(), []

    def held(images: Tensor, prompts: Sequence[str]) -> Tensor:
        judged.append(prompts[0])
        started.set()
        release.wait(10)
        return lengths(images, prompts)

    with serving(held) as url:
        first = threading.Thread(target=_raw, args=(url, "POST", "/score", BODY))
        first.start()
        assert started.wait(5)
        gone = http.client.HTTPConnection(url.removeprefix("http://"))
        gone.request("POST", "/score", BODY, {"Authorization": f"Bearer {TOKEN}"})
        while json.loads(_raw(url, "GET", "/health")[1])["waiting"] < 2:
            time.sleep(0.01)
        gone.close()
        time.sleep(0.1)
        release.set()
        first.join()
        while json.loads(_raw(url, "GET", "/health")[1])["waiting"]:
            time.sleep(0.01)
    assert len(judged) == 1


def test_a_batch_beyond_memory_is_judged_in_halves():
    sizes = []

    def hungry(images: Tensor, prompts: Sequence[str]) -> Tensor:
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lengths(images, prompts)

    with serving(hungry) as url:
        assert torch.equal(ask(url)(IMAGES, PROMPTS), lengths(IMAGES, PROMPTS))
    assert sizes == [6, 3, 1, 2, 3, 1, 2]


def _raises(error: BaseException) -> Callable[..., Any]:
    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise error

    return reward


@pytest.mark.parametrize(
    ("reward", "status", "said"),
    [
        (_raises(torch.OutOfMemoryError("CUDA out of memory")), 503, "memory ran out on the server"),
        (_raises(ZeroDivisionError("division by zero")), 500, "reward 'reward' raised ZeroDivisionError"),
        (_raises(SystemExit(3)), 500, "raised SystemExit"),
        (_raises(ValueError("two\nlines")), 500, "raised ValueError: two lines"),
        (lambda images, prompts: [1.0], 500, "must return one number an image"),
        (lambda images, prompts: "x", 500, "must return a tensor or numbers"),
    ],
)
def test_what_a_reward_raises_is_one_line(reward: Any, status: int, said: str):
    with serving(reward) as url:
        for _ in range(2):
            found, text, _ = _raw(url, "POST", "/score", BODY)
            assert found == status
            assert said in text
            assert text.isprintable()


def test_what_a_reward_of_ours_cannot_judge_is_the_senders_to_mend():
    with serving(built("reward.name=scene_attributes")) as url:
        status, text, _ = _raw(url, "POST", "/score", BODY)
        assert status == 422
        assert "a prompt 0" in text
        with pytest.raises(ValueError, match=r"^the reward server at http://127.* answered 422 \(.*a prompt 0"):
            rewards.score(ask(url), IMAGES, PROMPTS)


@pytest.mark.parametrize("token", ["", "0123456789abcdeF"])
def test_without_the_token_nothing_is_told(token: str):
    with serving(lengths) as url:
        for method, path in (("GET", "/health"), ("GET", "/reward"), ("POST", "/score"), ("GET", "/no")):
            assert _raw(url, method, path, BODY if method == "POST" else b"", token)[0] == 401


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/score", 405),
        ("POST", "/reward", 405),
        ("DELETE", "/reward", 405),
        ("POST", "/score/../../etc/passwd", 404),
    ],
)
def test_other_addresses_are_told_which_there_are(method: str, path: str, status: int):
    with serving(lengths) as url:
        found, text, _ = _raw(url, method, path)
    assert found == status
    assert text.startswith("this server has GET /health, GET /reward, POST /score")


def test_malformed_requests_are_400_and_the_server_lives_on():
    with serving(lengths) as url:
        for body in (b"", b"x", b"\x80\x04\x95" + bytes(50), BODY[:-7], BODY[:40], b"[" * 10**5, BODY[8:]):
            for path in ("/score", "/breakdown", "/check"):
                status, text, _ = _raw(url, "POST", path, body)
                assert status == 400, (body[:20], path)
                assert text.isprintable()
        assert torch.equal(ask(url)(IMAGES, PROMPTS), lengths(IMAGES, PROMPTS))


def test_a_request_that_is_too_large_is_413_and_a_client_sends_fewer_at_once():
    sizes = []

    def counted(images: Tensor, prompts: Sequence[str]) -> Tensor:
        sizes.append(len(images))
        return lengths(images, prompts)

    many, prompts = IMAGES.repeat(8, 1, 2, 2), PROMPTS * 8  # 12 KiB an image
    with serving(counted, most_bytes=2**16 + 2**17) as url:
        body = wire.write(many, prompts, encoding="safetensors")
        assert _raw(url, "POST", "/score", body)[0] == 413
        assert torch.equal(ask(url, batch=48)(many, prompts), lengths(many, prompts))
        assert max(sizes) == 10
        with pytest.raises(ValueError, match="takes requests of at most 196608 bytes, got one of 786"):
            ask(url)(torch.rand(1, 3, 256, 256), ["a"])


def test_a_breakdown_of_more_than_a_request_is_the_mean_by_images():
    class Bright:
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return lengths(images, prompts)

        def breakdown(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
            return {"red": images[:, 0].double().mean().item()}

    many, prompts = IMAGES.repeat(7, 1, 2, 2), PROMPTS * 7
    with serving(Bright(), most_bytes=2**16 + 2**17) as url:
        found = rewards.breakdown(ask(url), many, prompts)
    assert found == {"red": pytest.approx(many[:, 0].double().mean().item(), abs=1e-12)}
