"""Where a run's numbers and images go besides its folder: accelerate's trackers, with one project and a name a run.

accelerate gives a tracker the project alone, and its `Accelerator` would call TensorBoard's folder after it. Here that
is `tensorboard` in the run's folder, and the others are told the run's name by the argument that each has for it.

Iterations are at the step of their number, from 0. An evaluation is at the number of iterations done before it.
"""

import math
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from accelerate import __version__ as accelerate_version
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from adascope_fast.config import Config, ConfigError
from adascope_fast.config.sections import RUN_NAME
from adascope_fast.reporting.images import grid
from adascope_fast.training.monitoring.callbacks import HeldOut

TAKE_A_LIST = ("swanlab", "tensorboard", "wandb")
"""Those whose `log_images` takes several images of a name; clearml's and aim's take one."""


class Trackers:
    """The trackers that a configuration names, started; none where it names none, or `is_quiet`."""

    def __init__(self, config: Config, *, is_quiet: bool = False) -> None:
        log, folder = config.log, Path(config.run.folder)
        name = log.run_name or folder.resolve().name
        self._trackers = [
            _made(tracker, log.project, name, folder) for tracker in dict.fromkeys([] if is_quiet else log.trackers)
        ]
        with redirect_stdout(sys.stderr):  # trackio greets on standard output
            for tracker in self._trackers:
                tracker.start()
                tracker.store_init_configuration(_flat(config.model_dump()))

    def on_iteration(self, record: Mapping[str, Any]) -> None:
        """The numbers of an iteration, as its line of `stats.jsonl` has them."""
        self._log(_numbers(record) | _numbers(record["seconds"], "seconds/"), step=record["iteration"])

    def on_evaluation(self, evaluation: HeldOut) -> None:
        """The held-out reward and what is measured with it, and the images as one."""
        if not self._trackers:
            return
        summary, step = evaluation.summary, evaluation.iteration
        numbers = _numbers(summary, "held_out/") | _numbers(summary.get("attributes", {}), "held_out/attributes/")
        self._log(numbers, step=step)
        pixels = grid(evaluation.images, evaluation.columns)
        for tracker in self._trackers:
            _log_image(tracker, "held_out/images", pixels, step)

    def close(self) -> None:
        """Have every tracker write what it has left."""
        with redirect_stdout(sys.stderr):
            for tracker in self._trackers:
                tracker.finish()

    def _log(self, numbers: Mapping[str, float], *, step: int) -> None:
        for tracker in self._trackers:
            tracker.log(dict(numbers), step=step)


def _made(tracker: str, project: str, name: str, folder: Path) -> Any:
    if tracker not in LOGGER_TYPE_TO_CLASS:
        raise ConfigError(
            f"log.trackers are those that accelerate {accelerate_version} knows ({', '.join(LOGGER_TYPE_TO_CLASS)}), "
            f"got {tracker!r}; upgrade accelerate, or leave it out"
        )
    made: Any = LOGGER_TYPE_TO_CLASS[tracker]
    if tracker == "tensorboard":
        return made("tensorboard", folder)
    more: dict[str, Any] = {RUN_NAME[tracker]: name} if tracker in RUN_NAME else {}
    return made(project, folder, **more) if made.requires_logging_directory else made(project, **more)


def _log_image(tracker: Any, name: str, pixels: Any, step: int) -> None:
    """An image [h, w, 3] of 8 bits; nothing where the tracker takes none."""
    if tracker.name == "trackio":  # accelerate has no `log_images` of it
        import trackio  # pyright: ignore[reportMissingImports] - installed by who names it

        tracker.log({name: trackio.Image(pixels)}, step=step)
    elif (log_images := getattr(tracker, "log_images", None)) is not None:
        more = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        log_images({name: pixels[None] if tracker.name in TAKE_A_LIST else pixels}, step=step, **more)


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """What of it is a finite number."""
    return {
        f"{prefix}{name}": value
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.field`, in types that trackers take."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
