"""The section `[prompts]`. Nothing here imports torch."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from adascope_fast.settings import Section, Seed, Text

SETS = ("scenes", "animals", "activities", "compositions")
"""The sets of prompts inside this package; each has `SET:train` and `SET:held_out`."""


class Prompts(Section):
    """Which prompts to train on and which to judge by: a built-in set (`scenes:train`, `animals:train`), a file, or a
    data set of Hugging Face's `datasets` (`datasets:owner/name:split`).

    A file is text with a prompt a line, or .jsonl, .csv, .tsv or .parquet with a column of prompts.
    """

    train: Text | None = None
    """Prompts of the rollouts; absent: `scenes:train` for the embedded models, for others they must be named."""
    held_out: Text | None = None
    """Prompts of the evaluation, never trained on; absent: the held-out part of the built-in set that `train` names, or
    a share of what `train` names, which is then not trained on."""
    column: Text = "prompt"
    """Column of a table, or field of a .jsonl, that has the prompts; the others are their metadata."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the different prompts that is held out where no held-out prompts are named."""
    seed: Seed = 0
    """Which of them are: the same ones for the same seed, on every machine."""

    @model_validator(mode="after")
    def _are_two(self) -> Self:
        if self.train is not None and self.train == self.held_out:
            raise ValueError(
                f"prompts.held_out must be prompts that are not trained on, got {self.held_out!r} for both; name "
                f'another file, or a built-in set, such as prompts.held_out = "scenes:held_out"'
            )
        if self.held_out is None and self.train in [f"{name}:held_out" for name in SETS]:
            name = self.train.partition(":")[0]
            raise ValueError(
                f"the held-out part of a built-in set is there to judge by, got prompts.train = {self.train!r} alone; "
                f'set prompts.train = "{name}:train"'
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
