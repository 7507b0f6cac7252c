"""`adascope-fast` as a function of its arguments: what it printed, and the exit code."""

import io
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from adascope_fast import cli

TINY = str(Path(__file__).parents[1] / "configs" / "tiny.toml")
PROGRESS = re.compile(r"(loading|counting|adding|reading|uploading|writing) |.+: \d+/\d+ (step|image|pair|it), ")
"""How a line of progress begins."""
SMALLEST = ["sampler.num_steps=4", "train.prompts_per_iteration=1", "evaluation.num_prompts=1"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def call(*arguments: str | Path) -> Outcome:
    """`adascope-fast ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["adascope-fast", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        cli.main()
    assert isinstance(stopped.value.code, int)
    return Outcome(stopped.value.code, out.getvalue(), err.getvalue())


def beside_progress(err: str) -> list[str]:
    """The lines on standard error but for those that tell the progress."""
    return [line for line in err.splitlines() if not PROGRESS.match(line)]


def refused(*arguments: str | Path) -> str:
    """The one line on standard error with which `arguments` are refused, after what tells that something is loaded."""
    outcome = call(*arguments)
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    (line,) = beside_progress(outcome.err)
    assert line.startswith("error: ")
    return line
