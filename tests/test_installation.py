"""What is installed beside the package and breaks it is named, with the command that cures it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
NMS = "operator torchvision::nms does not exist"


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds a torchvision of another torch."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f'raise RuntimeError("{NMS}")\n')
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.28.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"
    )
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(CHECKOUT)]), "HF_HUB_OFFLINE": "1"}


def _run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def _command(*arguments: str) -> str:
    return f"import sys; sys.argv = ['adascope-fast', *{arguments!r}]; from adascope_fast import cli; cli.main()"


def test_a_torchvision_of_another_torch_is_one_line_with_its_cure(broken: dict[str, str], tmp_path: Path):
    tiny = str(CHECKOUT / "configs" / "tiny.toml")
    done = _run(_command("train", tiny, f"run.folder={tmp_path / 'run'}"), broken)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    *_, line = done.stderr.splitlines()  # after the progress
    assert line.startswith("error: torchvision must fit torch 2.")
    assert f"torchvision 0.28.0 cannot be imported ({NMS})" in line
    assert "pip uninstall torchvision" in line


def test_it_is_said_to_users_of_the_package_too(broken: dict[str, str]):
    done = _run("from adascope_fast import Trainer; Trainer('scenes', quiet=True)", broken)
    assert done.stderr.splitlines()[-1].startswith("ValueError: torchvision must fit torch"), done.stderr


def test_what_needs_no_torchvision_runs_beside_it(broken: dict[str, str]):
    done = _run(_command("explain"), broken)
    assert done.returncode == 0, done.stderr


def test_another_failure_is_not_blamed_on_a_torchvision_that_works(broken: dict[str, str], tmp_path: Path):
    (tmp_path / "torchvision" / "__init__.py").write_text("")
    code = "from adascope_fast.lazy import lazy; lazy('adascope_fast', {'Trainer': 'no_such_module'})('Trainer')"
    done = _run(code, broken)
    assert "ModuleNotFoundError: No module named 'adascope_fast.no_such_module'" in done.stderr.splitlines()[-1]
