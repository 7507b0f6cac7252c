"""How far a run is, on standard error: bars with the time left in a terminal, lines elsewhere. Imports no torch.

In a terminal one bar is the run's, one that of the part at work. Elsewhere, as in a log, a line is written where a part
begins, every ten seconds, and where it ends; parts of an iteration that are over sooner than that are left out.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

PAUSE_S = 10.0
"""Between two lines, where there is no terminal."""


class Progress:
    """What is shown of a run; nothing where it is `quiet`."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet or os.environ.get("RANK", "0") != "0"  # of several processes the first one tells
        self._run: Any = None
        self._inner: Any = None
        self._part = ""

    def start(self, first: int, total: int) -> None:
        """Open the run's bar at iteration `first` of `total`."""
        self._run = bar("training", total, unit="it", first=first, quiet=self._quiet, stays=True)

    def part(self, name: str, done: int, total: int) -> None:
        """Show how far a part of the iteration is; a new name opens a new bar."""
        if self._inner is None or self._part != name:
            self._close_inner()
            self._inner, self._part = bar(name, total, quiet=self._quiet, position=1, delay=PAUSE_S), name
        self._inner.update(done - self._inner.n)
        if done >= total:
            self._close_inner()

    def done(self, record: Mapping[str, Any], more: Mapping[str, str] | None = None) -> None:
        """An iteration is over; `more` is shown beside what is always shown."""
        self._close_inner()
        chosen = record["selector"]
        named = "accuracy" if record["reward_mean"] is None else "reward_mean"  # without a reward, of a set's records
        shown = {named.removesuffix("_mean"): f"{record.get(named, math.nan):.3f}"}
        shown["trained"] = f"{record['fraction_trained']:.0%}"
        if "sensing_share" in record:
            shown["sensing"] = f"{record['sensing_share']:.0%}"
        if "mean_start" in chosen:
            shown["interval"] = f"[{chosen['mean_start']:.1f}, {chosen['mean_end']:.1f})"
        self._run.set_postfix(shown | dict(more or {}), refresh=False)
        self._run.update()

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "step") -> Iterator[Callable[[int], None]]:
        """A bar for what comes before or between iterations; yields what to call with each number of steps done.

        Args:
            total: steps of it; None: they cannot be counted, and it is said that it has begun.
        """
        self._close_inner()
        with bar(name, total, unit=unit, quiet=self._quiet, position=int(self._run is not None)) as shown:

            def on_step(num_steps: int) -> None:
                shown.update(num_steps)

            yield on_step

    @contextmanager
    def loading(self, name: str) -> Iterator[Callable[[str], None]]:
        """What is said while a model is loaded; yields what to call with the name of each part that is read."""
        self._close_inner()
        with bar(f"loading {name}", None, quiet=self._quiet) as shown:
            yield lambda part: shown.set_description_str(f"loading {name}: {part}")

    def say(self, line: str) -> None:
        """A line on standard error that the bars do not run into."""
        if sys.stderr.isatty():
            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bars away."""
        self._close_inner()
        if self._run is not None:
            self._run.close()
            self._run = None

    def _close_inner(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None


def import_libraries(progress: Progress | None = None) -> None:
    """Import torch, diffusers and transformers, and say so, since it takes seconds; nothing where that was done."""
    if "adascope_fast.backbones.loading" not in sys.modules:
        with (progress or Progress()).stage("loading torch and diffusers"):
            from adascope_fast.backbones import load  # noqa: F401 - its door says what is wrong with a torchvision


def bar(
    name: str,
    total: int | None,
    *,
    unit: str = "step",
    first: int = 0,
    quiet: bool = False,
    stays: bool = False,
    position: int = 0,
    delay: float = 0.0,
) -> "tqdm[Any]":
    """A bar in a terminal, `Lines` elsewhere.

    Args:
        total: steps of it; None: they cannot be counted.
        stays: the bar is left where it is in the end.
        delay: seconds before the first line, where there is no terminal.
    """
    shared: dict[str, Any] = {"desc": name, "total": total, "unit": unit, "initial": first, "disable": quiet}
    if not sys.stderr.isatty():
        return Lines(**shared, delay=delay)
    whole = None if total is not None else "{desc}"
    return tqdm(**shared, leave=stays, position=position, bar_format=whole)


class Lines(tqdm):
    """A tqdm for what is no terminal: it writes a line where a bar would be drawn again."""

    def __init__(self, *, total: int | None, delay: float, **options: Any) -> None:
        self._written: Any = None
        line = "{desc}" if total is None else "{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed}, {remaining} left{postfix}"
        super().__init__(
            total=total, delay=delay, mininterval=PAUSE_S, bar_format=line, leave=False, position=1, **options
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the line, unless it says what the last one said."""
        if msg is None and self._written != (self.desc, self.n):
            self._written = self.desc, self.n
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return True

    def clear(self, nolock: bool = False) -> None:
        """What is written stays."""

    def close(self) -> None:
        """Write the last line, where one was written before and there is more to say."""
        if not self.disable and self.total is not None and self.last_print_t >= self.start_t + self.delay:
            self.display()
        super().close()
