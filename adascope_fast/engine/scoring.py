"""Rewards of a rollout, computed while the rollout goes on.

On a GPU the pictures of a finished batch are decoded at once and scored by a thread on a stream of its own, so a reward
that works on the CPU, or waits for a server, delays nothing. On the CPU there is nothing to overlap with: all is done
when the rewards are asked for.

No reward sees an image that is not finite, or that was made of such latents: its score is NaN.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from adascope_fast.backbone import Backbone, Reward
from adascope_fast.rollout import Candidates


class Scoring:
    """Decodes and scores batches as they come: `submit` each, then `rewards` once. `overlap` None: on a GPU."""

    def __init__(self, backbone: Backbone, reward: Reward, prompts: list[str], *, overlap: bool | None = None) -> None:
        self._backbone, self._reward, self._prompts, self._overlap = backbone, reward, prompts, overlap
        self._results: list[Future[Scores] | tuple[slice, Tensor]] = []
        self.parts: dict[str, Tensor] = {}
        """Scores [b] of each part of a reward that has several, NaN as the rewards are; known with `rewards`."""
        self._pool: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=kind is not None)

    def clear(self) -> None:
        """Forget the batches so far."""
        self._results.clear()

    def submit(self, rows: slice, latents: Float[Tensor, "m *latent"]) -> None:
        """Score the samples `rows`, whose final latents are given."""
        if not (latents.is_cuda if self._overlap is None else self._overlap):
            self._results.append((rows, latents))
            return
        images, prompts = decoded_whole(self._backbone, latents), self._prompts[rows]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "reward")
            self._stream = torch.cuda.Stream(latents.device) if latents.is_cuda else None
        decoded = None if self._stream is None else torch.cuda.current_stream(latents.device).record_event()
        self._results.append(self._pool.submit(self._score_aside, images, prompts, decoded))

    def rewards(self) -> Float32[Tensor, " b"]:
        """The reward of every sample, in order, NaN where its image is not finite; waits for the thread.

        An error of the reward is raised here.
        """
        values = [result.result() if isinstance(result, Future) else self._now(*result) for result in self._results]
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self.parts = _joined([parts for _, parts in values], [len(scores) for scores, _ in values])
        return torch.cat([scores for scores, _ in values])

    def _now(self, rows: slice, latents: Tensor) -> "Scores":
        return scored(self._reward, decoded_whole(self._backbone, latents), self._prompts[rows])

    @torch.no_grad()
    def _score_aside(self, images: Tensor, prompts: list[str], decoded: Any) -> "Scores":
        with torch.cuda.stream(self._stream):
            if self._stream is not None:
                self._stream.wait_event(decoded)
                images.record_stream(self._stream)
            return scored(self._reward, images, prompts)


class RewardOfGuess:
    """A step-aware preference model out of a reward: that of the decoded guess of the image from each candidate."""

    def __init__(self, backbone: Backbone, reward: Reward) -> None:
        self._backbone, self._reward = backbone, reward

    def __call__(self, candidates: Candidates) -> Float32[Tensor, " n"]:
        """NaN where guess or image are not finite."""
        return score_finite(self._reward, decoded_whole(self._backbone, candidates.clean()), candidates.prompts)


def decoded_whole(backbone: Backbone, latents: Float[Tensor, "m *latent"]) -> Float[Tensor, "m 3 h w"]:
    """Images of latents, NaN throughout where latents or image are not finite; autocast is the denoiser's alone."""
    with torch.autocast(latents.device.type, enabled=False):
        images = backbone.decode(latents)
    is_whole = latents.flatten(1).isfinite().all(1) & images.flatten(1).isfinite().all(1)
    return torch.where(is_whole[:, None, None, None], images, torch.nan)


def score_finite(reward: Reward, images: Float[Tensor, "m 3 h w"], prompts: list[str]) -> Float32[Tensor, " m"]:
    """The reward of the images that are finite, which alone it is shown; NaN for the others."""
    return scored(reward, images, prompts)[0]


Scores = tuple[Tensor, dict[str, Tensor]]
"""Scores [m] of a reward, and of each of its parts by name; none of a reward without parts."""


def scored(reward: Reward, images: Float[Tensor, "m 3 h w"], prompts: list[str]) -> Scores:
    """The same with the reward's parts, where it has a method `with_parts`."""
    is_finite = images.flatten(1).isfinite().all(1)
    if bool(is_finite.all()):
        return _asked(reward, images, prompts)
    rows = is_finite.nonzero()[:, 0]
    nothing = torch.full((len(images),), torch.nan, device=images.device)
    if not len(rows):
        return nothing, {}
    scores, parts = _asked(reward, images[rows], [prompts[row] for row in rows.tolist()])
    spread = [nothing.index_copy(0, rows, values.float()) for values in (scores, *parts.values())]
    return spread[0], dict(zip(parts, spread[1:], strict=True))


def _asked(reward: Reward, images: Tensor, prompts: list[str]) -> Scores:
    with_parts: Any = getattr(reward, "with_parts", None)
    return (reward(images, prompts), {}) if with_parts is None else with_parts(images, prompts)


def _joined(batches: list[dict[str, Tensor]], sizes: list[int]) -> dict[str, Tensor]:
    """The parts of all batches, NaN for a batch in which nothing was scored; ValueError where names differ."""
    told = [parts for parts in batches if parts]
    if not told:
        return {}
    names = list(told[0])
    for parts in told:
        if parts.keys() != told[0].keys():
            raise ValueError(
                f"a reward must have the same parts for all images, got {', '.join(names)} and {', '.join(parts)}; "
                f"return each of them every time"
            )
    like = told[0][names[0]]
    return {
        name: torch.cat(
            [
                parts[name] if parts else like.new_full((size,), torch.nan)
                for parts, size in zip(batches, sizes, strict=True)
            ]
        )
        for name in names
    }
