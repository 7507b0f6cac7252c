"""The same pairs judged by a model that sees, behind any OpenAI-compatible endpoint of chat completions.

All questions on a pair are asked at once, at temperature 0 and in both orders of the images. An answer counts as a
preference only where both orders give it, else the images are equal: a model that favours what it is shown first then
has no say, and by how much it does is reported. An answer that is not what was asked for is asked for again, then
recorded as failed; nothing is guessed.
"""

import base64
import http.client
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.message import Message
from typing import Any

from adascope_fast.judging.pairs import Comparison, Pair, Side
from adascope_fast.judging.questions import Question
from adascope_fast.judging.results import FAILED
from adascope_fast.judging.votes import OF_MODEL, Votes

TIMEOUT_S = 120.0
MOST_TRIES = 6
MOST_GARBAGE = 3
"""Answers to the same question that are not what was asked for."""
MOST_BYTES = 2**20
LONGEST_WAIT_S = 60.0
ANSWERS = ("first", "second", "equal")
_SWAPPED = {"first": "second", "second": "first", "equal": "equal"}
_SIDES = {"first": "left", "second": "right", "equal": "equal"}


class VisionModel:
    """An endpoint, and the model behind it.

    Args:
        url: the base of the interface, such as http://127.0.0.1:8000/v1, or its address of chat completions.
        name: what requests call the model.
        key: sent as a bearer token; None: none.
        pause_s: before the second try; it doubles with each.

    Raises:
        ValueError: the address is none.
    """

    def __init__(self, url: str, name: str, key: str | None = None, *, pause_s: float = 1.0) -> None:
        if not url.startswith(("http://", "https://")) or not url.isprintable() or " " in url:
            raise ValueError(f"--model is an address that begins with http:// or https://, got {url!r:.80}; correct it")
        url = url.rstrip("/")
        self.url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        self.name, self._key, self._pause_s = name, key, pause_s
        self._opener = urllib.request.build_opener(_NoRedirect)

    def answer(self, messages: Sequence[dict[str, Any]]) -> str:
        """The text of its answer, "" where there is none.

        Raises:
            OSError: it did not answer, or was busy, in each of several tries.
            ValueError: it refused the request, which no second try would change.
        """
        body = {"model": self.name, "messages": list(messages), "temperature": 0}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        why = ""
        for number in range(MOST_TRIES):
            wait = min(self._pause_s * 2**number * random.uniform(0.5, 1.5), LONGEST_WAIT_S)
            try:
                with self._opener.open(request, timeout=TIMEOUT_S) as answer:
                    return _text(answer.read(MOST_BYTES))
            except urllib.error.HTTPError as error:
                told = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
                why = f"{error.code} {told or error.reason}"
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    raise ValueError(
                        f"the model at {self.url} must take images in chat completions, got {why}; check --model, "
                        f"--model-name and --key-env"
                    ) from None
                wait = _told_to_wait(error.headers, wait)
            except (OSError, ValueError, http.client.HTTPException) as error:  # no connection, none in time, or no HTTP
                why = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
            if number + 1 < MOST_TRIES:
                time.sleep(wait)
        raise OSError(
            f"the model at {self.url} did not answer in {MOST_TRIES} tries ({why}); what was answered is saved, and "
            f"the same command goes on with the rest"
        )


@dataclass(frozen=True)
class Asked:
    """How many answers were recorded, and how many of them failed."""

    num_answers: int
    num_failed: int


def ask_model(
    model: VisionModel,
    comparison: Comparison,
    questions: Sequence[Question],
    votes: Votes,
    on_pair: Callable[[int], None] = lambda done: None,
) -> Asked:
    """Put every pair that has no answer yet, or a failed one, to the model, and record what it says.

    Args:
        on_pair: told the number of pairs that are done.
    """
    rater = f"{OF_MODEL}{model.name}"
    num_answers = num_failed = 0
    for number, pair in enumerate(comparison.pairs):
        known = [votes.get(rater, number, question.key) for question in questions]
        open_ones = [
            question
            for question, vote in zip(questions, known, strict=True)
            if vote is None or vote["choice"] == FAILED
        ]
        if open_ones:
            for vote in _judged(model, pair, open_ones):
                votes.add({"rater": rater, "pair": number, **vote})
                num_answers += 1
                num_failed += vote["choice"] == FAILED
        on_pair(number + 1)
    return Asked(num_answers, num_failed)


def _judged(model: VisionModel, pair: Pair, questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
    """The votes on a pair: a preference where both orders agree on it."""
    started = time.monotonic()
    in_order = _asked(model, pair.prompt, pair.left, pair.right, questions)
    swapped = _asked(model, pair.prompt, pair.right, pair.left, questions)
    seconds = round(time.monotonic() - started, 2)
    for question in questions:
        about = {"question": question.key, "seconds": seconds, "time": round(time.time(), 3)}
        if in_order is None or swapped is None:
            yield about | {"choice": FAILED}
            continue
        one, other = in_order[question.key], swapped[question.key]
        choice = _SIDES[one] if _SWAPPED[other] == one else "equal"
        yield about | {"choice": choice, "orders": [one, other]}


def _asked(
    model: VisionModel, prompt: str, first: Side, second: Side, questions: Sequence[Question]
) -> dict[str, str] | None:
    """`first`, `second` or `equal` for each question; None where no answer was of that form."""
    messages = [{"role": "user", "content": _content(prompt, first, second, questions)}]
    for _ in range(MOST_GARBAGE):
        text = model.answer(messages)
        if found := answers_in(text, [question.key for question in questions]):
            return found
        again = "That is not the JSON object that was asked for. Answer with that object alone, and nothing else."
        messages = [
            messages[0],
            {"role": "assistant", "content": text[:2000] or "-"},
            {"role": "user", "content": again},
        ]
    return None


def _content(prompt: str, first: Side, second: Side, questions: Sequence[Question]) -> list[dict[str, Any]]:
    asked = "\n".join(f"- {question.key}: {question.text}" for question in questions)
    form = json.dumps({question.key: "first | second | equal" for question in questions})
    text = (
        f"Two images were drawn for the prompt {json.dumps(prompt, ensure_ascii=False)}. Compare them. For each of "
        f"these questions, say which image is better: first, second, or equal if neither is.\n{asked}\n"
        f"Answer with one JSON object and nothing else, of the form {form}"
    )
    return [
        {"type": "text", "text": text},
        {"type": "text", "text": "The first image:"},
        {"type": "image_url", "image_url": {"url": _address(first)}},
        {"type": "text", "text": "The second image:"},
        {"type": "image_url", "image_url": {"url": _address(second)}},
    ]


def answers_in(text: str, keys: Sequence[str]) -> dict[str, str] | None:
    """The one JSON object in a text, if it has one of the answers for every key; None otherwise."""
    start, end = text.find("{"), text.rfind("}")
    try:
        values = json.loads(text[start : end + 1]) if 0 <= start < end else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    found = {key: value.strip().lower() for key in keys if isinstance(value := values.get(key), str)}
    return found if len(found) == len(keys) and set(found.values()) <= set(ANSWERS) else None


def _text(body: bytes) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    if isinstance(content, list):  # of parts, as some servers have it
        content = "".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return content if isinstance(content, str) else ""


def _address(side: Side) -> str:
    return "data:image/png;base64," + base64.b64encode(side.png()).decode()


def _told_to_wait(headers: Message | None, otherwise: float) -> float:
    """The seconds of a `Retry-After`, at most a minute."""
    told = (headers or {}).get("Retry-After", "")
    return min(float(told), LONGEST_WAIT_S) if told.isdecimal() and len(told) < 6 else otherwise


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is sent where it was meant for, and nowhere else."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None
