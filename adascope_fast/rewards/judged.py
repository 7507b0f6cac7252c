"""People as the reward: a page shows the images of a batch, the training waits for their stars and goes on.

`b` images. One star is 0, five are 1. An image that everyone skipped has the mean of the others of its prompt in the
batch, or of the batch where all of the prompt's were skipped, or 0.5 where all were: it then weighs nothing.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from adascope_fast.judging.pages import MOST_BYTES, rating
from adascope_fast.judging.ratings import MOST_STARS, Ratings, Stopped
from adascope_fast.rewards.reward import eight_bits
from adascope_fast.serving import Aside, new_token, require


class Judged:
    """A score for each image from the stars that people give it on a page of this machine.

    Args:
        question: the key of what the stars are for.
        votes_per_image: different people who rate each image.
        host, port: where the page is served; port 0: a free one.
        out: folder of the votes; None: `judge` in the run's folder.
    """

    name = "judge"
    refuses_several = "the judge has one page, which one process shows"

    def __init__(self, *, question: str, votes_per_image: int, host: str, port: int, out: str | None = None) -> None:
        require()
        self.question, self.votes_per_image, self.host, self.port = question, votes_per_image, host, port
        self._out = None if out is None else Path(out)
        self._ratings: Ratings | None = None
        self._server: Any = None
        self._stage = ""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [b] in [0, 1], once people have given them."""
        ratings = self._shown()
        pixels = eight_bits(images)
        before = ratings.num_skipped
        try:
            stars = ratings.ask(pixels, prompts)
        except Stopped:
            raise ValueError("the training ended while it waited for people; resume it to go on") from None
        if skipped := ratings.num_skipped - before:
            self._say(f"judge: {skipped} images were skipped and have the mean of their prompt's")
        scores = [None if one is None else (one - 1) / (MOST_STARS - 1) for one in stars]
        return torch.tensor(filled(scores, prompts), dtype=torch.float32, device=images.device)

    def training_begins(self, folder: Path, images: Mapping[str, int]) -> str:
        """Show the page, and keep the votes in the run's folder; says how many will be asked for."""
        if self._out is None:
            self._out = folder / "judge"
        self._shown()
        parts = " and ".join(f"{count * self.votes_per_image} of {what}" for what, count in images.items() if count)
        return (
            f"judge: this training will wait for {sum(images.values()) * self.votes_per_image} ratings by people, "
            f"{parts}; fewer: train.iterations, train.prompts_per_iteration, train.samples_per_prompt, "
            f"evaluation.num_prompts, evaluation.samples_per_prompt"
        )

    def training_stage(self, words: str) -> None:
        """Say on the page what the next images are of."""
        self._stage = words
        if self._ratings is not None:
            self._ratings.stage(words)

    def training_ends(self) -> None:
        """Take the page away; a call that waits ends with an error. A later call shows another page."""
        if self._ratings is not None:
            self._ratings.stop()
            self._server.stop()
        self._ratings = self._server = None

    def _shown(self) -> Ratings:
        if self._ratings is None:
            folder = self._out or Path("runs") / "judge"
            ratings = Ratings(folder, question=self.question, votes_per_image=self.votes_per_image)
            ratings.stage(self._stage)
            token = new_token()
            self._server = Aside(rating(ratings), host=self.host, port=self.port, token=token, most_bytes=MOST_BYTES)
            self._ratings = ratings
            self._say(f"judge: rate the images at {self._server.address}/?token={token}")
        return self._ratings

    def _say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)


def filled(scores: Sequence[float | None], prompts: Sequence[str]) -> list[float]:
    """The scores with the mean of its prompt's in place of each None; else of all; else 0.5."""
    by_prompt: dict[str, list[float]] = {}
    for score, prompt in zip(scores, prompts, strict=True):
        if score is not None:
            by_prompt.setdefault(prompt, []).append(score)
    known = [score for score in scores if score is not None]
    overall = sum(known) / len(known) if known else 0.5
    means = {prompt: sum(values) / len(values) for prompt, values in by_prompt.items()}
    return [
        means.get(prompt, overall) if score is None else score for score, prompt in zip(scores, prompts, strict=True)
    ]
