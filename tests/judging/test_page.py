"""The page that compares, in a real browser, and what it is told: everything but whose an image is."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from arms_to_judge import PROMPTS, TOKEN, arms, comparison_of, served, write_arm
from browser import opened

from adascope_fast.judging import QUESTIONS
from adascope_fast.judging.results import results_of, votes_in

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> \u202e{nonce}"


def _choices(out: Path, rater: str = "jo") -> dict[tuple[int, str], str]:
    return {(vote["pair"], vote["question"]): vote["choice"] for vote in votes_in(out) if vote["rater"] == rater}


def _vote(pair: int = 0, choice: str = "left", **more: Any) -> dict[str, Any]:
    return {"rater": "jo", "pair": pair, "question": "fine_detail", "choice": choice, "seconds": 1.0} | more


def test_no_answer_says_whose_an_image_is(tmp_path: Path):
    with served(comparison_of(arms(tmp_path)), tmp_path / "out") as (_, client):
        client.post("/api/pairs", json=_vote())
        answers = [client.get(path) for path in ("/", "/api/pairs?rater=jo", "/image/0", "/image/11", "/nothing")]
        answers.append(client.post("/api/pairs", json=_vote(1)))
        answers.append(client.post("/api/pairs", json=_vote(99)))
        for answer in answers:
            told = answer.content + str(answer.headers).encode() + str(answer.url).encode()
            for word in (b"quokka", b"zebra", b"metadata", b"0000", b"last-modified", str(tmp_path).encode()):
                assert word not in told, answer.url
            assert answer.headers["x-content-type-options"] == "nosniff"


def test_images_are_those_of_the_pair(tmp_path: Path):
    comparison = comparison_of(arms(tmp_path))
    with served(comparison, tmp_path / "out") as (_, client):
        for number, pair in enumerate(comparison.pairs):
            assert client.get(f"/image/{2 * number}").content == pair.left.png()
            assert client.get(f"/image/{2 * number + 1}").content == pair.right.png()
        assert client.get("/image/12").status_code == 404
        assert client.get("/image/-1").status_code in (404, 422)


@pytest.mark.parametrize(
    "change",
    [
        {"choice": "both"},
        {"pair": -1},
        {"pair": 6},
        {"pair": "0"},
        {"question": "beauty"},
        {"rater": ""},
        {"rater": "model:eye"},
        {"seconds": "x"},
        {"more": 1},
    ],
)
def test_a_vote_that_cannot_be_meant_is_refused_and_not_saved(tmp_path: Path, change: dict[str, Any]):
    with served(comparison_of(arms(tmp_path)), tmp_path / "out") as (_, client):
        pair = change.get("pair")
        answer = client.post("/api/pairs", json=_vote() | change)
        assert (400 <= answer.status_code < 500) or pair == "0"
        assert client.post("/api/pairs", content=b"\xff{", headers={"content-type": "application/json"}).is_client_error
        assert client.post("/api/pairs", content=b" " * 5000).status_code == 413
        assert client.get("/api/pairs?rater=model:x").status_code == 400
    if pair != "0":
        assert not _choices(tmp_path / "out")


def test_without_the_token_there_is_nothing(tmp_path: Path):
    with served(comparison_of(arms(tmp_path)), tmp_path / "out") as (address, _):
        for path in ("", "api/pairs?rater=jo", "image/0", f"?token={TOKEN}x"):
            assert httpx.get(address.partition("?")[0] + path).status_code == 401


def test_a_skip_is_of_the_questions_that_are_open(tmp_path: Path):
    with served(comparison_of(arms(tmp_path)), tmp_path / "out", num_questions=3) as (_, client):
        client.post("/api/pairs", json=_vote(question="aesthetic_appeal"))
        saved = client.post("/api/pairs", json=_vote(choice="skip")).json()["saved"]
    assert saved == {"0:fine_detail": "skip", "0:structural_faithfulness": "skip"}
    assert _choices(tmp_path / "out")[0, "aesthetic_appeal"] == "left"


def test_several_raters_at_once_lose_nothing(tmp_path: Path):
    comparison = comparison_of(arms(tmp_path))
    with served(comparison, tmp_path / "out") as (_, client):

        def all_of(rater: str) -> None:
            for pair in range(len(comparison.pairs)):
                for question in QUESTIONS:
                    choice = "left" if rater == "a" else "right"
                    body = _vote(pair, choice, rater=rater, question=question.key)
                    assert client.post("/api/pairs", json=body).status_code == 200

        with ThreadPoolExecutor() as pool:
            list(pool.map(all_of, ["a", "b"]))
        assert set(client.get("/api/pairs?rater=a").json()["given"].values()) == {"left"}
    for rater, choice in (("a", "left"), ("b", "right")):
        assert list(_choices(tmp_path / "out", rater).values()) == [choice] * 30
    assert results_of(comparison, votes_in(tmp_path / "out"))["agreement"]["pairs"][0]["same"] == 0


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a page with two pairs and two questions on each, and where the votes go."""
    paths = [write_arm(tmp_path / name, PROMPTS[:2], seeds=[0], shade=place) for place, name in enumerate("ab")]
    with served(comparison_of(paths), tmp_path / "out", num_questions=2) as (address, _):
        yield address, tmp_path / "out"


def _at(page: Any, count: str) -> None:
    """Wait until the page says how far it is, and shows what is next."""
    page.wait_for_function("text => document.getElementById('count').textContent === text", arg=count)
    page.wait_for_selector("[data-ready]")


def test_click_through_reload_go_back_and_be_thanked(two: tuple[str, Path]):
    address, out = two
    with opened(viewport={"width": 1000, "height": 800}) as page:
        page.goto(address)
        page.fill("#name", "jo")
        page.click("text=Begin")
        _at(page, "0 of 4")
        assert TOKEN not in page.url
        page.click("#choose-left")
        _at(page, "1 of 4")
        page.click("[aria-label='Right image is better']")
        _at(page, "2 of 4")
        page.reload()
        _at(page, "2 of 4")
        assert page.inner_text("h1") == QUESTIONS[0].title
        page.click("#back")
        page.wait_for_selector("#keep")
        assert page.get_attribute("#choose-right", "aria-pressed") == "true"
        page.wait_for_selector("[data-ready]")
        page.click("#choose-equal")
        _at(page, "2 of 4")
        page.click("#skip")
        page.wait_for_selector("text=Thank you, jo")
        assert "2 answers on 2 pairs are saved, and 2 were skipped" in page.inner_text("main")
        page.reload()
        page.wait_for_selector("text=Thank you, jo")
    keys = [question.key for question in QUESTIONS[:2]]
    assert _choices(out) == {(0, keys[0]): "left", (0, keys[1]): "equal", (1, keys[0]): "skip", (1, keys[1]): "skip"}


def test_the_keyboard_is_enough(two: tuple[str, Path]):
    address, out = two
    with opened(viewport={"width": 1000, "height": 800}) as page:
        page.goto(address)
        page.wait_for_selector("#name:focus")
        page.keyboard.type("jo")
        page.keyboard.press("Enter")
        _at(page, "0 of 4")
        for number, key in enumerate(["ArrowLeft", "ArrowRight", "ArrowDown"], 1):
            page.keyboard.press(key)
            _at(page, f"{number} of 4")
        page.keyboard.press("Backspace")
        page.wait_for_selector("#keep")
        page.keyboard.press("n")
        page.wait_for_selector("#keep", state="detached")
        page.wait_for_selector("[data-ready]")
        page.keyboard.press("=")
        page.wait_for_selector("text=Thank you, jo")
        page.keyboard.press("Backspace")
        page.wait_for_selector("#keep")
        page.wait_for_selector("[data-ready]")
        for _ in range(2):
            page.keyboard.press("Tab")
        seen = "getComputedStyle(document.activeElement)"
        assert page.evaluate(f"[{seen}.outlineStyle, {seen}.outlineWidth]") == ["solid", "3px"]
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Left image is better"
        page.keyboard.press("Enter")
        page.wait_for_selector("text=Thank you, jo")
    assert list(_choices(out).values()) == ["left", "right", "equal", "left"]


def test_what_could_not_be_saved_is_said_and_can_be_answered_again(two: tuple[str, Path]):
    address, out = two
    with opened() as page:
        page.goto(f"{address}&as=jo")
        _at(page, "0 of 4")
        page.route("**/api/pairs", lambda route: route.abort())
        page.click("#choose-left")
        page.wait_for_function("() => document.getElementById('alert').textContent.startsWith('Not saved')")
        assert not _choices(out)
        page.unroute("**/api/pairs")
        page.route("**/api/pairs*", lambda route: route.fulfill(status=401, body="no"))
        page.click("#choose-left")
        page.wait_for_function("() => document.getElementById('alert').textContent.includes('address that it printed')")
        assert not _choices(out)
        page.unroute("**/api/pairs*")
        page.click("#choose-left")
        _at(page, "1 of 4")
        assert page.inner_text("#alert") == ""


def test_a_phone_shows_everything_without_scrolling_sideways(tmp_path: Path):
    long = "word " * 100 + "x" * 300
    paths = [write_arm(tmp_path / name, [long, HOSTILE], seeds=[0], shade=place) for place, name in enumerate("ab")]
    with (
        served(comparison_of(paths), tmp_path / "out", num_questions=1) as (address, _),
        opened(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True) as page,
    ):
        page.goto(f"{address}&as={'W' * 40}")
        prompts = []
        for number in range(2):
            _at(page, f"{number} of 2")
            prompts.append(page.evaluate("document.querySelector('.prompt').lastChild.data"))
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            sizes = page.evaluate("[...document.querySelectorAll('button')].map((one) => one.getBoundingClientRect())")
            assert all(size["height"] >= 44 and size["width"] >= 44 and size["right"] <= 360 for size in sizes)
            page.tap("#choose-equal")
        page.wait_for_selector("text=Thank you")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert sorted(prompts) == sorted([long, HOSTILE]), "a prompt is shown as it is, and is nothing but text"
        assert page.title() == "Judge images"


def test_only_the_pages_own_script_may_run(tmp_path: Path):
    with served(comparison_of(arms(tmp_path)), tmp_path / "out") as (_, client):
        pages = [client.get("/") for _ in range(2)]
        rules = [page.headers["content-security-policy"] for page in pages]
        assert rules[0] != rules[1], "a nonce is for once"
        assert "default-src 'none'" in rules[0]
        assert "unsafe" not in rules[0]
        assert "://" not in pages[0].text
        assert client.get("/api/pairs?rater=x").headers["content-security-policy"] == "default-src 'none'"


def test_a_server_of_other_images_is_never_asked_for_the_same_address(tmp_path: Path):
    paths = arms(tmp_path)
    versions = set()
    for seed in (0, 1):
        with served(comparison_of(paths, seed=seed), tmp_path / f"{seed}") as (_, client):
            versions.add(client.get("/api/pairs?rater=x").json()["version"])
    assert len(versions) == 2
    assert json.loads((tmp_path / "0" / "pairs.json").read_text())["digest"][:12] in versions
