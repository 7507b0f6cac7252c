"""What one's own code is told of a run while it goes on, and how it ends it.

How it differs from transformers' callbacks: three occasions, no state object, and a method returns "stop" where the run
shall end after its checkpoint and its last evaluation. Nothing that a callback does to what it is given reaches the
training.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from adascope_fast.settings import blamed

OCCASIONS = ("on_iteration", "on_evaluation", "on_checkpoint")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """A held-out evaluation.

    `summary` has `mean`, `low` and `high` of the reward, `diversity`, `contrast`, and `attributes` where the reward has
    parts, as `evaluation.json` has them.
    """

    iteration: int
    """Iterations that were done before."""
    name: str | None
    """"before" or "after" the training, None in its course."""
    summary: Mapping[str, Any]
    images: Float[Tensor, "n 3 h w"]
    """Of the first prompts, row by row, on the CPU, in [0, 1]."""
    prompts: Sequence[str]
    """Those of the images, one a row."""

    @property
    def columns(self) -> int:
        """Images of a prompt."""
        return len(self.images) // len(self.prompts)


class Callback:
    """A follower of a run: a subclass has any of these methods, and each may return "stop"."""

    def on_iteration(self, record: dict[str, Any]) -> str | None:
        """An iteration is over; `record` is its line of `stats.jsonl`."""

    def on_evaluation(self, evaluation: HeldOut) -> str | None:
        """The held-out reward was measured: before the training, in its course, after it."""

    def on_checkpoint(self, path: Path) -> str | None:
        """A checkpoint was written to this folder."""


class Callbacks:
    """Callbacks as one, in their order; `stopped_by` names the first that said "stop"."""

    def __init__(self, given: Sequence[Any]) -> None:
        if not isinstance(given, Sequence):
            raise ValueError(f"callbacks is a list of them, got {type(given).__name__}; put it into a list")
        self._given = list(given)
        self.stopped_by: str | None = None
        for callback in self._given:
            if isinstance(callback, type) or not any(callable(getattr(callback, one, None)) for one in OCCASIONS):
                got = f"the class {callback.__name__}" if isinstance(callback, type) else type(callback).__name__
                raise ValueError(
                    f"a callback is an object with one of the methods {', '.join(OCCASIONS)}, got {got}; give an "
                    f"instance of a subclass of adascope_fast.Callback"
                )
            for method in (name for name in dir(callback) if name.startswith("on_") and name not in OCCASIONS):
                logger.warning(
                    "callback %s has a method %s, which is never called; those that are called are %s",
                    *(type(callback).__name__, method, ", ".join(OCCASIONS)),
                )

    def on_iteration(self, record: Mapping[str, Any]) -> None:
        """Tell all of an iteration."""
        self._tell("on_iteration", record)

    def on_evaluation(self, evaluation: HeldOut) -> None:
        """Tell all of an evaluation."""
        self._tell("on_evaluation", evaluation)

    def on_checkpoint(self, path: Path) -> None:
        """Tell all of a checkpoint."""
        self._tell("on_checkpoint", path)

    def _tell(self, occasion: str, told: Any) -> None:
        for callback in self._given:
            method, name = getattr(callback, occasion, None), type(callback).__name__
            if method is None:
                continue
            try:
                answer = method(copy.deepcopy(told))
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                raise ValueError(f"callback {name} raised {blamed(error)}; correct it there") from error
            if answer == "stop":
                self.stopped_by = self.stopped_by or name
            elif answer is not None:
                raise ValueError(f'{occasion} of callback {name} must return "stop" or None, got {answer!r:.80}')
