"""SPO by the command line: the preference model that is trained for it, runs with it and without, what is refused."""

import json
from pathlib import Path

import pytest
from command_line import SMALLEST, TINY, call, refused
from safetensors.torch import load_file
from small_runs import lines_of

from adascope_fast.preferences import StepAwareModel

SPO = ["algorithm.name=spo", "algorithm.margin=0", "algorithm.temperature=0.001", "selector.name=every_step"]
REWARDS = """
def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

def stopped(images, prompts, calls=[]):
    calls.append(1)
    if len(calls) == {call}:
        raise KeyboardInterrupt
    return redness(images, prompts)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a preference model that has hardly been trained."""
    folder = tmp_path_factory.mktemp("preference") / "model"
    options = ["--out", folder, "--prompts", "2", "--samples", "8", "--steps", "2"]
    outcome = call("train-preference-model", TINY, *SMALLEST, *options)
    assert outcome.code == 0, outcome
    (folder.parent / "printed.txt").write_text(outcome.out)
    return folder


def test_the_folder_holds_what_was_printed(made: Path):
    assert sorted(path.name for path in made.iterdir()) == ["config.json", "model.safetensors"]
    described = json.loads((made / "config.json").read_text())
    printed = (made.parent / "printed.txt").read_text()
    assert described["model"] == "scenes"
    assert described["latent_shape"] == [8, 8, 8]
    assert described["reward"] == "scene_attributes"
    levels = described["held_out"]["levels"]
    assert f"of {described['held_out']['pairs']} pairs of held-out prompts" in printed
    assert len(levels) == 4
    assert levels[-1]["timestep"] == 0
    for number, level in enumerate(levels, 1):
        assert f"after step   {number} of 4  {level['accuracy']:.3f}" in printed
    model = StepAwareModel.load(made)
    assert sum(parameter.numel() for parameter in model.parameters()) < 400_000


@pytest.mark.parametrize("preference", ["reward", "folder"])
@pytest.mark.parametrize("selector", ["adascope", "late_start"])
def test_a_run_with_either_preference_model(tmp_path: Path, made: Path, preference: str, selector: str):
    name = made if preference == "folder" else "reward"
    options = [*SPO[:3], f"selector.name={selector}", f"algorithm.preference_model={name}", "train.iterations=1"]
    folder = tmp_path / "run"
    outcome = call("train", TINY, *SMALLEST, *options, f"run.folder={folder}")
    assert outcome.code == 0, outcome
    (line,) = lines_of(folder)
    # Two images of 4 steps; step 1 to 3 are branched, and after 1 and 2 each of 4 candidates may cost a guess.
    assert line["forwards_sampled"] == 8 + (2 * 4 * 2 if preference == "reward" else 0)
    assert line["ratio_max_deviation"] == 0, "before the first update the policy is the reference"
    if preference == "folder":
        assert line["pairs_trained"] > 0
        assert line["loss"] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize("preference", ["reward", "folder"])
def test_a_stopped_run_repeats_bit_for_bit(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch, preference: str
):
    """Stopped in the second iteration: a call for the evaluation, then one for the image and one a candidate."""
    calls = {"reward": 1 + 1 + 3 * 4 + 2, "folder": 3}[preference]
    module = f"rewards_of_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(REWARDS.format(call=calls))
    monkeypatch.syspath_prepend(".")
    monkeypatch.chdir(tmp_path)
    name = made if preference == "folder" else "reward"
    options = [*SMALLEST, *SPO, f"algorithm.preference_model={name}", "train.learning_rate=0.01"]
    alone = call("train", TINY, *options, f"reward.name={module}:redness", "run.folder=alone")
    assert alone.code == 0, alone
    assert all(line["pairs_trained"] > 0 for line in lines_of(tmp_path / "alone"))
    killed = call("train", TINY, *options, f"reward.name={module}:stopped", "run.folder=killed")
    assert killed.code == 130, killed
    assert len(lines_of(tmp_path / "killed")) == 1
    resumed = call("train", "--resume", "killed")
    assert resumed.code == 0, resumed
    want, got = (load_file(f"{run}/checkpoints/000002/state.safetensors") for run in ("alone", "killed"))
    assert want.keys() == got.keys()
    assert all(want[key].equal(got[key]) for key in want)


def test_the_whole_model_can_be_trained(tmp_path: Path, made: Path):
    options = [*SPO, f"algorithm.preference_model={made}", "model.train=full", "train.iterations=2"]
    outcome = call("train", TINY, *SMALLEST, *options, "train.learning_rate=1e-4", f"run.folder={tmp_path / 'run'}")
    assert outcome.code == 0, outcome
    first, second = lines_of(tmp_path / "run")
    assert first["ratio_max_deviation"] < 1e-6, "the copy rounds otherwise"
    assert second["ratio_max_deviation"] > 1e-5


def test_a_preference_model_of_something_else_is_refused(tmp_path: Path, made: Path):
    def line(*options: str) -> str:
        found = refused("train", TINY, *SMALLEST, *SPO, *options, f"run.folder={tmp_path / 'run'}")
        assert not (tmp_path / "run").exists()
        return found

    other = line(f"algorithm.preference_model={made}", "model.name=scenes-flow")
    assert "is for the model that it was trained on, scenes, got scenes-flow" in other
    missing = line(f"algorithm.preference_model={tmp_path / 'nowhere'}")
    assert "is a folder with config.json and model.safetensors, got" in missing
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((made / "config.json").read_text())
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert "could not be read" in line(f"algorithm.preference_model={broken}")
    (broken / "config.json").write_text('{"kind": "another"}')
    assert "it is no step-aware preference model" in line(f"algorithm.preference_model={broken}")


def test_the_command_refuses_in_a_line(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch):
    before = (made / "config.json").read_text()
    assert "exists and is not replaced; give --overwrite" in refused("train-preference-model", TINY, "--out", made)
    other = tmp_path / "another model"
    other.mkdir()
    (other / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    line = refused("train-preference-model", TINY, "--out", other, "--overwrite")
    assert line.endswith("another model' is none; choose another --out")
    assert "UNet2DConditionModel" in (other / "config.json").read_text()
    assert "needs a configuration file first" in refused("train-preference-model", "train.iterations=1")
    assert (made / "config.json").read_text() == before
    tiny = ["--prompts", "1", "--samples", "2", "--steps", "1", "--out", tmp_path / "new"]
    module = tmp_path / f"flat_{tmp_path.name}.py"
    module.write_text("import torch\ndef flat(images, prompts):\n    return torch.zeros(len(images))\n")
    monkeypatch.syspath_prepend(".")
    monkeypatch.chdir(tmp_path)
    line = refused("train-preference-model", TINY, *SMALLEST, f"reward.name={module.stem}:flat", *tiny)
    assert "must differ in their rewards" in line
    assert not (tmp_path / "new").exists()
