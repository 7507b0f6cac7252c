"""Requests to a server of ours, with patience: a server that is away is waited for.

A request has a connection of its own (`http.client`), so none is found dead in the middle of a run, and no proxy of the
environment comes between. What is tried again, with growing pauses, for `patience` seconds: no connection, no whole
answer within `timeout`, 408, 429 and 5xx; but what raised there (500) a few times alone. Everything else is told at
once: 4xx with the server's own line, and an answer that is none.
"""

import http.client
import ipaddress
import logging
import os
import queue
import random
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from adascope_fast.serving.settings import address
from adascope_fast.settings import one_line

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
MOST_RAISED = 3  # further tries of what raised on the server
LOOK = 0.5  # seconds between two looks at whether anybody still waits
QUIET = 10.0  # seconds for which a server may be busy without a word
MOST_ANSWER = 2**26  # bytes, where the one who asks knows nothing better

logger = logging.getLogger(__name__)
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Words:
    """What the lines of a client call its server."""

    server: str
    """As in "the reward server"."""
    section: str
    """Of the configuration, that has its url and timeout."""
    command: str
    """That starts it."""
    correct: str
    """What to do about what raises there."""
    smaller: str
    """What to do about a request that is too large."""
    sent: str
    """What is read on the way where nothing is encrypted."""

    @property
    def not_one(self) -> str:
        """What to do where something else answers."""
        return f"check that {self.section}.url is that of an adascope-fast {self.command} of this release"


class TryAgainError(Exception):
    """What failed and may succeed later.

    Args:
        after: seconds from now, if the server has said.
        is_busy: for a moment, which is nothing to tell.
        has_raised: on the server, and will perhaps again.
    """

    def __init__(self, why: str, *, after: float | None = None, is_busy: bool = False, has_raised: bool = False):
        super().__init__(why)
        self.after, self.is_busy, self.has_raised = after, is_busy, has_raised


class StoppedError(Exception):
    """Another request of the same call has failed, or nobody wants the answer."""


class Client:
    """Asks one server.

    Args:
        url: the server's address, http://HOST:PORT.
        token: that of the server; None: the environment variable `token_env` has it.
        timeout: seconds in which a request must be answered.
        patience: seconds for which a server that does not answer is waited for.

    Raises:
        ValueError: there is no token, or the address is none.
    """

    def __init__(
        self, url: str, words: Words, *, token: str | None, token_env: str, timeout: float, patience: float
    ) -> None:
        self._address, self.url, self.words = address(url, words.section), url.rstrip("/"), words
        self._token, self._token_env = _token(token, token_env, words.server), token_env
        self._timeout, self._patience = timeout, patience
        self._lock, self._waiting_since = threading.Lock(), 0.0
        self.is_over = threading.Event()
        """Set where nobody wants an answer any more."""
        self._chance = random.Random()  # of its own, so that pauses leave no trace in other draws
        if self._address.scheme == "http" and not _is_loopback(self._address.hostname or ""):
            logger.warning("%s is not encrypted: whoever is on the way reads %s", self.url, words.sent)

    def patiently(
        self,
        ask: Callable[[], T],
        stop: threading.Event | None = None,
        *,
        look: Callable[[], object] = lambda: None,
    ) -> T:
        """What `ask` returns, asked again while there is hope.

        Args:
            look: called before each further try, to see that the server is ready, and is what it was.

        Raises:
            ValueError: it will not be otherwise.
            ConnectionError: the patience is at its end.
        """
        start, tries, raised, stop = time.monotonic(), 0, 0, stop or threading.Event()
        while True:
            try:
                if tries:
                    look()
                found = ask()
            except TryAgainError as error:
                raised += error.has_raised
                waited = time.monotonic() - start
                if raised > MOST_RAISED:
                    raise ValueError(f"{self.told(str(error))}; {self.words.correct}") from None
                if waited >= self._patience:
                    raise ConnectionError(
                        f"{self.told(str(error))}, and not otherwise within {self._patience:g} s; start it again "
                        f"(adascope-fast {self.words.command}), then go on with train --resume"
                    ) from None
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(tries, 10)) * self._chance.uniform(0.5, 1.5)
                pause = min(max(pause, error.after or 0), self._patience - waited)  # the last try is at its end
                if not error.is_busy or waited > QUIET:
                    self._say_it_waits(str(error), raised)
                tries += 1
                if _is_stopped_within(pause, stop, self.is_over):
                    raise StoppedError from None
            else:
                self._say_it_goes_on()
                return found

    def told(self, why: str) -> str:
        """A line about the server."""
        return f"the {self.words.server} at {self.url} {one_line(why)}"

    def read(self, read: Callable[[], T]) -> T:
        """What `read` makes of an answer; ValueError where it is none of such a server."""
        try:
            return read()
        except ValueError as error:
            line = self.told(f"gave no answer of a {self.words.server}")
            raise ValueError(f"{line}: {error}; {self.words.not_one}") from None

    def exchange(self, method: str, path: str, body: bytes | None, *, most_answer: int = MOST_ANSWER) -> bytes:
        """The body of an answer with status 200; `TryAgainError` or ValueError for anything else."""
        until = time.monotonic() + self._timeout
        connection = self._connection()
        headers = {"Authorization": f"Bearer {self._token}", "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = "application/octet-stream"
        try:
            connection.request(method, f"{self._address.path.rstrip('/')}{path}", body, headers)
            with connection.getresponse() as response:
                content = _content(response, until, most_answer)
        except TimeoutError:
            raise TryAgainError(f"did not answer within {self._timeout:g} s ({self.words.section}.timeout)") from None
        except ssl.SSLError as error:
            if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
                raise TryAgainError("ended the connection") from None
            raise ValueError(
                f"{self.told('cannot be spoken to over TLS')} ({error.reason or error}); check "
                f"{self.words.section}.url and the server's certificate"
            ) from None
        except (OSError, http.client.RemoteDisconnected, http.client.IncompleteRead) as error:
            why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise TryAgainError(f"does not answer ({why[:200]})") from None
        except (http.client.HTTPException, UnicodeError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            raise ValueError(f"{self.told('does not speak HTTP')} ({why}); {self.words.not_one}") from None
        finally:
            connection.close()
        if response.status != 200:
            self._refused(response, content)
        return content

    def _say_it_waits(self, why: str, raised: int) -> None:
        with self._lock:
            is_new, self._waiting_since = not self._waiting_since, self._waiting_since or time.monotonic()
        if is_new:
            most = (
                f"asked again, {MOST_RAISED} times at most" if raised else f"waited for, {self._patience:g} s at most"
            )
            logger.warning("%s; it is %s", self.told(why), most)

    def _say_it_goes_on(self) -> None:
        with self._lock:
            since, self._waiting_since = self._waiting_since, 0.0
        if since:
            logger.warning("%s again, after %.0f s", self.told("answers"), time.monotonic() - since)

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._address.hostname or "", self._address.port
        if self._address.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=self._timeout, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, port, timeout=self._timeout)

    def _refused(self, response: http.client.HTTPResponse, content: bytes) -> NoReturn:
        status, line = response.status, one_line(" ".join(content[:2000].decode("utf-8", "replace").split()))[:500]
        line = f"answered {status} ({line or response.reason})"
        if status in (401, 403):
            raise ValueError(
                f"{self.told(line)}; set the environment variable {self._token_env} to the token that the server "
                f"printed as it started"
            )
        if status == 413:
            raise ValueError(f"{self.told(line)}; {self.words.smaller}")
        if status in (408, 429) or status >= 500:
            told = response.headers.get("Retry-After", "")
            after = float(min(int(told), 60)) if told.isdecimal() and len(told) < 6 else None
            raise TryAgainError(line, after=after, is_busy=status in (429, 503), has_raised=status == 500)
        if 300 <= status < 400:
            where = one_line(response.headers.get("Location", "elsewhere"))[:200]
            raise ValueError(
                f"{self.told(line)} and leads to {where}; set {self.words.section}.url to the server's own address"
            )
        advice = self.words.not_one if status in (404, 405) else "correct what it names"
        raise RefusedError(f"{self.told(line)}; {advice}", status)


class RefusedError(ValueError):
    """The server has said, with a status, that it will not."""

    def __init__(self, line: str, status: int) -> None:
        super().__init__(line)
        self.status = status


def in_order(
    work: Callable[[T, threading.Event], U],
    pieces: Sequence[T],
    at_once: int,
    is_over: threading.Event | None = None,
    arrived: Callable[[int, U], object] = lambda place, value: None,
) -> list[U]:
    """What `work` makes of each piece, some at once; the first error is raised as soon as it comes, and stops the rest.

    Threads do not keep a process that is interrupted: they are daemons.

    Args:
        is_over: set where nobody wants an answer any more; None: somebody does.
        arrived: called with (place, value) of each piece in their order, as soon as those before it have come.
    """
    stop, over = threading.Event(), is_over or threading.Event()
    left, done = queue.SimpleQueue[int](), queue.SimpleQueue[tuple[int, Any, BaseException | None]]()
    for place in range(len(pieces)):
        left.put(place)

    def run() -> None:
        while not stop.is_set():
            try:
                place = left.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((place, work(pieces[place], stop), None))
            except BaseException as error:
                done.put((place, None, error))
                return

    for number in range(min(max(at_once, 1), len(pieces))):
        threading.Thread(target=run, name=f"asks-{number}", daemon=True).start()
    found: dict[int, U] = {}
    told = 0
    try:
        while len(found) < len(pieces):
            try:
                place, value, error = done.get(timeout=LOOK)
            except queue.Empty:
                if over.is_set():
                    raise StoppedError from None
                continue
            if error is not None:
                raise error
            found[place] = value
            while told in found:
                arrived(told, found[told])
                told += 1
    finally:
        stop.set()
    return [found[place] for place in range(len(pieces))]


def _is_stopped_within(seconds: float, stop: threading.Event, is_over: threading.Event) -> bool:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if stop.wait(min(left, LOOK)) or is_over.is_set():
            return True
    return stop.is_set()


def _content(response: http.client.HTTPResponse, until: float, most: int) -> bytes:
    """The whole body; TimeoutError where it drips, and ValueError where there is no end of it."""
    chunks, size = [], 0
    while chunk := response.read1(2**16):
        chunks.append(chunk)
        size += len(chunk)
        if time.monotonic() > until:
            raise TimeoutError
        if size > most:
            raise http.client.HTTPException(f"an answer of more than {most} bytes")
    if response.length:  # read1 ends without a word where the connection did
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(chunks)


def _token(token: str | None, variable: str, server: str) -> str:
    """What is sent as the token; ValueError where there is none, or it cannot be a header."""
    found = (os.environ.get(variable, "") if token is None else token).strip()
    if not found:
        raise ValueError(
            f"a {server} asks for its token, and the environment variable {variable} has none; set it with "
            f"export {variable}=TOKEN, as the server printed it"
        )
    if not found.isascii() or not found.isprintable() or " " in found:
        raise ValueError("a token has printable ASCII characters without spaces, got others; copy it again")
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
