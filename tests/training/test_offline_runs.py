"""Whole runs on a set of preferences: each selector, LoRA and full, resumed, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, call, refused
from preference_sets import CAPTIONS, write_judged, write_lines, write_pairs
from safetensors.torch import load_file
from small_runs import SMALLEST, lines_of

from adascope_fast.config import Config
from adascope_fast.training.trainer import Trainer

SELECTORS = {
    "adascope": ["sensing.every=2"],
    "adascope, all together": ["selector.pooling=batch"],
    "before": ["selector.mask_source=previous"],
    "decoded": ["sensing.kind=reward_only", "sensing.stride=2", "sensing.every=1"],
    "fixed": ["selector.rule=schedule"],
    "complement": ["selector.name=complement"],
    "every_step": ["selector.name=every_step"],
    "random": ["selector.name=random_fraction", "selector.fraction=0.5"],
    "window": ["selector.name=window"],
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A set for each algorithm."""
    root = tmp_path_factory.mktemp("sets")
    return {"diffusion_dpo": write_pairs(root / "pairs"), "diffusion_kto": write_judged(root / "labels")}


def _arguments(folder: Path, name: str, place: Path, *more: str) -> list[str]:
    records = ["train.prompts_per_iteration=3", "train.iterations=2"]
    named = [f"algorithm.name={name}", f"algorithm.preferences={place}", f"run.folder={folder}"]
    return [TINY, *SMALLEST, *records, *named, *more]


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / "adapter").glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize(
    ("name", "selector"),
    [
        *(("diffusion_dpo", selector) for selector in SELECTORS),
        ("diffusion_kto", "adascope"),
        ("diffusion_kto", "random"),
    ],
)
def test_every_selector_trains_a_set(tmp_path: Path, sets: dict[str, Path], name: str, selector: str):
    folder = tmp_path / "run"
    more = ["train.learning_rate=1e-4", *SELECTORS[selector]]
    outcome = call("train", *_arguments(folder, name, sets[name], *more))
    assert outcome.code == 0, outcome
    records = lines_of(folder)
    images = 3 * (2 if name == "diffusion_dpo" else 1)
    for record in records:
        assert record["reward_mean"] is None
        assert record["reward_std"] is None
        assert record["pairs_trained"] == 3
        assert record["grad_norm"] > 0
        assert record["fraction_trained"] == pytest.approx((images // 3) * 3 / (images * 4))
        trained = [step for step, count in enumerate(record["steps"]["pairs"]) if count]
        for start, end in record["selector"].get("intervals", []):
            if selector.startswith("adascope, all"):
                assert all(start <= step < end for step in trained), "only from the interval"
    sensed = {"adascope": [True, False], "fixed": [False] * 2}
    if not selector.startswith(("every", "random", "window")):
        wanted = sensed.get(selector, [True, True])
        assert [record["forwards_sampled"] > 0 for record in records] == wanted
        assert [record["forwards_sampled"] % 4 == 0 for record in records] == [True, True], "a picture a prompt"
        assert [("uncertainty" in record["steps"]) for record in records] == wanted
    else:
        assert [record["forwards_sampled"] for record in records] == [0, 0]
    assert "nan" not in (folder / "report.html").read_text()
    assert all(value.isfinite().all() for value in _adapter(folder).values())


@pytest.mark.parametrize("name", ["diffusion_dpo", "diffusion_kto"])
def test_the_microbatch_does_not_matter(tmp_path: Path, sets: dict[str, Path], name: str):
    """k is over the iteration's rows, whatever the microbatch."""
    found = []
    for microbatch in (1, 3, 64):
        folder = tmp_path / str(microbatch)
        more = [f"train.microbatch={microbatch}", "algorithm.num_draws=2", "train.updates_per_iteration=2"]
        more += ["selector.name=every_step", "train.learning_rate=1e-3", "algorithm.prompt_dropout=0.4"]
        assert call("train", *_arguments(folder, name, sets[name], *more)).code == 0
        found.append(lines_of(folder))
    for other in found[1:]:
        for record, want in zip(other, found[0], strict=True):
            for key in ("loss", "grad_norm", "margin", "kl", "approx_kl"):
                assert record[key] == pytest.approx(want[key], rel=2e-3, abs=2e-6), key


@pytest.mark.parametrize("model", ["scenes", "scenes-flow"])
@pytest.mark.parametrize("name", ["diffusion_dpo", "diffusion_kto"])
def test_a_killed_run_is_repeated_bit_for_bit(tmp_path: Path, sets: dict[str, Path], name: str, model: str):
    more = [f"model.name={model}", "sensing.every=2", "train.iterations=3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert call("train", *_arguments(whole, name, sets[name], *more)).code == 0
    assert call("train", *_arguments(killed, name, sets[name], *more, "train.iterations=2")).code == 0
    assert call("train", "--resume", killed, "train.iterations=3").code == 0
    want, got = _adapter(whole), _adapter(killed)
    assert all(torch.equal(value, got[key]) for key, value in want.items())
    first, other = ([line["loss"] for line in lines_of(folder)] for folder in (whole, killed))
    assert first == other


@pytest.mark.parametrize("name", ["diffusion_dpo", "diffusion_kto"])
def test_the_originals_full_fine_tuning(tmp_path: Path, sets: dict[str, Path], name: str):
    folder = tmp_path / "run"
    more = ["model.train=full", "selector.name=every_step", "train.learning_rate=1e-4"]
    outcome = call("train", *_arguments(folder, name, sets[name], *more))
    assert outcome.code == 0, outcome
    first, second = lines_of(folder)
    assert abs(first["margin"]) < 1e-2, "the reference is the model as it was"
    assert abs(second["margin"]) > 0.1


def test_several_updates_and_whole_records(tmp_path: Path, sets: dict[str, Path]):
    for name, place in sets.items():
        folder = tmp_path / name
        more = ["train.updates_per_iteration=2", "train.inner_epochs=2", "train.minibatch=samples"]
        outcome = call("train", *_arguments(folder, name, place, *more, "algorithm.num_draws=2"))
        assert outcome.code == 0, outcome
        assert lines_of(folder)[0]["pairs_trained"] == 2 * 3 * 2


def test_guidance_is_of_the_evaluation_alone(tmp_path: Path, sets: dict[str, Path]):
    """Training and its reference see the conditional output alone, as the originals do."""
    losses = []
    for scale in (1.0, 3.0):
        folder = tmp_path / str(scale)
        more = ["selector.name=every_step", f"sampler.guidance_scale={scale}"]
        assert call("train", *_arguments(folder, "diffusion_dpo", sets["diffusion_dpo"], *more)).code == 0
        losses.append([line["loss"] for line in lines_of(folder)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_changed_set_is_noticed(tmp_path: Path):
    place, folder = write_pairs(tmp_path / "set"), tmp_path / "run"
    assert call("train", *_arguments(folder, "diffusion_dpo", place)).code == 0
    moved = tmp_path / "elsewhere"
    shutil.move(place, moved)
    assert "which is not there; make one" in refused("train", "--resume", folder, "train.iterations=3")
    overrides = [f"algorithm.preferences={moved}", "train.iterations=3"]
    lines = (moved / "preferences.jsonl").read_text().splitlines()
    write_lines(moved / "preferences.jsonl", lines[:3])
    line = refused("train", "--resume", folder, *overrides)
    assert "preferences was 4 pairs, " in line
    assert "and is 3 pairs, " in line
    write_lines(moved / "preferences.jsonl", lines)
    assert call("train", "--resume", folder, *overrides).code == 0, "where it lies does not matter"


def test_held_out_prompts_in_the_set_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    place = write_pairs(tmp_path / "set")
    (tmp_path / "held_out.txt").write_text("\n".join(["a unicorn", CAPTIONS[0]]))
    more = [
        "reward.name=jpeg_compressibility",
        "prompts.train=animals:train",
        f"prompts.held_out={tmp_path / 'held_out.txt'}",
        "evaluation.num_prompts=2",
    ]
    assert call("train", *_arguments(tmp_path / "run", "diffusion_dpo", place, *more)).code == 0
    assert "1 of the 2 held-out prompts are in algorithm.preferences too" in caplog.text
    (tmp_path / "held_out.txt").write_text(CAPTIONS[0])
    line = refused("train", *_arguments(tmp_path / "other", "diffusion_dpo", place, *more, "evaluation.num_prompts=1"))
    assert "got 1 that are all in algorithm.preferences" in line


REFUSED = {
    "no set": ([], "diffusion_dpo learns from a set of preferences, got algorithm.preferences = none; set it to the"),
    "one pass": (["train.update=one_pass"], "one_pass is for advantages that weigh a whole sample, and diffusion_dpo"),
    "tail": (["sampler.tail_share=0.5"], "sampler.tail_share shortens rollouts that are trained on, and diffusion_dpo"),
    "pooling": (["selector.pooling=sample"], "diffusion_dpo takes the interval of a picture's prompt"),
    "guidance": (
        ["sampler.guidance_scale=2.0", 'sampler.train_guidance="both"'],
        "diffusion_dpo trains the conditional output alone, without guidance",
    ),
    "updates": (
        ["train.prompts_per_iteration=2", "algorithm.num_draws=3", "train.updates_per_iteration=7"],
        "train.updates_per_iteration must be at most the 6 rows of an iteration",
    ),
    "draws": (["algorithm.num_draws=7"], "algorithm.num_draws must be at most the 6 steps"),
    "dropout": (["algorithm.prompt_dropout=1.0"], "algorithm.prompt_dropout must be below 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(tmp_path: Path, name: str):
    overrides, told = REFUSED[name]
    given = [] if name == "no set" else [f"algorithm.preferences={tmp_path}"]
    assert told in refused("train", TINY, "algorithm.name=diffusion_dpo", *given, *overrides)


def test_a_set_without_pairs_or_with_small_pictures_is_refused_before_anything_is_written(
    tmp_path: Path, sets: dict[str, Path]
):
    folder = tmp_path / "run"
    line = refused("train", *_arguments(folder, "diffusion_dpo", sets["diffusion_kto"]))
    assert "a folder with labelled.jsonl alone; make one with" in line
    write_lines(tmp_path / "set" / "preferences.jsonl", [{"prompt": "a", "chosen": "0.png", "rejected": "1.png"}])
    for number in range(2):
        from preference_sets import write_picture

        write_picture(tmp_path / "set" / f"{number}.png", number, size=(12, 12))
    line = refused("train", *_arguments(folder, "diffusion_dpo", tmp_path / "set"))
    assert "a picture's shorter side must be at least half of the model's" in line
    assert not folder.exists()


def test_kto_learns_from_pairs_too(tmp_path: Path, sets: dict[str, Path]):
    folder = tmp_path / "run"
    assert call("train", *_arguments(folder, "diffusion_kto", sets["diffusion_dpo"])).code == 0
    parts = json.loads((folder / "parts.json").read_text())["parts"]
    assert parts["preferences"]["name"].startswith("8 labelled pictures")


def test_an_algorithm_passed_in_python_brings_its_set(tmp_path: Path, sets: dict[str, Path]):
    from adascope_fast.algorithms import diffusion_dpo

    config = Config.load(TINY, [*SMALLEST, f"run.folder={tmp_path / 'run'}"])
    algorithm: Any = diffusion_dpo(preferences=str(sets["diffusion_dpo"]))
    Trainer(config, algorithm=algorithm, quiet=True).train()
    assert json.loads((tmp_path / "run" / "parts.json").read_text())["parts"]["preferences"]["is_given"]
