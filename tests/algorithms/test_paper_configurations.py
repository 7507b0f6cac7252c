"""Every published setting in configs/paper: it loads, says what it is, and trains once it is made small."""

import tomllib
from pathlib import Path

import pytest
from command_line import call
from small_runs import lines_of

from adascope_fast.config import Config
from adascope_fast.settings import OWN, choices_of

FILES = sorted((Path(__file__).parents[2] / "configs" / "paper").glob("*.toml"))
FLOWS = ("stable-diffusion-3", "FLUX")
SMALL = [
    "model.dtype=float32",
    "prompts.train=scenes:train",
    "prompts.held_out=scenes:held_out",
    "reward.name=jpeg_compressibility",
    "train.iterations=1",
    "train.warmup_updates=0",
    "train.prompts_per_iteration=2",
    "train.samples_per_prompt=2",
    "train.rollout_batch=4",
    "train.microbatch=4",
    "train.device=cpu",
    "evaluation.num_prompts=1",
    "evaluation.samples_per_prompt=1",
    "log.trackers=[]",
]
PAIRS = {"diffusion_dpo": [], "diffusion_kto": ["--labelled"]}
"""Arguments of `make-preferences` for what is trained on a set of preferences."""

each = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def test_every_algorithm_has_one():
    names = choices_of(Config.model_fields["algorithm"].annotation).keys() - {OWN}
    assert {Config.load(file).algorithm.name for file in FILES} == names


@each
def test_it_names_its_algorithm_and_says_what_it_is(file: Path):
    text = file.read_text(encoding="utf-8")
    assert tomllib.loads(text)["algorithm"]["name"] in file.stem, "the default is nobody's paper"
    head = text[: text.index("\n[")].splitlines()
    assert all(line.startswith("#") for line in head if line)
    assert any("Measured:" in line for line in head)
    Config.load(file)


@each
def test_it_trains_once_it_is_small(file: Path, tmp_path: Path):
    published, folder = Config.load(file), tmp_path / "run"
    small = [*SMALL, *_smaller(published), f"run.folder={folder}"]
    if (name := published.algorithm.name) in PAIRS:
        pairs = tmp_path / "pairs"
        made = call("make-preferences", file, *small, "--out", pairs, "--pairs", "4", *PAIRS[name])
        assert made.code == 0, made
        small.append(f"algorithm.preferences={pairs}")
    outcome = call("train", file, *small)
    assert outcome.code == 0, outcome
    assert (folder / "report.html").is_file()
    (record,) = lines_of(folder)
    assert record["updates_skipped"] == 0


def _smaller(published: Config) -> list[str]:
    """What depends on the file: the embedded model of its family, as few steps and updates as it can do with."""
    flow = any(name in published.model.name for name in FLOWS)
    changes = [f"model.name={'scenes-flow' if flow else 'scenes'}"]
    changes += ["model.resolution=64"] if published.model.resolution else []
    places = [getattr(published.selector, name, None) for name in ("start", "end", "window_size")]
    changes += ["sampler.num_steps=6"] if not any(places) else []
    changes += ["train.updates_per_iteration=2"] if published.train.updates_per_iteration > 2 else []
    return changes
