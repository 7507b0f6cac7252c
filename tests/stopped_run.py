"""`stopped_run.py WHERE ARGUMENTS...`: `adascope-fast` as a program that signals itself at a place of its training.

WHERE is JSON: the `rank` and `iteration`, the `place` (rollout, update, checkpoint), the `signals` to send,
whether to the launcher `too`, and the `folder` of a marker that says it was done, so that the process that is started
in its place is left alone; but the last of the processes then comes `late` by some seconds.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from adascope_fast import cli
from adascope_fast.backbones.base import PipelineBackbone
from adascope_fast.engine.engine import Engine
from adascope_fast.training import checkpoint
from adascope_fast.training.trainer import Trainer


class Stop:
    """Sends the signals at the second prediction of a part of the iteration, or in the midst of a checkpoint."""

    def __init__(
        self,
        *,
        rank: int,
        iteration: int,
        place: str,
        signals: list[str],
        folder: str,
        too: bool = False,
        late: float = 0.0,
    ) -> None:
        me, number = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        self.is_here, self.late = me == rank, late if me == number - 1 else 0.0
        self.iteration, self.place, self.signals = iteration, place, signals
        self.marker, self.too = Path(folder) / "signalled", too
        self.at, self.part, self.calls = -1, "", 0

    def arm(self) -> None:
        """Put itself where it is called; a process that is started after the signals waits instead."""
        if self.marker.exists():
            time.sleep(self.late)
            return
        for owner, name in (
            (Engine, "step"),
            (Engine, "_part"),
            (PipelineBackbone, "predict"),
            (Trainer, "_save"),
            (checkpoint, "follow_umask"),
        ):
            setattr(owner, name, self.before(name, getattr(owner, name)))

    def before(self, name: str, inner: Any) -> Any:
        def called(*arguments: Any, **keys: Any) -> Any:
            getattr(self, name)(*arguments, **keys)
            return inner(*arguments, **keys)

        return called

    def step(self, *_: Any, iteration: int, **__: Any) -> None:
        self.at, self.part = iteration, ""

    def _part(self, _: Any, name: str) -> None:
        self.part, self.calls = name, 0

    def predict(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == 2:
            self.reach(self.part)

    def _save(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.ranks.is_first:  # which has nothing to write
            self.reach("checkpoint")

    def follow_umask(self, partial: Path) -> None:
        if partial.name.endswith(".partial") and (partial / checkpoint.SUMS).is_file():
            self.reach("checkpoint")

    def reach(self, place: str) -> None:
        if not self.is_here or (self.at, place) != (self.iteration, self.place) or self.marker.exists():
            return
        self.marker.touch()
        for name in self.signals:
            if self.too:
                os.kill(os.getppid(), signal.Signals[name])
            os.kill(os.getpid(), signal.Signals[name])


if __name__ == "__main__":
    if where := json.loads(sys.argv.pop(1)):
        Stop(**where).arm()
    cli.main()
