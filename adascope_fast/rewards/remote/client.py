"""A reward that a server has: images go there, scores come back, and a server that is away is waited for.

Before each new try the server is asked what it serves, so images go to one that is ready, and never to another reward.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from adascope_fast.rewards.remote import wire
from adascope_fast.rewards.remote.wire import Served
from adascope_fast.rewards.reward import weighed
from adascope_fast.serving.client import Client, Words, in_order
from adascope_fast.serving.wire import read_json, write_json
from adascope_fast.settings import one_line

PROMPTS_AT_ONCE = 500
SPARE = 2**16  # bytes of a body besides its images and prompts
WORDS = Words(
    server="reward server",
    section="reward",
    command="reward-server",
    correct="correct the reward there",
    smaller="lower reward.batch, or raise --max-bytes there and at its proxy",
    sent="the token and the images",
)

T = TypeVar("T")


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
        keys: dict[str, Any] = {"token": token, "token_env": token_env, "timeout": timeout, "patience": patience}
        self._client = Client(url, WORDS, **keys)
        self._batch, self._encoding, self._parallel = batch, encoding, parallel
        self._served: Served | None = None
        self.served = self._client.patiently(self._described)
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
        return self._client.read(lambda: torch.cat([wire.read_scores(got.get("scores"), n) for got, n in answers]))

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

        return self._client.read(joined)

    def _breakdown(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """The reward's own, of one request; of several where the server takes no more, their mean by images."""
        answers = self._each("/breakdown", self._pieces(images, prompts, wire.MOST_IMAGES))

        def mean() -> dict[str, float]:
            total: dict[str, list[tuple[float, int]]] = {}
            for got, count in answers:
                for name, value in wire.read_numbers(got.get("breakdown")).items():
                    total.setdefault(name, []).append((value, count))
            return {name: sum(v * n for v, n in found) / sum(n for _, n in found) for name, found in total.items()}

        return self._client.read(mean)

    def _check_prompts(self, prompts: Sequence[str], where: str) -> None:
        """ValueError where the server's reward cannot judge one of them."""
        for first in range(0, len(prompts), PROMPTS_AT_ONCE):
            named = list(prompts[first : first + PROMPTS_AT_ONCE])
            values = {"prompts": named, "where": where, "metadata": self._known(named)}
            body = write_json({"version": wire.VERSION, **values})
            found = self._patiently(lambda body=body: self._posted("/check", body))
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

        return in_order(ask, pieces, self._parallel, self._client.is_over)

    def training_begins(self, folder: Path, images: Mapping[str, int]) -> str | None:
        """A server is waited for from now on."""
        self._client.is_over.clear()

    def training_ends(self) -> None:
        """What is still asked, by a thread that the training left behind, is asked in vain: it holds nobody."""
        self._client.is_over.set()

    def _patiently(self, ask: Callable[[], T], stop: threading.Event | None = None) -> T:
        return self._client.patiently(ask, stop, look=self._described)

    def _described(self) -> Served:
        """What the server serves now; ValueError where it is another reward than before."""
        answer = self._client.exchange("GET", "/reward", None)
        found = self._client.read(lambda: Served.read(read_json(answer)))
        if self._served is not None and found.digest != self._served.digest:
            self._refuse_another(found.name)
        self._served = found
        return found

    def _refuse_another(self, name: str) -> NoReturn:
        raise ValueError(
            f"{self._client.told('serves another reward than before')}: {name}, and it was {self.served.name}; serve "
            f"the same, with the same settings, then go on with train --resume"
        )

    def _posted(self, path: str, body: bytes) -> dict[str, Any]:
        served = self._served or self.served
        if len(body) > served.most_bytes:
            raise ValueError(
                f"{self._client.told('takes requests')} of at most {served.most_bytes} bytes, got one of {len(body)}; "
                f'start it with --max-bytes {len(body) * 2}, or set reward.encoding = "png"'
            )
        answer = self._client.exchange("POST", path, body)
        found = self._client.read(lambda: read_json(answer))
        if found.get("digest") != served.digest:
            if not isinstance(found.get("digest"), str):
                self._client.read(lambda: _refuse_answer("it does not say of which reward it is"))
            self._described()  # tells which one it is
            self._refuse_another("another")
        return found


def _refuse_answer(why: str) -> NoReturn:
    raise ValueError(why)
