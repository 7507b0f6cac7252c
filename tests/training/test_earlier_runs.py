"""Folders of runs that earlier versions made: one line that says so and what to do; their report can still be made."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import SMALLEST, TINY, call, refused

from adascope_fast.config import Config, ConfigError
from adascope_fast.reporting import write_report
from adascope_fast.training.draw import load_run
from adascope_fast.training.run_folder import load_config

# What commit ece68db wrote for a run of the smallest configuration: every key of every choice.
EARLIER = """
[run]
folder = "runs/tiny"
seed = 0

[model]
name = "scenes"
train = "lora"
lora_rank = 4
gradient_checkpointing = false
dtype = "float32"
quantize = "none"
attention = "sdpa"
offload_text_encoders = false

[prompts]
train = "scenes:train"
held_out = "scenes:held_out"

[reward]
name = "scene_attributes"
clip = "scenes-clip"

[sampler]
num_steps = 6
guidance_scale = 1.0
eta = 1.0
noise_level = 0.7
tail_share = 1.0

[algorithm]
name = "ddpo"
clip_range = 0.0001
advantage_clip = 5.0
per_prompt_buffer = 32
per_prompt_min_count = 16
advantage_scale = "global"
step_weight = "none"
backfill = "interval"
attribution = "uniform"
gamma = 0.99
kl_weight = 0.0

[selector]
name = "adascope"
rule = "knee"
pooling = "prompt"
kappa = 0.25
phi_end = 0.1
window_size = 2
shift_every = 25
window_shift = 1
window_order = "progressive"
ode_outside = true

[sensing]
kind = "latent"
every = 1
decoder = "vae"
stride = 4
num_samples = 2

[train]
iterations = 2
prompts_per_iteration = 2
samples_per_prompt = 2
updates_per_iteration = 1
update = "replay"
learning_rate = 0.0003
rollout_batch = 4
microbatch = 4
device = "cpu"

[evaluation]
num_prompts = 3
samples_per_prompt = 2

[log]
trackers = []
"""


def _folder(path: Path, config: str = EARLIER, **run: object) -> Path:
    path.mkdir()
    (path / "config.toml").write_text(config)
    (path / "run.json").write_text(json.dumps(run))
    return path


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    return _folder(tmp_path / "run", status="interrupted", commit="ece68dbc02a0", versions={"adascope-fast": "0.1.0"})


@pytest.mark.parametrize(
    "command",
    [["train", "--resume", "RUN"], ["sample", "RUN", "--prompt", "a red circle"], ["merge", "RUN", "OUT"]],
    ids=["resume", "sample", "merge"],
)
def test_a_run_of_an_earlier_version_is_refused_in_one_line(earlier: Path, tmp_path: Path, command: list[str]):
    before = {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()}
    places = {"RUN": earlier, "OUT": tmp_path / "merged"}
    line = refused(*(places.get(part, part) for part in command))
    assert line.startswith(f"error: the run in '{earlier}' was made by an earlier version of adascope-fast, whose ")
    assert "config.toml has reward.clip where this one has not; " in line
    assert line.endswith("finish it with that version (0.1.0, commit ece68dbc02a0), or start a new run")
    assert {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "merged").exists()


def test_the_report_of_an_earlier_run_is_made_all_the_same(earlier: Path):
    outcome = call("report", earlier)
    assert (outcome.code, outcome.out) == (0, f"{earlier / 'report.html'}\n")
    assert "shift_every = 25" in (earlier / "report.html").read_text()
    assert write_report(earlier) == earlier / "report.html"


@pytest.mark.parametrize("name", ["static_range", "late_start", "every_step", "complement"])
def test_whatever_the_selector_an_earlier_run_is_told(tmp_path: Path, name: str):
    text = EARLIER.replace('name = "adascope"', f'name = "{name}"\nstart = 2\nend = 5')
    folder = _folder(tmp_path / "run", text)
    for load in (load_config, load_run):
        with pytest.raises(ConfigError, match=r"was made by an earlier version .* the version that made it, or start"):
            load(folder)
    assert not (folder / "samples").exists()


def test_the_commit_alone_is_told_where_there_is_no_version(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"finish it with that version \(unknown, commit abc\), or start a new run"):
        load_config(_folder(tmp_path / "run", commit="abc"))


def test_a_mistake_made_by_hand_is_told_as_such(tmp_path: Path):
    text = Config.load(TINY).to_toml()
    assert load_config(_folder(tmp_path / "right", text)) == Config.load(TINY)
    wrong = text.replace("num_steps = 6", "num_steps = 0")
    with pytest.raises(
        ConfigError, match=r"^sampler.num_steps must be at least 1, got 0; set sampler.num_steps to 1 or more$"
    ):
        load_config(_folder(tmp_path / "wrong", wrong))
    with pytest.raises(ConfigError, match=r"^a run's folder holds a config.toml, '.*' does not; check the path$"):
        load_config(tmp_path)


def test_a_run_of_this_version_is_none_of_an_earlier_one(tmp_path: Path):
    """Nor is one whose selector senses nothing, which has no [sensing]."""
    run = tmp_path / "run"
    settings = [*SMALLEST, "selector.name=every_step", "train.iterations=1", "reward.name=jpeg_compressibility"]
    assert call("train", TINY, *settings, f"run.folder={run}").code == 0
    assert "[sensing]" not in (run / "config.toml").read_text()
    assert call("train", "--resume", run, "train.iterations=2").code == 0
    assert len((run / "stats.jsonl").read_text().splitlines()) == 2
    assert call("sample", run, "--prompt", "a red circle", "--num", "1").code == 0
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint yet" in refused("sample", run, "--prompt", "a red circle")


def test_a_run_that_was_given_what_had_no_effect_is_read_without_it(tmp_path: Path):
    text = Config.load(TINY, ["train.best_worst_k=1", "train.samples_per_prompt=3"]).to_toml()
    for now, earlier in (('train = "lora"', 'train = "full"'), ("samples_per_prompt = 3", "samples_per_prompt = 2")):
        assert now in text
        text = text.replace(now, earlier, 1)
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigError, match="lora_rank has a meaning with"):
        Config.load(tmp_path / "config.toml")
    config = load_config(tmp_path)
    assert (config.model.train, config.model.lora_rank, config.train.best_worst_k) == ("full", 16, None)
