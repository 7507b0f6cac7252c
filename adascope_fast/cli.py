"""The command line: `adascope-fast train | sample | merge | pretrain | plan | calibrate | config | report | explain`.

A user's mistake is one line on standard error and exit code 2; ADASCOPE_FAST_DEBUG=1 shows where it was raised.
What each command does is in `commands`.
"""

import os
import signal
import sys
from typing import Any

import typer

from adascope_fast.commands.calibrate import calibrate
from adascope_fast.commands.config import config
from adascope_fast.commands.explain import explain
from adascope_fast.commands.merge import merge
from adascope_fast.commands.plan import plan
from adascope_fast.commands.pretrain import pretrain
from adascope_fast.commands.report import report
from adascope_fast.commands.sample import sample
from adascope_fast.commands.train import train
from adascope_fast.lazy import refuse_broken_torchvision

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="RL fine-tuning of diffusion and flow image models that trains only the denoising steps where it pays.",
)
for command in (train, sample, merge, pretrain, plan, calibrate, config, report, explain):
    app.command()(command)


def main() -> None:
    """Entry point of the `adascope-fast` command."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        try:
            app()
        except (ImportError, RuntimeError):
            refuse_broken_torchvision()
            raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("ADASCOPE_FAST_DEBUG") == "1":
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
