"""A reward that a server has: images go there, scores come back, and a server that is away is waited for.

A request has a connection of its own (`http.client`), so none is found dead in the middle of a run, and no proxy of the
environment comes between. What is tried again, with growing pauses, for `patience` seconds: no connection, no whole
answer within `timeout`, 408, 429 and 5xx; but a reward that raised (500) a few times alone. Before each new try the
server is asked what it serves, so images go to one that is ready, and never to another reward. Everything else is told
at once: 4xx with the server's own line, and an answer that is none.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from adascope_fast.rewards.remote import wire
from adascope_fast.rewards.remote.wire import Served
from adascope_fast.rewards.reward import weighed
from adascope_fast.rewards.settings import address
from adascope_fast.settings import one_line

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
MOST_RAISED = 3  # further tries of what raised on the server
LOOK = 0.5  # seconds between two looks at whether anybody still waits
QUIET = 10.0  # seconds for which a server may be busy without a word
PROMPTS_AT_ONCE = 500
SPARE = 2**16  # bytes of a body besides its images and prompts

logger = logging.getLogger(__name__)
T = TypeVar("T")
U = TypeVar("U")


class _AgainError(Exception):
    """What failed and may succeed later."""

    def __init__(self, why: str, *, after: float | None = None, is_busy: bool = False, has_raised: bool = False):
        super().__init__(why)
        self.after, self.is_busy, self.has_raised = after, is_busy, has_raised


class _StoppedError(Exception):
    """Another request of the same call has failed."""


class Remote:
    """Scores of a reward that a server has; with its parts, breakdown and check of prompts, where it has these.

    Args:
        url: the server's address, http://HOST:PORT.
        token: that of the server; None: the environment variable `token_env` has it.
        timeout: seconds in which a request must be answered.
        patience: seconds for which a server that does not answer is waited for.
        batch: images of a request; fewer where the server takes no more.
        encoding: `safetensors`, the images as they are, or `png`, rounded to 8 bits.
        parallel: requests at once.

    Raises:
        ValueError: there is no token, the server refuses it, or is none.
        OSError: it did not answer in time.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        token_env: str = "ADASCOPE_FAST_REWARD_TOKEN",
        timeout: float = 120.0,
        patience: float = 600.0,
        batch: int = 32,
        encoding: str = "safetensors",
        parallel: int = 2,
    ) -> None:
        if encoding not in wire.ENCODINGS:
            raise ValueError(f"encoding is one of {', '.join(wire.ENCODINGS)}, got {encoding!r:.40}; choose one")
        self._address, self.url, self._token_env = address(url), url.rstrip("/"), token_env
        self._token = _token(token, token_env)
        self._timeout, self._patience = timeout, patience
        self._batch, self._encoding, self._parallel = batch, encoding, parallel
        self._lock, self._waiting_since = threading.Lock(), 0.0
        self._is_over = threading.Event()
        self._chance = random.Random()  # of its own, so that pauses leave no trace in other draws
        if self._address.scheme == "http" and not _is_loopback(self._address.hostname or ""):
            logger.warning("%s is not encrypted: whoever is on the way reads the token and the images", self.url)
        self._served: Served | None = None
        self.served = self._patiently(self._described, threading.Event())
        self.name = f"remote ({self.served.name})"
        if self.served.has_parts:
            self.parts, self.weights = self._parts, self.served.weights
        if self.served.has_breakdown:
            self.breakdown = self._breakdown
        if self.served.checks_prompts:
            self.check_prompts = self._check_prompts
        self._metadata: Mapping[str, Mapping[str, Any]] = {}
        if self.served.takes_metadata:
            self.take_metadata = self._take_metadata

    @property
    def digest(self) -> str:
        """SHA-256 of what the served reward is made of, as the server says."""
        return self.served.digest

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [b] float32 of images [b, 3, h, w] in [0, 1], on the CPU; NaN where the server's is not finite."""
        if self.served.has_parts:
            return weighed(self._parts(images, prompts), self.served.weights)
        answers = self._each("/score", self._pieces(images, prompts, self._batch))
        return self._read(lambda: torch.cat([wire.read_scores(got.get("scores"), n) for got, n in answers]))

    def _parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores [b] of each part, without its weight."""
        answers = self._each("/score", self._pieces(images, prompts, self._batch))

        def joined() -> dict[str, Tensor]:
            found = [got.get("parts") for got, _ in answers]
            names = list(found[0]) if isinstance(found[0], dict) else []
            if not names or any(not isinstance(one, dict) or list(one) != names for one in found):
                raise ValueError("its answer has no scores of the reward's parts")
            counts = [count for _, count in answers]
            return {
                name: torch.cat([wire.read_scores(one[name], n) for one, n in zip(found, counts, strict=True)])  # type: ignore[index]
                for name in names
            }

        return self._read(joined)

    def _breakdown(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """The reward's own, of one request; of several where the server takes no more, their mean by images."""
        answers = self._each("/breakdown", self._pieces(images, prompts, wire.MOST_IMAGES))

        def mean() -> dict[str, float]:
            total: dict[str, list[tuple[float, int]]] = {}
            for got, count in answers:
                for name, value in wire.read_numbers(got.get("breakdown")).items():
                    total.setdefault(name, []).append((value, count))
            return {name: sum(v * n for v, n in found) / sum(n for _, n in found) for name, found in total.items()}

        return self._read(mean)

    def _check_prompts(self, prompts: Sequence[str], where: str) -> None:
        """ValueError where the server's reward cannot judge one of them."""
        for first in range(0, len(prompts), PROMPTS_AT_ONCE):
            named = list(prompts[first : first + PROMPTS_AT_ONCE])
            values = {"prompts": named, "where": where, "metadata": self._known(named)}
            body = wire.write_json(values)
            found = self._patiently(lambda body=body: self._posted("/check", body), threading.Event())
            if isinstance(line := found.get("refused"), str):
                raise ValueError(one_line(line)[:1000])

    def _take_metadata(self, metadata: Mapping[str, Mapping[str, Any]]) -> None:
        """What is known of each prompt, to be sent with it."""
        self._metadata = metadata

    def _known(self, prompts: Sequence[str]) -> list[Mapping[str, Any]]:
        """The metadata of each prompt; none at all where none has any."""
        return [self._metadata.get(prompt, {}) for prompt in prompts] if self._metadata else []

    def _pieces(self, images: Tensor, prompts: Sequence[str], most: int) -> list[Callable[[], tuple[bytes, int]]]:
        """What makes the body of each request, and says how many images it has."""
        count, (height, width) = len(images), images.shape[-2:]
        images = images.detach().cpu()  # on the stream of the thread that asks: those that send have others
        value = 1 if self._encoding == "png" else images.element_size()
        longest = max(map(len, prompts), default=0)
        room = (self.served.most_bytes - SPARE) // (3 * height * width * value + 12 * longest + 200)
        most = max(1, min(most, room, wire.MOST_IMAGES, wire.MOST_PIXELS // (height * width)))

        def body(rows: slice) -> tuple[bytes, int]:
            part = images[rows]
            return wire.write(part, prompts[rows], self._known(prompts[rows]), encoding=self._encoding), len(part)

        return [lambda first=first: body(slice(first, first + most)) for first in range(0, count, most)]

    def _each(self, path: str, pieces: Sequence[Callable[[], tuple[bytes, int]]]) -> list[tuple[dict[str, Any], int]]:
        """The answers to the pieces, in their order, each with its number of images."""

        def ask(piece: Callable[[], tuple[bytes, int]], stop: threading.Event) -> tuple[dict[str, Any], int]:
            body, count = piece()
            return self._patiently(lambda: self._posted(path, body), stop), count

        return in_order(ask, pieces, self._parallel, self._is_over)

    def training_begins(self, folder: Path, images: Mapping[str, int]) -> str | None:
        """A server is waited for from now on."""
        self._is_over.clear()

    def training_ends(self) -> None:
        """What is still asked, by a thread that the training left behind, is asked in vain: it holds nobody."""
        self._is_over.set()

    def _patiently(self, ask: Callable[[], T], stop: threading.Event) -> T:
        """What `ask` returns, asked again while there is hope."""
        start, tries, raised = time.monotonic(), 0, 0
        while True:
            try:
                if tries and self._served is not None:
                    self._described()
                found = ask()
            except _AgainError as error:
                raised += error.has_raised
                waited = time.monotonic() - start
                if raised > MOST_RAISED:
                    raise ValueError(f"{self._told(str(error))}; correct the reward there") from None
                if waited >= self._patience:
                    raise ConnectionError(
                        f"{self._told(str(error))}, and not otherwise within {self._patience:g} s; start it again "
                        f"(adascope-fast reward-server), then go on with train --resume"
                    ) from None
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(tries, 10)) * self._chance.uniform(0.5, 1.5)
                pause = min(max(pause, error.after or 0), self._patience - waited)  # the last try is at its end
                if not error.is_busy or waited > QUIET:
                    self._say_it_waits(str(error), raised)
                tries += 1
                if _is_stopped_within(pause, stop, self._is_over):
                    raise _StoppedError from None
            else:
                self._say_it_goes_on()
                return found

    def _say_it_waits(self, why: str, raised: int) -> None:
        with self._lock:
            is_new, self._waiting_since = not self._waiting_since, self._waiting_since or time.monotonic()
        if is_new:
            most = (
                f"asked again, {MOST_RAISED} times at most" if raised else f"waited for, {self._patience:g} s at most"
            )
            logger.warning("%s; it is %s", self._told(why), most)

    def _say_it_goes_on(self) -> None:
        with self._lock:
            since, self._waiting_since = self._waiting_since, 0.0
        if since:
            logger.warning("the reward server at %s answers again, after %.0f s", self.url, time.monotonic() - since)

    def _told(self, why: str) -> str:
        return f"the reward server at {self.url} {one_line(why)}"

    def _read(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except ValueError as error:
            raise ValueError(f"{self._told('gave no answer of a reward server')}: {error}; {NOT_ONE}") from None

    def _described(self) -> Served:
        """What the server serves now; ValueError where it is another reward than before."""
        answer = self._exchange("GET", "/reward", None)
        found = self._read(lambda: Served.read(wire.read_json(answer)))
        if self._served is not None and found.digest != self._served.digest:
            self._refuse_another(found.name)
        self._served = found
        return found

    def _refuse_another(self, name: str) -> NoReturn:
        before = self._served.name if self._served is not None else ""
        raise ValueError(
            f"{self._told('serves another reward than before')}: {name}, and it was {before}; serve the same, with "
            f"the same settings, then go on with train --resume"
        )

    def _posted(self, path: str, body: bytes) -> dict[str, Any]:
        served = self._served or self.served
        if len(body) > served.most_bytes:
            raise ValueError(
                f"{self._told('takes requests')} of at most {served.most_bytes} bytes, got one of {len(body)}; start "
                f'it with --max-bytes {len(body) * 2}, or set reward.encoding = "png"'
            )
        answer = self._exchange("POST", path, body)
        found = self._read(lambda: wire.read_json(answer))
        if found.get("digest") != served.digest:
            if not isinstance(found.get("digest"), str):
                self._read(lambda: _refuse_answer("it does not say of which reward it is"))
            self._described()  # tells which one it is
            self._refuse_another("another")
        return found

    def _exchange(self, method: str, path: str, body: bytes | None) -> bytes:
        """The body of an answer with status 200; `_AgainError` or ValueError for anything else."""
        until = time.monotonic() + self._timeout
        connection = self._connection()
        headers = {"Authorization": f"Bearer {self._token}", "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = "application/octet-stream"
        try:
            connection.request(method, f"{self._address.path.rstrip('/')}{path}", body, headers)
            with connection.getresponse() as response:
                content = _content(response, until)
        except TimeoutError:
            raise _AgainError(f"did not answer within {self._timeout:g} s (reward.timeout)") from None
        except ssl.SSLError as error:
            if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
                raise _AgainError("ended the connection") from None
            raise ValueError(
                f"{self._told('cannot be spoken to over TLS')} ({error.reason or error}); check reward.url and the "
                f"server's certificate"
            ) from None
        except (OSError, http.client.RemoteDisconnected, http.client.IncompleteRead) as error:
            why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise _AgainError(f"does not answer ({why[:200]})") from None
        except (http.client.HTTPException, UnicodeError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            raise ValueError(f"{self._told('does not speak HTTP')} ({why}); {NOT_ONE}") from None
        finally:
            connection.close()
        if response.status != 200:
            self._refused(response, content)
        return content

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
                f"{self._told(line)}; set the environment variable {self._token_env} to the token that the server "
                f"printed as it started"
            )
        if status == 413:
            raise ValueError(f"{self._told(line)}; lower reward.batch, or raise --max-bytes there and at its proxy")
        if status in (408, 429) or status >= 500:
            told = response.headers.get("Retry-After", "")
            after = float(min(int(told), 60)) if told.isdecimal() and len(told) < 6 else None
            raise _AgainError(line, after=after, is_busy=status in (429, 503), has_raised=status == 500)
        if 300 <= status < 400:
            where = one_line(response.headers.get("Location", "elsewhere"))[:200]
            raise ValueError(f"{self._told(line)} and leads to {where}; set reward.url to the server's own address")
        raise ValueError(f"{self._told(line)}; {NOT_ONE if status in (404, 405) else 'correct what it names'}")


NOT_ONE = "check that reward.url is that of an adascope-fast reward-server of this release"


def in_order(
    work: Callable[[T, threading.Event], U], pieces: Sequence[T], at_once: int, is_over: threading.Event | None = None
) -> list[U]:
    """What `work` makes of each piece, some at once; the first error is raised as soon as it comes, and stops the rest.

    Threads do not keep a process that is interrupted: they are daemons.

    Args:
        is_over: set where nobody wants an answer any more; None: somebody does.
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
        threading.Thread(target=run, name=f"reward-{number}", daemon=True).start()
    found: dict[int, U] = {}
    try:
        while len(found) < len(pieces):
            try:
                place, value, error = done.get(timeout=LOOK)
            except queue.Empty:
                if over.is_set():
                    raise _StoppedError from None
                continue
            if error is not None:
                raise error
            found[place] = value
    finally:
        stop.set()
    return [found[place] for place in range(len(pieces))]


def _is_stopped_within(seconds: float, stop: threading.Event, is_over: threading.Event) -> bool:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if stop.wait(min(left, LOOK)) or is_over.is_set():
            return True
    return stop.is_set()


def _content(response: http.client.HTTPResponse, until: float) -> bytes:
    """The whole body; TimeoutError where it drips, and ValueError where there is no end of it."""
    chunks, size = [], 0
    while chunk := response.read1(2**16):
        chunks.append(chunk)
        size += len(chunk)
        if time.monotonic() > until:
            raise TimeoutError
        if size > wire.MOST_ANSWER:
            raise http.client.HTTPException(f"an answer of more than {wire.MOST_ANSWER} bytes")
    if response.length:  # read1 ends without a word where the connection did
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(chunks)


def _refuse_answer(why: str) -> NoReturn:
    raise ValueError(why)


def _token(token: str | None, variable: str) -> str:
    """What is sent as the token; ValueError where there is none, or it cannot be a header."""
    found = (os.environ.get(variable, "") if token is None else token).strip()
    if not found:
        raise ValueError(
            f"a reward server asks for its token, and the environment variable {variable} has none; set it with "
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
