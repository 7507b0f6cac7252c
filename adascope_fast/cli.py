"""The command line: `adascope-fast train | sample | merge | plan | ...`; a command is a file of `commands`.

A user's mistake is one line on standard error and exit code 2; what failed on the way, numbers that are not finite or a
full disk, is one line and exit code 1; ADASCOPE_FAST_DEBUG=1 shows where it was raised. SIGINT, SIGTERM and SIGHUP end
with exit code 130, `train` after SIGTERM with 143. What each command does is in `commands`.
"""

# ruff: noqa: E402 - a signal is answered from the first line on, while libraries are being imported

from adascope_fast.commands.signals import answered_by, leave

_loading = answered_by(leave)
_loading.__enter__()

import errno
import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from adascope_fast.commands.calibrate import calibrate
from adascope_fast.commands.config import config
from adascope_fast.commands.evaluate import evaluate
from adascope_fast.commands.explain import explain
from adascope_fast.commands.import_weights import import_weights
from adascope_fast.commands.init import init
from adascope_fast.commands.judge import judge
from adascope_fast.commands.launch import launch
from adascope_fast.commands.make_preferences import make_preferences
from adascope_fast.commands.merge import merge
from adascope_fast.commands.plan import plan
from adascope_fast.commands.pretrain import pretrain
from adascope_fast.commands.push import push
from adascope_fast.commands.report import report
from adascope_fast.commands.reward_server import reward_server
from adascope_fast.commands.rollout_server import rollout_server
from adascope_fast.commands.sample import sample
from adascope_fast.commands.train import train
from adascope_fast.commands.train_preference_model import train_preference_model
from adascope_fast.lazy import refuse_broken_torchvision

_loading.__exit__(None, None, None)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    init,
    train,
    make_preferences,
    train_preference_model,
    sample,
    evaluate,
    merge,
    push,
    import_weights,
    pretrain,
    reward_server,
    rollout_server,
    plan,
    calibrate,
    config,
    report,
    explain,
    judge,
):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(launch)


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        print(f"adascope-fast {version('adascope-fast')}")
        raise typer.Exit


@app.callback()
def program(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Say which it is.")
    ] = False,
) -> None:
    """RL fine-tuning of diffusion and flow image models that trains only the denoising steps where it pays."""


def main() -> None:
    """Entry point of the `adascope-fast` command."""
    try:
        with answered_by(leave):
            try:
                app()
            except (ImportError, RuntimeError):
                refuse_broken_torchvision()
                raise
    except (ValueError, OSError, FloatingPointError, MemoryError, RecursionError, RuntimeError) as error:
        if os.environ.get("ADASCOPE_FAST_DEBUG") == "1" or _is_a_fault(error):
            raise
        if not getattr(error, "is_told", False):  # the first process of a run has told it
            rank = os.environ.get("RANK", "0")
            where = "error" if rank == "0" else f"error in process {rank}"
            print(f"{where}: {_in_one_line(error)}", file=sys.stderr)
        sys.exit(1 if _came_on_the_way(error) else 2)


def _came_on_the_way(error: Exception) -> bool:
    """Whether it failed although what was asked for could be done: numbers, memory, or a disk that is full or fails."""
    if isinstance(error, OSError):
        return error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    return not isinstance(error, ValueError)


def _is_a_fault(error: Exception) -> bool:
    """Whether it is ours, and its traceback worth more than its words: torch tells a want of memory so, too."""
    is_memory = "memory" in str(error).lower() or "allocate" in str(error).lower()
    return isinstance(error, RuntimeError) and not is_memory


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError | RuntimeError) and "train." not in text:
        return f"memory ran out ({text[:200]}); lower model.resolution, train.rollout_batch or train.microbatch"
    return text


if __name__ == "__main__":
    main()
