"""Which held-out evaluation was the best so far, and its weights: kept in the run's folder, exported at its end."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adascope_fast.config import Config
from adascope_fast.config.sections import Evaluation
from adascope_fast.distributed import Ranks
from adascope_fast.reporting.files import json_object, text_of
from adascope_fast.training import checkpoint

if TYPE_CHECKING:
    from adascope_fast.backbones import PipelineBackbone

FOLDER = "best"
"""Where the weights lie in a run's folder."""


def best_of(history: Sequence[Mapping[str, Any]]) -> int | None:
    """The iteration with the highest mean, of those after training has begun; the earliest of equal ones."""
    trained = [point for point in history if point["iteration"] and point["mean"] is not None]
    return max(trained, key=lambda point: (point["mean"], -point["iteration"]))["iteration"] if trained else None


def since_best(history: Sequence[Mapping[str, Any]]) -> int:
    """Evaluations since the one with the highest mean, that of the model before training counted."""
    known = [point for point in history if point["mean"] is not None]
    best = max(known, key=lambda point: (point["mean"], -point["iteration"]), default=None)
    return 0 if best is None else len([point for point in history if point["iteration"] > best["iteration"]])


def looked(
    run: Path,
    iteration: int,
    settings: Evaluation,
    backbone: "PipelineBackbone",
    *,
    averaged: Callable[[], AbstractContextManager[None]],
    ranks: Ranks,
) -> bool:
    """Keep the weights of an evaluation that is the best so far; whether the run has waited too long for one.

    The weights that were the best before stay until a checkpoint knows of these.

    Args:
        averaged: within it the model has the weights that were evaluated.

    Raises:
        FloatingPointError: they are not finite.
    """
    history = ranks.by_first(lambda: _history(run))
    if settings.keep_best and best_of(history) == iteration:
        with averaged():
            tensors = backbone.adapter_tensors()
            ranks.by_first(lambda: checkpoint.save(_place(run, iteration), tensors, {"next_iteration": iteration}))
    return bool(settings.patience) and since_best(history) >= settings.patience


def better_than_last(run: Path, last: int, ranks: Ranks) -> tuple[int, dict[str, Tensor]] | None:
    """Iteration and weights of the best evaluation, on all ranks; None where it is the last.

    ValueError where the weights are not as they were written.
    """
    best = ranks.by_first(lambda: best_of(_history(run)))
    if best is None or best == last:
        return None
    found = ranks.by_first(lambda: checkpoint.load(_place(run, best)).tensors)
    return best, ranks.tensors_of_first(found)


def best_weights(run: Path, config: Config) -> dict[str, Tensor] | None:
    """What a run of `evaluation.keep_best` exports; None where that is its last weights."""
    kept = checkpoint.numbered(run / FOLDER) if config.evaluation.keep_best else []
    best = best_of(_history(run)) if kept else None
    return checkpoint.load(kept[-1]).tensors if kept and kept[-1].name == f"{best or 0:06d}" else None


def _place(run: Path, iteration: int) -> Path:
    return run / FOLDER / f"{iteration:06d}"


def _history(run: Path) -> list[dict[str, Any]]:
    return json_object(text_of(run / "evaluation.json")).get("history", [])
