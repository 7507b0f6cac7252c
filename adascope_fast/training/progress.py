"""Progress bars with the time left: one for the run, one for the part at work. Quiet where nobody watches."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class Progress:
    """Bars on standard error; without a terminal only the run's own line, every ten seconds."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._is_terminal = sys.stderr.isatty()
        self._run: Any = None
        self._inner: Any = None

    def start(self, first: int, total: int) -> None:
        """Open the run's bar at iteration `first` of `total`."""
        pause = 0.1 if self._is_terminal else 10.0
        self._run = tqdm(
            initial=first, total=total, desc="training", unit="it", disable=self._quiet, mininterval=pause, position=0
        )

    def part(self, name: str, done: int, total: int) -> None:
        """Show how far a part of the iteration is; a new name opens a new bar."""
        if self._quiet or not self._is_terminal:
            return
        if self._inner is None or self._inner.desc != f"{name}: ":
            self._close_inner()
            self._inner = tqdm(total=total, desc=name, unit="step", leave=False, position=1)
        self._inner.update(done - self._inner.n)

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
    def evaluation(self, total: int) -> Iterator[Callable[[int], None]]:
        """A bar for an evaluation of `total` steps; yields what to call with each number of steps done."""
        disable = self._quiet or not self._is_terminal
        with tqdm(total=total, desc="evaluation", unit="step", disable=disable, leave=False, position=1) as bar:

            def on_step(num_steps: int) -> None:
                bar.update(num_steps)

            yield on_step

    def say(self, line: str) -> None:
        """A line on standard error that the bars do not run into."""
        tqdm.write(line, file=sys.stderr)

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
