"""The page and what it asks for: pairs to compare, or images of a training to rate.

Nothing that a page is told says whose an image is. What comes from files is put into the page as text by its script,
and no script but its own runs in it.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from adascope_fast.judging.pairs import Comparison
from adascope_fast.judging.questions import QUESTIONS, Question
from adascope_fast.judging.ratings import MOST_STARS, Ratings
from adascope_fast.judging.results import SKIPPED
from adascope_fast.judging.votes import LONGEST_NAME, Votes, rater_of, seconds_of
from adascope_fast.serving import require

MOST_BYTES = 4096
"""Of a request: a vote is a hundred."""

Name = Annotated[str, Field(min_length=1, max_length=4 * LONGEST_NAME)]
Number = Annotated[int, Field(ge=0, le=10**9)]
Seconds = Annotated[float, Field(allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    rater: Name
    seconds: Seconds = 0.0


class PairVote(_Body):
    """An answer to one question on one pair."""

    pair: Number
    question: Annotated[str, Field(max_length=100)]
    choice: Literal["left", "right", "equal", "skip"]


class Rating(_Body):
    """Stars of one image; None: it is skipped."""

    image: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    stars: Annotated[int, Field(ge=1, le=MOST_STARS)] | None


def comparing(comparison: Comparison, questions: Sequence[Question], votes: Votes) -> Any:
    """An ASGI application that shows the pairs and takes votes on them; ValueError where FastAPI is not installed."""
    app, refused, now = _application()
    keys = [question.key for question in questions]
    version = comparison.digest[:12]

    @app.get("/api/pairs")
    def pairs(rater: str) -> Any:
        name = _named(rater, refused)
        given = {f"{vote['pair']}:{vote['question']}": vote["choice"] for vote in votes if vote["rater"] == name}
        return {
            "rater": name,
            "version": version,
            "questions": [_shown(question) for question in questions],
            "prompts": [pair.prompt for pair in comparison.pairs],
            "given": given,
        }

    @app.post("/api/pairs")
    def vote(body: PairVote) -> Any:
        name = _named(body.rater, refused)
        if body.pair >= len(comparison.pairs) or body.question not in keys:
            raise refused(404, "no such pair or question; load the page again")
        asked = [body.question]
        if body.choice == SKIPPED:  # the pair, but for what was answered before
            asked += [key for key in keys if key != body.question and votes.get(name, body.pair, key) is None]
        for key in asked:
            votes.add(
                {"rater": name, "pair": body.pair, "question": key, "choice": body.choice}
                | {"seconds": seconds_of(body.seconds), "time": now()}
            )
        return {"saved": {f"{body.pair}:{key}": body.choice for key in asked}}

    @app.get("/image/{number}")
    def image(number: int) -> Any:
        if not 0 <= number < 2 * len(comparison.pairs):
            raise refused(404, "no such image")
        pair = comparison.pairs[number // 2]
        return _png((pair.right if number % 2 else pair.left).png())

    _show(app, "pairs")
    return app


def rating(ratings: Ratings) -> Any:
    """An ASGI application that shows what `ratings` waits for and takes stars; ValueError without FastAPI."""
    app, refused, now = _application()
    question = next(one for one in QUESTIONS if one.key == ratings.question)

    @app.get("/api/ratings")
    def group(rater: str, back: int = 0) -> Any:
        return {"question": _shown(question), "stars": MOST_STARS, **ratings.group_for(_named(rater, refused), back)}

    @app.post("/api/ratings")
    def rate(body: Rating) -> Any:
        name = _named(body.rater, refused)
        if not ratings.rate(name, body.image, body.stars, seconds_of(body.seconds), now()):
            raise refused(404, "this image is no longer waited for")
        return {"saved": body.stars}

    @app.get("/image/{digest}")
    def image(digest: str) -> Any:
        found = ratings.png(digest)
        if found is None:
            raise refused(404, "no such image")
        return _png(found)

    _show(app, "ratings")
    return app


def _application() -> tuple[Any, Callable[[int, str], Exception], Callable[[], float]]:
    """FastAPI without pages of its own, what is raised for what is refused, and the time of a vote."""
    require()
    from fastapi import FastAPI, HTTPException

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def closed(request: Any, call_next: Any) -> Any:
        answer = await call_next(request)
        answer.headers["x-content-type-options"] = "nosniff"
        answer.headers["referrer-policy"] = "no-referrer"
        answer.headers.setdefault("cache-control", "no-store")
        answer.headers.setdefault("content-security-policy", "default-src 'none'")
        return answer

    return app, HTTPException, lambda: round(time.time(), 3)


def _show(app: Any, what: Literal["pairs", "ratings"]) -> None:
    """Let the application answer with the page, which shows pairs or ratings."""
    from fastapi.responses import HTMLResponse, Response

    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    @app.get("/favicon.ico")
    def icon() -> Any:
        return Response(status_code=204)

    @app.get("/")
    def shown() -> Any:
        nonce = secrets.token_urlsafe(16)
        rules = f"default-src 'none'; img-src 'self'; connect-src 'self'; script-src 'nonce-{nonce}'; "
        rules += f"style-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        text = page.replace("{nonce}", nonce).replace("{what}", what)
        return HTMLResponse(text, headers={"content-security-policy": rules})


def _png(content: bytes) -> Any:
    from fastapi.responses import Response

    # An address is that of one image for ever: it has a digest of what is shown.
    return Response(content, media_type="image/png", headers={"cache-control": "private, max-age=86400, immutable"})


def _shown(question: Question) -> dict[str, str]:
    return {"key": question.key, "title": question.title, "text": question.text}


def _named(rater: str, refused: Callable[[int, str], Exception]) -> str:
    try:
        return rater_of(rater)
    except ValueError as error:
        raise refused(400, str(error)) from None
