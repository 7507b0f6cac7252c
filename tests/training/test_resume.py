"""A run goes on as what it was, or not at all: what was passed in Python, what changed on disk, what is damaged."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, refused
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from small_runs import CAPTIONS, SMALLEST, TINY, lines_of, redness, untimed
from torch import Tensor

from adascope_fast import backbones
from adascope_fast.algorithms.policy_gradient import grpo
from adascope_fast.config import Config, ConfigError
from adascope_fast.prompts.scenes import captions
from adascope_fast.selectors.simple import StaticRange
from adascope_fast.training.draw import load_run
from adascope_fast.training.export import merge
from adascope_fast.training.monitoring.callbacks import Callback
from adascope_fast.training.run_folder import RunFolder
from adascope_fast.training.trainer import Trainer


class _End(Callback):
    def __init__(self, *, after: int) -> None:
        self.after = after

    def on_iteration(self, record: dict[str, Any]) -> str | None:
        return "stop" if record["iteration"] + 1 == self.after else None


def blueness(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 2].mean((1, 2)) - images[:, :2].mean((1, 2, 3))


def _config(folder: Path, *overrides: str) -> Config:
    return Config.load(TINY, [*SMALLEST, f"run.folder={folder}", *overrides])


def _pipeline(shift: float = 0.0) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(backbones.folder_of("scenes"))
    with torch.no_grad():
        pipeline.unet.conv_in.bias += shift
    return pipeline


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


GIVEN: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "reward": (lambda: redness, lambda: blueness),
    "train_prompts": (lambda: CAPTIONS[:1], lambda: CAPTIONS[1:]),  # of the built-in set, whose held-out part is taken
    "held_out_prompts": (lambda: captions("held_out")[5:6], lambda: captions("held_out")[6:7]),
    "pipeline": (lambda: _pipeline(0.2), lambda: _pipeline(0.3)),
    "algorithm": (lambda: grpo(advantage_scale="group"), lambda: grpo(advantage_scale="global")),
    "selector": (lambda: StaticRange(start=1, end=3), lambda: StaticRange(start=0, end=3)),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_was_passed_in_python_is_recorded_and_needed_again(tmp_path: Path, name: str):
    """On the command line it is refused, with what to write; in Python another one is, or none."""
    folder, (same, other) = tmp_path / "run", GIVEN[name]
    plain = {} if name in ("reward", "held_out_prompts") else {"reward": redness}
    Trainer(_config(folder), quiet=True, **plain, **{name: same()}).train()
    record = json.loads((folder / "parts.json").read_text())["parts"][name]
    assert record["is_given"]
    assert (folder / "config.toml").read_text().startswith(f"# {'reward' if plain else name} = ")
    assert f"# {name} = " in (folder / "config.toml").read_text()
    assert f"{name.replace('_', ' ')} passed in Python" in (folder / "report.html").read_text()
    before = _files(folder)
    line = refused("train", "--resume", folder, "train.iterations=3")
    assert "was made in Python with " in line
    assert f"{name}=" in line
    assert f"do it there: Trainer(Config.load('{folder}/config.toml'), " in line
    longer = _config(folder, "train.iterations=3")
    for wrong in ({name: other()}, {}):
        with pytest.raises(
            ConfigError, match=rf"goes on with what .*parts.json says that it was made with, and .*{name} "
        ):
            Trainer(longer, quiet=True, **plain, **wrong).resume()
    assert _files(folder) == before, "nothing has changed"
    Trainer(longer, quiet=True, **plain, **{name: same()}).resume()
    assert len(lines_of(folder)) == 3


def test_a_change_that_is_accepted_is_written_down(tmp_path: Path):
    folder = tmp_path / "run"
    Trainer(_config(folder), quiet=True, reward=redness).train()
    Trainer(_config(folder, "train.iterations=3"), quiet=True, reward=blueness).resume(accept_changes=True)
    (change,) = json.loads((folder / "parts.json").read_text())["changes"]
    assert change.startswith("from iteration 2 on: reward was ")
    assert change in (folder / "report.html").read_text().replace("&#39;", "'")
    Trainer(_config(folder, "train.iterations=4"), quiet=True, reward=blueness).resume()


@pytest.mark.parametrize("command", ["sample", "merge"])
def test_trained_weights_go_on_no_other_model(tmp_path: Path, command: str):
    """A pipeline passed in Python, and a folder whose weights were replaced."""
    folder, out = tmp_path / "run", tmp_path / "out.png"
    rest = ["--prompt", CAPTIONS[0], "--num", "1", "--out", out] if command == "sample" else [out]
    Trainer(_config(folder), quiet=True, pipeline=_pipeline(0.2)).train()
    line = refused(command, folder, *rest)
    assert "was made in Python with pipeline=StableDiffusionPipeline" in line
    model, folder = tmp_path / "model", tmp_path / "another"
    _pipeline().save_pretrained(model)
    scenes = ["prompts.train=scenes:train", "prompts.held_out=scenes:held_out"]
    Trainer(_config(folder, f"model.name={model}", *scenes), quiet=True).train()
    assert call(command, folder, *rest).code == 0
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    _pipeline(0.1).save_pretrained(model)
    line = refused(command, folder, *rest)
    assert (
        f"belong to the model that they were trained on, and pipeline is called {model} as before, but is not" in line
    )
    assert not out.exists()


def test_a_run_with_a_pipeline_is_drawn_and_merged_in_python(tmp_path: Path):
    folder = tmp_path / "run"
    Trainer(_config(folder), quiet=True, pipeline=_pipeline(0.2)).train()
    _, backbone = load_run(folder, pipeline=_pipeline(0.2))
    assert any(value.abs().max() > 0 for key, value in backbone.adapter_tensors().items() if "lora_B" in key)
    with pytest.raises(ConfigError, match="belong to the model that they were trained on"):
        load_run(folder, pipeline=_pipeline(0.3))
    merge(folder, tmp_path / "merged", pipeline=_pipeline(0.2))
    plain = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain.unet.conv_in.bias, _pipeline(0.2).unet.conv_in.bias)
    assert not torch.equal(plain.unet.conv_in.bias, _pipeline().unet.conv_in.bias)


def _run_with_a_prompt_file(tmp_path: Path) -> tuple[Path, Path]:
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text(CAPTIONS[0] + "\n")
    Trainer(_config(folder, f"prompts.train={prompts}", "prompts.held_out=scenes:held_out"), quiet=True).train()
    return folder, prompts


def test_what_a_configuration_names_may_move_but_not_change(tmp_path: Path):
    folder, prompts = _run_with_a_prompt_file(tmp_path)
    moved = prompts.rename(tmp_path / "moved.txt")
    assert call("train", "--resume", folder, "train.iterations=3", f"prompts.train={moved}").code == 0
    moved.write_text(CAPTIONS[1])
    line = refused("train", "--resume", folder, "train.iterations=4")
    assert "train_prompts was 1 prompt" in line
    assert "take the change with --accept-changes" in line
    assert call("train", "--resume", folder, "train.iterations=4", "--accept-changes").code == 0
    assert len(lines_of(folder)) == 4


@pytest.mark.parametrize(
    ("wanted", "told"), [(1, "has made 2 iterations, and train.iterations = 1"), (2, "= 2 leaves")]
)
def test_a_run_does_not_go_backwards(tmp_path: Path, wanted: int, told: str):
    folder = tmp_path / "run"
    Trainer(_config(folder), quiet=True).train()
    before = _files(folder)
    line = refused("train", "--resume", folder, f"train.iterations={wanted}")
    assert told in line
    assert "nothing to do; set train.iterations to more than 2" in line
    assert _files(folder) == before


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three iterations without a pause."""
    folder = tmp_path_factory.mktemp("longer") / "run"
    Trainer(_config(folder, "train.iterations=3"), quiet=True).train()
    return folder


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no configuration": ("config.toml", Path.unlink),
    "a configuration that is none": ("config.toml", lambda path: path.write_text("[run\n")),
    "no log": ("stats.jsonl", Path.unlink),
    "another log": ("stats.jsonl", lambda path: path.write_text('[]\n{"iteration": "x"}\n' + path.read_text()[9:])),
    "no evaluation": ("evaluation.json", Path.unlink),
    "evaluation of another shape": ("evaluation.json", lambda path: path.write_text('{"before": 3, "history": 1}')),
    "no run.json": ("run.json", Path.unlink),
    "run.json of another shape": ("run.json", lambda path: path.write_text('{"seconds_total": "x", "versions": 3}')),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_beside_the_checkpoint_are_restored_from_it(
    tmp_path: Path, longer: Path, caplog: pytest.LogCaptureFixture, damage: str
):
    folder = tmp_path / "run"
    Trainer(_config(folder), quiet=True).train()
    name, change = DAMAGES[damage]
    change(folder / name)
    outcome = call("train", "--resume", folder, "train.iterations=3")
    assert outcome.code == 0, outcome
    got, want = (load_file(run / "checkpoints/000003/state.safetensors") for run in (folder, longer))
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert [untimed(line) for line in lines_of(folder)] == [untimed(line) for line in lines_of(longer)]
    assert json.loads((folder / "evaluation.json").read_text()) == json.loads((longer / "evaluation.json").read_text())
    assert Config.load(folder / "config.toml").train.iterations == 3
    if name == "config.toml":
        assert "the configuration in the newest checkpoint is used" in caplog.text


def test_an_edited_configuration_is_refused(tmp_path: Path):
    folder = tmp_path / "run"
    Trainer(_config(folder), quiet=True).train()
    path = folder / "config.toml"
    path.write_text(path.read_text().replace("learning_rate = 0.01", "learning_rate = 0.02"))
    told = "must say what the run was made with, and train.learning_rate is another than in its checkpoint"
    for command in (
        ["train", "--resume", folder, "train.iterations=3"],
        ["sample", folder, "--prompt", CAPTIONS[0]],
        ["merge", folder, tmp_path / "out"],
    ):
        assert told in refused(*command)


def test_a_folder_without_its_configuration_is_no_dead_end(tmp_path: Path):
    folder = tmp_path / "run"
    Trainer(_config(folder), quiet=True).train()
    (folder / "config.toml").unlink()
    shutil.rmtree(folder / "checkpoints")
    assert "holds a config.toml" in refused("train", "--resume", folder)
    assert call("train", TINY, *SMALLEST, f"run.folder={folder}", "--overwrite").code == 0


def test_times_are_those_of_the_whole_run(tmp_path: Path):
    folder = tmp_path / "run"
    Trainer(_config(folder), quiet=True).train()
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(
        json.dumps(run | {"seconds_total": 1000.0, "peak_memory_mb": 10**6, "date": "then"})
    )
    result = Trainer(_config(folder, "train.iterations=3"), quiet=True).resume()
    run = json.loads((folder / "run.json").read_text())
    assert 1000 < run["seconds_total"] < 1100
    assert run["peak_memory_mb"] == 10**6
    assert run["date"] == "then", "of its start"
    assert result.seconds["run"] == run["seconds_total"]


def test_a_run_that_another_process_writes_is_left_alone(tmp_path: Path):
    folder = tmp_path / "run"
    Trainer(_config(folder), quiet=True).train()
    before = _files(folder)
    held = RunFolder.open(folder)
    for command in (
        ["--resume", folder, "train.iterations=3"],
        [TINY, *SMALLEST, f"run.folder={folder}", "--overwrite"],
    ):
        line = refused("train", *command)
        assert "one process writes a run at a time, and process " in line
    assert _files(folder) == before
    held.close()
    assert call("train", "--resume", folder, "train.iterations=3").code == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--resume", "RUN", "--overwrite"], "--resume continues a run and --overwrite replaces it, got both"),
        ([TINY, "--accept-changes"], "--accept-changes is for --resume RUN"),
        ([TINY, "--trust-code"], "--trust-code is for --resume RUN"),
        ([TINY, "--resume", "RUN"], "--resume takes the configuration from the run's folder, got "),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path: Path, arguments: list[Any], told: str):
    assert told in refused("train", *arguments)


MODULE = """
def redness(images, prompts):
    return images[:, 0].mean((1, 2))

import pathlib
pathlib.Path("imported").write_text("x")
"""


def test_code_of_a_run_that_was_not_made_here_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name, folder = f"own_{tmp_path.name}", tmp_path / "run"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(".")
    monkeypatch.chdir(tmp_path)
    assert call("train", TINY, *SMALLEST, f"run.folder={folder}", f"reward.name={name}:redness").code == 0
    outcome = call("train", "--resume", folder, "train.iterations=3")
    assert outcome.code == 0, "made here"
    assert f"importing reward.name = {name}:redness, as the run's configuration says" in outcome.err
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another account"))
    (tmp_path / "imported").unlink()
    monkeypatch.delitem(sys.modules, name)
    line = refused("train", "--resume", folder, "train.iterations=4")
    assert f"would import reward.name = {name}:redness, and that run was not made by this user here" in line
    assert not (tmp_path / "imported").exists()
    assert call("sample", folder, "--prompt", CAPTIONS[0], "--num", "1").code == 0
    assert not (tmp_path / "imported").exists(), "drawing needs no reward"
    assert call("train", "--resume", folder, "train.iterations=4", "--trust-code").code == 0
    assert (tmp_path / "imported").exists()


def test_code_that_was_added_to_a_folder_is_foreign(tmp_path: Path):
    """The signature is of what is imported, not of the folder."""
    from adascope_fast.training import trust

    config = _config(tmp_path, "reward.name=mine:reward")
    assert trust.refuse_foreign(tmp_path, config, trust.signature(config), is_trusted=False)
    other = _config(tmp_path, "reward.name=mine:reward", "selector.name=theirs:selector")
    with pytest.raises(ConfigError, match=r"import reward.name = mine:reward and selector.name = theirs:selector"):
        trust.refuse_foreign(tmp_path, other, trust.signature(config), is_trusted=False)
    assert trust.signature(_config(tmp_path)) == ""
    assert trust.refuse_foreign(tmp_path, _config(tmp_path), "", is_trusted=False) == []


SENDS = {
    "reward": ["reward.name=remote", "reward.url=http://192.0.2.1:80", "reward.token_env=SECRET"],
    "rollout": ["rollout.name=remote", "rollout.url=http://192.0.2.1:80", "rollout.token_env=SECRET"],
}


@pytest.mark.parametrize("section", SENDS)
def test_no_token_goes_to_an_address_that_a_foreign_folder_names(tmp_path: Path, section: str):
    """A run's folder says which variable of the environment is sent where; nothing is asked in this test."""
    from adascope_fast.commands.train import resumed
    from adascope_fast.training import origin, trust

    config = _config(tmp_path, *SENDS[section])
    (tmp_path / "config.toml").write_text(config.to_toml())
    origin.write(tmp_path, {}, signature="")
    line = refused("train", "--resume", tmp_path)
    assert f'would send the variable SECRET to {section}.url = "http://192.0.2.1:80", and that run was not' in line
    assert line.endswith(f"name the address yourself, as {section}.url=..., or look at it, then add --trust-code")
    with pytest.raises(ConfigError, match="would send the variable SECRET"):
        resumed(tmp_path, [f"{section}.token_env=OTHER"], trust_code=False)
    address = f"{section}.url=http://127.0.0.1:80"
    assert resumed(tmp_path, [address], trust_code=False) == config.changed([address])
    assert resumed(tmp_path, [], trust_code=True) == config
    origin.write(tmp_path, {}, signature=trust.signature(config))
    assert resumed(tmp_path, [], trust_code=False) == config, "made here"
    other = config.changed([f"{section}.token_env=OTHER"])
    (tmp_path / "config.toml").write_text(other.to_toml())
    with pytest.raises(ConfigError, match="would send the variable OTHER"):
        resumed(tmp_path, [], trust_code=False)


def test_a_server_among_several_rewards_is_signed_too(tmp_path: Path):
    from adascope_fast.training import trust

    parts = '{jpeg_compressibility = 1.0, remote = {weight = 1.0, url = "http://192.0.2.1:80"}}'
    config = _config(tmp_path, "reward.name=mixed", f"reward.parts={parts}")
    with pytest.raises(ConfigError, match=r'to reward\.parts\.remote\.url = "http://192\.0\.2\.1:80"'):
        trust.refuse_foreign(tmp_path, config, "", is_trusted=False)
    assert trust.refuse_foreign(tmp_path, config, trust.signature(config), is_trusted=False) == []


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_resumed_run_has_the_rates_and_moments_of_the_one_left_alone(tmp_path: Path, optimizer: str):
    """With a rank that makes some tensors large enough for 8 bits."""
    rates = ["train.lr_schedule=cosine", "train.warmup_updates=2", "train.updates_per_iteration=2"]
    rates += [f"train.optimizer={optimizer}", "model.lora_rank=64"]
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    alone, halted = tmp_path / "alone", tmp_path / "halted"
    Trainer(_config(alone, *rates, "train.iterations=3"), quiet=True).train()
    Trainer(_config(halted, *rates, "train.iterations=3"), quiet=True, callbacks=[_End(after=2)]).train()
    Trainer(_config(halted, *rates, "train.iterations=3"), quiet=True).resume()
    found = [load_file(run / "adapter" / "pytorch_lora_weights.safetensors") for run in (alone, halted)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    told = [record["learning_rate"] for record in lines_of(halted)]
    moments = load_file(halted / "checkpoints" / "000003" / "state.safetensors")
    kinds = {value.dtype for name, value in moments.items() if name.endswith(("state1", "exp_avg"))}
    assert (torch.uint8 in kinds) is (optimizer == "adamw_8bit")
    half = [0.5 * (1 + math.cos(math.pi * part / 4)) for part in (1, 3)]
    assert told == pytest.approx([0.01 * 1 / 2, 0.01 * half[0], 0.01 * half[1]])


def test_a_decay_of_another_length_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "run"
    Trainer(_config(folder, "train.lr_schedule=linear"), quiet=True).train()
    Trainer(_config(folder, "train.lr_schedule=linear", "train.iterations=4"), quiet=True).resume()
    assert "train.iterations was 2 and is 4: from iteration 2 on" in caplog.text
    assert [line["learning_rate"] for line in lines_of(folder)] == pytest.approx([0.01, 0.005, 0.005, 0.0025])
