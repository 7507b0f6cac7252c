"""The examples run as they stand, on the smallest settings that go through every part."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
EXAMPLES = CHECKOUT / "examples"
TINY = str(CHECKOUT / "configs" / "tiny.toml")


def _run(folder: Path, name: str, *arguments: str) -> str:
    """What an example prints, run in a folder of its own as a person would."""
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_every_script_has_a_test():
    tested = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))
    assert {path.name for path in EXAMPLES.glob("*.py")} <= tested


def test_own_reward_trains_on_it(tmp_path: Path):
    printed = _run(tmp_path, "own_reward.py", TINY)
    assert re.search(r"redness -?\d\.\d+ -> -?\d\.\d+", printed)
    assert (tmp_path / "runs" / "own_reward" / "report.html").is_file()


def test_own_selector_trains_every_other_step(tmp_path: Path):
    assert _run(tmp_path, "own_selector.py", TINY).startswith("50% of the steps")
    assert (tmp_path / "runs" / "own_selector" / "report.html").is_file()


def test_own_algorithm_trains_the_best_image_of_each_prompt(tmp_path: Path):
    printed = _run(tmp_path, "own_algorithm.py", TINY, "selector.name=every_step")
    assert printed.startswith("50% of the steps")  # one of two images
    changes = ["algorithm.name=own_algorithm:Imitation", "algorithm.best=2", "run.folder=runs/named"]
    environment = os.environ | {"PYTHONPATH": f"{CHECKOUT}{os.pathsep}{EXAMPLES}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "adascope_fast.cli", "train", TINY, "selector.name=every_step", *changes]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "steps trained: 100%" in finished.stdout


def test_own_loop_trains_the_steps_of_the_interval(tmp_path: Path):
    printed = _run(tmp_path, "own_loop.py", "--iterations", "2", "--num-steps", "6", "--samples-per-prompt", "2")
    lines = re.findall(r"^(\d): reward \d\.\d+, (\d+)% of the steps", printed, flags=re.MULTILINE)
    assert [number for number, _ in lines] == ["0", "1"]
    assert all(0 < int(share) < 100 for _, share in lines)


def test_sd15_lora_is_planned_from_its_published_shape(tmp_path: Path):
    printed = _run(
        tmp_path, "sd15_lora.py", "--model", str(CHECKOUT / "adascope_fast" / "assets" / "published" / "sd15")
    )
    assert "unet 859.5 M" in printed
    assert list(tmp_path.iterdir()) == [], "a plan trains nothing"


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "outputs would hold this machine's paths"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in cells:
        exec(cell.replace("../configs/quickstart.toml", TINY), names)
    printed = capsys.readouterr().out
    assert "held-out reward" in printed
    assert printed.splitlines()[-1].endswith("report.html")
    assert (tmp_path / "runs" / "notebook" / "adapter").is_dir()


def test_a_script_for_trl_trains_and_saves(tmp_path: Path):
    fields = "--mixed_precision no --log_with tensorboard --num_epochs 2 --sample_num_steps 4 --sample_batch_size 2"
    printed = _run(tmp_path, "ddpo_from_trl.py", *fields.split(), "--selector", "adascope")
    assert "steps: AdaScope" in printed
    assert printed.rstrip().endswith("saved: ./save")
    assert (tmp_path / "save" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "save" / "checkpoints" / "checkpoint_0" / "state.safetensors").is_file()
    assert list((tmp_path / "logs" / "trl").glob("events*"))
