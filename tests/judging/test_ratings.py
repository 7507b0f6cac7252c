"""Stars for what a training waits for: counted, kept, and shown in a real browser."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from arms_to_judge import TOKEN
from browser import opened

from adascope_fast.judging.pages import MOST_BYTES, rating
from adascope_fast.judging.ratings import LARGEST_GROUP, Ratings, Stopped, digest_of
from adascope_fast.serving import Aside

QUESTION = "aesthetic_appeal"
HOSTILE = "<img src=x onerror=alert(1)>"


def _images(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)


class Asking:
    """A batch that is waited for in a thread; `got` is what came of it."""

    def __init__(self, ratings: Ratings, images: np.ndarray, prompts: list[str]) -> None:
        self.ratings, self.got, self.error = ratings, None, None
        self.thread = threading.Thread(target=self._ask, args=(images, prompts))
        self.thread.start()

    def _ask(self, images: np.ndarray, prompts: list[str]) -> None:
        try:
            self.got = self.ratings.ask(images, prompts)
        except Stopped as error:
            self.error = error

    def done(self) -> Any:
        self.thread.join(10)
        assert not self.thread.is_alive()
        return self.got


def _until_asked(ratings: Ratings) -> None:
    while not ratings._groups:
        time.sleep(0.001)


@contextmanager
def _asking(folder: Path, images: np.ndarray, prompts: list[str], *, votes_per_image: int = 1) -> Iterator[Any]:
    ratings = Ratings(folder, question=QUESTION, votes_per_image=votes_per_image)
    asking = Asking(ratings, images, prompts)
    _until_asked(ratings)
    try:
        yield ratings, asking
    finally:
        ratings.stop()
        asking.thread.join(10)


def _next(ratings: Ratings, rater: str, back: int = 0) -> list[str]:
    return [one["image"] for one in ratings.group_for(rater, back).get("images", [])]


def test_each_image_has_the_mean_of_its_stars_in_the_order_of_the_batch(tmp_path: Path):
    images, prompts = _images(4), ["a", "a", "b", "b"]
    with _asking(tmp_path, images, prompts, votes_per_image=2) as (ratings, asking):
        for rater, stars in (("x", [1, 2, 5, None]), ("y", [3, 2, 4, 3])):
            for image, prompt, given in zip(images, prompts, stars, strict=True):
                assert ratings.rate(rater, digest_of(image, prompt), given, 1.0, 2.0)
        assert asking.done() == [2.0, 2.0, 4.5, 3.0]
        assert ratings.num_skipped == 0
        assert not ratings.rate("x", digest_of(images[0], "a"), 1, 0.0, 0.0), "nobody waits for it any more"
        assert ratings.png(digest_of(images[0], "a")) is None


def test_a_prompt_is_shown_as_a_group_of_at_most_eight(tmp_path: Path):
    images = _images(13)
    with _asking(tmp_path, images, ["a"] * 10 + ["b"] * 3) as (ratings, _):
        seen = [_next(ratings, rater) for rater in ("x", "y", "z")]
        assert [len(group) for group in seen] == [LARGEST_GROUP, 2, 3]
        assert len(set().union(*seen)) == 13, "raters at once are shown different groups"
        assert _next(ratings, "x") == seen[0], "and the same again until they have rated it"


def test_what_was_said_before_a_kill_counts(tmp_path: Path):
    images, prompts = _images(3), ["a"] * 3
    with _asking(tmp_path, images, prompts) as (ratings, asking):
        ratings.rate("x", digest_of(images[1], "a"), 4, 0.0, 0.0)
    assert isinstance(asking.error, Stopped)
    with _asking(tmp_path, images, prompts) as (ratings, asking):
        assert _next(ratings, "x") == [digest_of(images[0], "a"), digest_of(images[2], "a")]
        for place, stars in ((0, 1), (2, None)):
            ratings.rate("x", digest_of(images[place], "a"), stars, 0.0, 0.0)
        assert asking.done() == [1, 4, None]
    again = Ratings(tmp_path, question=QUESTION, votes_per_image=1)
    assert again.ask(images, prompts) == [1, 4, None]
    assert again.num_skipped == 1
    other = Ratings(tmp_path, question="fine_detail", votes_per_image=1)
    asking = Asking(other, images, prompts)
    _until_asked(other)
    other.stop()
    assert asking.done() is None, "stars for another question are other stars"


def test_an_image_that_comes_twice_is_rated_once(tmp_path: Path):
    images = _images(1).repeat(3, 0)
    with _asking(tmp_path, images, ["a", "a", "b"]) as (ratings, asking):
        assert len(_next(ratings, "x")) == 1
        ratings.rate("x", digest_of(images[0], "a"), 2, 0.0, 0.0)
        ratings.rate("x", digest_of(images[0], "b"), 5, 0.0, 0.0)
        assert asking.done() == [2, 2, 5]


def test_going_back_changes_what_was_said(tmp_path: Path):
    images = _images(3)
    with _asking(tmp_path, images, ["a", "b", "c"]) as (ratings, asking):
        for stars in (1, 2):
            (image,) = _next(ratings, "x")
            ratings.rate("x", image, stars, 0.0, 0.0)
        told = ratings.group_for("x", 2)
        assert told["images"] == [{"image": digest_of(images[0], "a"), "given": 1}]
        assert not told["can_go_back"]
        ratings.rate("x", told["images"][0]["image"], 5, 0.0, 0.0)
        ratings.rate("x", digest_of(images[2], "c"), 3, 0.0, 0.0)
        assert asking.done() == [5, 2, 3]


@contextmanager
def _page(ratings: Ratings) -> Iterator[tuple[str, httpx.Client]]:
    server = Aside(rating(ratings), host="127.0.0.1", port=0, token=TOKEN, most_bytes=MOST_BYTES)
    try:
        with httpx.Client(base_url=server.address, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            yield f"{server.address}/?token={TOKEN}", client
    finally:
        server.stop()


def test_requests_that_cannot_be_meant_are_refused(tmp_path: Path):
    images = _images(1)
    digest = digest_of(images[0], "a")
    with _asking(tmp_path, images, ["a"]) as (ratings, asking), _page(ratings) as (_, client):
        whole = {"rater": "x", "image": digest, "stars": 3}
        for change in (
            {"stars": 0},
            {"stars": 6},
            {"stars": 2.5},
            {"image": "../x"},
            {"image": "0" * 32},
            {"rater": ""},
        ):
            assert client.post("/api/ratings", json=whole | change).is_client_error, change
        assert client.get("/api/ratings?rater=model:x").status_code == 400
        assert client.get("/image/nothing").status_code == 404
        assert client.get(f"/image/{digest}").headers["content-type"] == "image/png"
        assert client.post("/api/ratings", json=whole).json() == {"saved": 3}
        assert asking.done() == [3]


def test_people_rate_with_keys_and_clicks_and_wait_for_the_next(tmp_path: Path):
    ratings = Ratings(tmp_path, question=QUESTION, votes_per_image=1)
    with _page(ratings) as (address, _), opened(viewport={"width": 360, "height": 640}) as page:
        page.goto(f"{address}&as=jo")
        page.wait_for_selector("text=Waiting for the next images")
        ratings.stage("iteration 3 of 20")
        asking = Asking(ratings, _images(5), [HOSTILE] * 3 + ["b"] * 2)
        page.wait_for_selector("[data-ready]")
        assert page.inner_text("#count") == "iteration 3 of 20: 5 to go"
        assert page.evaluate("document.querySelector('.prompt').lastChild.data") == HOSTILE
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        sizes = page.evaluate("[...document.querySelectorAll('button')].map((one) => one.getBoundingClientRect())")
        assert all(size["height"] >= 44 and size["width"] >= 44 for size in sizes)
        for number, key in enumerate("51s", 1):
            page.keyboard.press(key)
            page.wait_for_function(
                "left => document.getElementById('count').textContent.includes(left)", arg=f"{5 - number} to"
            )
        page.wait_for_selector("[data-ready]")
        page.keyboard.press("Backspace")
        page.wait_for_selector("#keep")
        page.wait_for_selector("[data-ready]")
        assert page.get_attribute("[aria-label='Image 1: 5 of 5 stars']", "aria-pressed") == "true"
        page.click("[aria-label='Image 1: 4 of 5 stars']")
        page.wait_for_selector("#keep", state="detached")
        page.wait_for_selector("[data-ready]")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("2")
        page.wait_for_function("() => document.getElementById('count').textContent.includes('1 to')")
        page.click("[aria-label='Image 1: 3 of 5 stars']")
        assert asking.done() == [4, 1, None, 3, 2]
        page.wait_for_selector("text=Waiting for the next images")
        asking = Asking(ratings, _images(1, seed=1), ["next"])
        page.wait_for_selector("[data-ready]")
        page.keyboard.press("1")
        assert asking.done() == [1]


@pytest.mark.parametrize("line", ['{"image": "a", "question": "aesthetic_appeal", "rater": "x", "stars": 9}', "{"])
def test_votes_that_are_none_are_left_out(tmp_path: Path, line: str):
    (tmp_path / "votes.jsonl").write_text(line + "\n")
    assert not Ratings(tmp_path, question=QUESTION, votes_per_image=1)._by_image
