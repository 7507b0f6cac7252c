"""The section `[prompts]`. Nothing here imports torch."""

from typing import Self

from pydantic import model_validator

from adascope_fast.settings import Section, Text

SETS = ("scenes", "animals")
"""The sets of prompts inside this package; each has `SET:train` and `SET:held_out`."""


class Prompts(Section):
    """Which prompts to train on and which to judge by: a built-in set (`scenes:train`, `animals:train`) or a file.

    A file is text with a prompt a line, or .jsonl, .csv or .tsv with a field `prompt`.
    """

    train: Text | None = None
    """Prompts of the rollouts; absent: `scenes:train` for the embedded models, for others they must be named."""
    held_out: Text | None = None
    """Prompts of the evaluation, never trained on; absent: the held-out part of the built-in set that `train` names."""

    @model_validator(mode="after")
    def _are_two(self) -> Self:
        if self.train is not None and self.train == self.held_out:
            raise ValueError(
                f"prompts.held_out must be prompts that are not trained on, got {self.held_out!r} for both; name "
                f'another file, or a built-in set, such as prompts.held_out = "scenes:held_out"'
            )
        if self.train is not None and self.held_out is None:
            raise ValueError(
                f"prompts.held_out must be named where prompts.train is, got prompts.train = {self.train!r} alone; "
                f"name a second file, with prompts that are not trained on, as prompts.held_out"
            )
        if self.held_out is not None and self.train is None:
            raise ValueError(
                f"prompts.train must be named where prompts.held_out is, got prompts.held_out = {self.held_out!r} "
                f"alone; name the prompts to train on as prompts.train"
            )
        return self


def held_out_of(train: object) -> str | None:
    """The held-out part of the built-in set whose training part is named, `scenes:held_out` for `scenes:train`."""
    return next((f"{name}:held_out" for name in SETS if train == f"{name}:train"), None)
