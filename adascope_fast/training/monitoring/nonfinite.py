"""Images, gradients and weights that are not finite: counted, told, and a reason to stop."""

from collections.abc import Iterable, Mapping
from typing import Any

from adascope_fast.config import Config


class NonFinite:
    """Counts over a run what was not finite, and stops it as `train.on_nonfinite` and `train.stop_after` say.

    Args:
        stats: the records of the iterations so far.
    """

    def __init__(self, config: Config, stats: Iterable[Mapping[str, Any]] = ()) -> None:
        self._config = config
        self.num_dropped = self.num_skipped = self._num_iterations = self._in_a_row = 0
        for record in stats:
            self._count(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Another iteration.

        Raises:
            FloatingPointError: it is a reason to stop.
        """
        self._count(record)
        train = self._config.train
        dropped, skipped = record["samples_dropped"], record["updates_skipped"]
        images = train.prompts_per_iteration * train.samples_per_prompt
        if train.on_nonfinite == "stop" and (dropped or skipped or record["nonfinite"]):
            raise FloatingPointError(
                f'train.on_nonfinite = "stop", and iteration {record["iteration"]} has {dropped} of {images} images '
                f"and {skipped} of {train.num_updates} updates that are not finite; {remedy(self._config)}"
            )
        if self._in_a_row >= train.stop_after:
            raise FloatingPointError(
                f"{self._in_a_row} iterations in a row (train.stop_after) made no finite update, the last with "
                f"{dropped} of {images} images not finite, so nothing is learned; {remedy(self._config)}"
            )

    def refuse_nothing_learned(self) -> None:
        """FloatingPointError where no iteration of the run made a finite update."""
        if self._num_iterations and self._in_a_row == self._num_iterations:
            raise FloatingPointError(
                f"none of the run's {self._num_iterations} iterations made a finite update, so nothing was learned; "
                f"{remedy(self._config)}"
            )

    def words(self) -> dict[str, str]:
        """What to show of it beside the progress; empty where all was finite."""
        counts = {"images not finite": self.num_dropped, "updates skipped": self.num_skipped}
        return {name: str(count) for name, count in counts.items() if count}

    def _count(self, record: Mapping[str, Any]) -> None:
        skipped = int(record.get("updates_skipped") or 0)
        self.num_dropped += int(record.get("samples_dropped") or 0)
        self.num_skipped += skipped
        self._num_iterations += 1
        self._in_a_row = self._in_a_row + 1 if skipped >= self._config.train.num_updates else 0


def remedy(config: Config) -> str:
    """What helps against numbers that are not finite."""
    dtype, rate = config.model.dtype, config.train.learning_rate
    if dtype == "float16":
        return 'float16 overflows beyond 65504: set model.dtype = "bfloat16" or "float32"'
    if config.train.mixed_precision == "fp16":
        return 'float16 overflows beyond 65504: set train.mixed_precision = "bf16" or "no"'
    steps = [f"lower train.learning_rate ({rate:g})"]
    if dtype != "float32" or config.train.mixed_precision != "no":
        steps.append('set model.dtype = "float32" and train.mixed_precision = "no"')
    return f"{', or '.join(steps)}; what was learned before is in the checkpoints"
