"""The outer loop: the files of a run, resuming bit for bit, rewards in Python, and the adapter in plain diffusers."""

import json
import math
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from graph_emulation import Emulation
from PIL import Image
from preference_sets import write_judged, write_pairs
from safetensors.torch import load_file
from small_runs import CAPTIONS, SMALLEST, TINY, lines_of, redness, untimed
from torch import Tensor

from adascope_fast import backbones
from adascope_fast.adascope.sensing import LatentSensor
from adascope_fast.algorithms.attribution import Attribution
from adascope_fast.config import Config, ConfigError
from adascope_fast.engine.graphs import Graphs
from adascope_fast.reporting.images import GAP
from adascope_fast.selectors.simple import LateStart, RandomFraction, StaticRange, Threshold
from adascope_fast.selectors.windows import FastWindow, Window
from adascope_fast.settings import OWN, choices_of
from adascope_fast.training.building import algorithm_of, selector_of
from adascope_fast.training.draw import draw, initial_latents, load_run
from adascope_fast.training.trainer import Result, Trainer


def _config(folder: Path, *overrides: str) -> Config:
    is_ddpo = not any(override.startswith("algorithm.name=") for override in overrides)
    own = ["algorithm.min_count=1"] if is_ddpo else []  # from the first iteration on the tracker matters
    return Config.load(TINY, [*SMALLEST, *own, f"run.folder={folder}", *overrides])


def _calls(outcome: Callable[[Tensor], object], at: int) -> Callable[[Tensor, list[str]], Tensor]:
    """`redness`, but its call number `at` returns `outcome` of it. Calls: before, iteration 0, 1, ..., after."""
    number = 0

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        nonlocal number
        number += 1
        scores = redness(images, prompts)
        return outcome(scores) if number == at else scores  # type: ignore[return-value]

    reward.__qualname__ = redness.__qualname__  # what files call it
    return reward


def _interrupt(scores: Tensor) -> Tensor:
    raise KeyboardInterrupt


def _trainer(config: Config, reward: Callable[[Tensor, list[str]], Tensor] = redness) -> Trainer:
    return Trainer(config, reward=reward, train_prompts=CAPTIONS[:1], held_out_prompts=CAPTIONS[1:], quiet=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, _trainer(_config(folder)).train()


def _check_same_run(folder: Path, alone: Path) -> None:
    """The same final state in every bit, and the same log but for the times."""
    for name in ("adapter/pytorch_lora_weights.safetensors", "checkpoints/000002/state.safetensors"):
        got, want = load_file(folder / name), load_file(alone / name)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want), name
    states = [json.loads((run / "checkpoints/000002/state.json").read_text()) for run in (folder, alone)]
    for run, state in zip((folder, alone), states, strict=True):
        assert state.pop("log")["bytes"] == (run / "stats.jsonl").stat().st_size, "whose seconds are its own"
    configs = [tomllib.loads(state.pop("config")) for state in states]
    assert states[0] == states[1]
    assert [config.pop("run")["folder"] for config in configs] == [str(folder), str(alone)]
    assert configs[0] == configs[1]
    for got, want in zip(lines_of(folder), lines_of(alone), strict=True):
        assert untimed(got) == untimed(want)
    assert json.loads((folder / "evaluation.json").read_text()) == json.loads((alone / "evaluation.json").read_text())
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_a_run_that_replays_graphs_is_the_same_and_tells_of_them(
    tmp_path: Path, alone: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """By the emulation of CUDA graphs, asked for by the configuration as on a GPU."""
    made = lambda acceleration, device, tell: Graphs(Emulation(), tell=tell)  # noqa: E731
    monkeypatch.setattr("adascope_fast.training.trainer.graphs_of", made)
    _trainer(_config(tmp_path / "run")).train()
    _check_same_run(tmp_path / "run", alone[0])
    told = json.loads((tmp_path / "run" / "run.json").read_text())["acceleration"]["cuda_graphs"]
    assert re.fullmatch(r"on: 2 graphs of 0\.\d\d GiB served \d+ of \d+ calls", told)
    assert capfd.readouterr().err.count("CUDA graphs: ") == 2


def test_a_run_leaves_every_file_that_it_promises(alone: tuple[Path, Result]):
    folder, result = alone
    assert Config.load(folder / "config.toml") == _config(folder)
    first, second = lines_of(folder)
    assert (first["iteration"], second["iteration"]) == (0, 1)
    for record in (first, second):
        assert set(record["seconds"]) == {"rollout", "reward", "sensing", "update", "other"}
        assert 0 < record["fraction_trained"] <= 1
        assert record["ratio_max_deviation"] == 0
        assert all(math.isfinite(record[key]) for key in ("reward_mean", "loss", "grad_norm"))
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert [point["iteration"] for point in evaluation["history"]] == [0, 2]
    gain = evaluation["after"]["scores"][0][0] - evaluation["before"]["scores"][0][0]
    assert evaluation["difference"]["mean"] == pytest.approx(gain)
    assert gain != 0
    for name in ("before.png", "after.png"):
        with Image.open(folder / "samples" / name) as image:
            assert image.size == (64 + 2 * GAP, 64 + 2 * GAP)
    assert json.loads((folder / "samples" / "grid.json").read_text())["gap"] == GAP
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["000001", "000002", "stats.jsonl"]
    assert [path.name for path in (folder / "adapter").iterdir()] == ["pytorch_lora_weights.safetensors"]
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", run["date"])
    assert result.report == folder / "report.html"
    assert "<html" in result.report.read_text()
    assert result.after["mean"] - result.before["mean"] == pytest.approx(result.difference["mean"])
    assert not list(folder.rglob("*.partial")), "nothing half written is left"
    assert not {path.suffix for path in folder.rglob("*")} & {".bin", ".pt", ".pkl", ".pth"}, "no pickles"


@pytest.mark.parametrize("call", [1, 2, 3, 4], ids=["evaluating", "iteration 0", "iteration 1", "evaluating after"])
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(tmp_path: Path, alone: tuple[Path, Result], call: int):
    config = _config(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        _trainer(config, _calls(_interrupt, call)).train()
    folder = tmp_path / "run"
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert (folder / "report.html").is_file(), "what there is so far is reported"
    assert len(lines_of(folder) if (folder / "stats.jsonl").is_file() else []) == max(0, call - 2)
    _trainer(config).resume(accept_changes=True)
    _check_same_run(folder, alone[0])


@pytest.mark.parametrize(
    ("algorithm", "carries"),
    [
        (["algorithm.name=dpok", "algorithm.value_learning_rate=0.01"], True),
        (["algorithm.name=d3po", "selector.name=every_step"], False),
        (["algorithm.name=awm", "algorithm.num_draws=3"], True),
        (["algorithm.name=diffusion_nft"], True),
    ],
    ids=["dpok", "d3po", "awm", "diffusion_nft"],
)
def test_an_algorithm_with_a_memory_of_its_own_resumes_bit_for_bit(tmp_path: Path, algorithm: list[str], carries: bool):
    """DPOK's critic with its optimiser and its images, AWM's average: killed in iteration 1, after a checkpoint."""
    _trainer(_config(tmp_path / "alone", *algorithm)).train()
    config = _config(tmp_path / "killed", *algorithm)
    with pytest.raises(KeyboardInterrupt):
        _trainer(config, _calls(_interrupt, 3)).train()
    assert len(lines_of(tmp_path / "killed")) == 1
    _trainer(config).resume(accept_changes=True)
    _check_same_run(tmp_path / "killed", tmp_path / "alone")
    first, second = (load_file(tmp_path / "alone" / f"checkpoints/00000{n}/state.safetensors") for n in (1, 2))
    own = {name for name in second if name.startswith("algorithm.")}
    assert bool(own) == carries
    assert all(name in first for name in own)
    assert not carries or any(not torch.equal(first[name], second[name]) for name in own), "it learns"
    assert any(not torch.equal(first[name], second[name]) for name in second if name.startswith("adapter."))


def test_a_kill_in_the_middle_of_writing_is_repaired(tmp_path: Path, alone: tuple[Path, Result]):
    """The last line of the log cut short, a checkpoint begun, and one without its state: as after pulling the plug."""
    config, folder = _config(tmp_path / "run"), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        _trainer(config, _calls(_interrupt, 4)).train()
    log = folder / "stats.jsonl"
    log.write_text(log.read_text()[:-40])
    newest = folder / "checkpoints" / "000002"
    newest.rename(newest.with_name(".000002.partial"))
    newest.mkdir()
    _trainer(config).resume(accept_changes=True)
    _check_same_run(folder, alone[0])


def test_no_iteration_is_lost_from_the_log_when_the_kill_comes_between_checkpoint_and_log(
    tmp_path: Path, alone: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
):
    config, trainer = _config(tmp_path / "run"), _trainer(_config(tmp_path / "run"))
    save = Trainer._save

    def save_and_die(self: Trainer, *arguments: object) -> None:
        save(self, *arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    _trainer(config).resume(accept_changes=True)
    _check_same_run(tmp_path / "run", alone[0])


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (lambda scores: scores * math.nan, "reward 'reward' must be finite, got nan"),
        (lambda scores: scores[:, None], r"reward 'reward' must return one number an image, shape \[2\], got"),
    ],
    ids=["NaN", "shape"],
)
def test_a_bad_reward_stops_the_run_and_keeps_what_was_reached(
    tmp_path: Path, outcome: Callable[[Tensor], object], message: str
):
    with pytest.raises(ValueError, match=message):
        _trainer(_config(tmp_path / "run"), _calls(outcome, 3)).train()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("0*")] == ["000001"]
    assert len(lines_of(tmp_path / "run")) == 1
    _, backbone = load_run(tmp_path / "run")
    assert any(value.abs().max() > 0 for key, value in backbone.adapter_tensors().items() if "lora_B" in key)


def test_what_cannot_start_leaves_nothing_behind_and_replaces_nothing(tmp_path: Path, alone: tuple[Path, Result]):
    with pytest.raises(ValueError, match=r"model.lora_targets must name layers of the unet"):
        _trainer(_config(tmp_path / "new", "model.lora_targets=['no_such_layer']")).train()
    assert not (tmp_path / "new").exists()
    before = {path: path.read_bytes() for path in alone[0].rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"model.lora_targets must name layers of the unet"):
        _trainer(_config(alone[0], "model.lora_targets=['no_such_layer']")).train(overwrite=True)
    with pytest.raises(ConfigError, match="a run never replaces what is there"):
        _trainer(_config(alone[0])).train()
    assert {path: path.read_bytes() for path in alone[0].rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("prompts", [[], [" "], ["x" * 10_000]])
def test_bad_prompts_are_refused_before_anything_is_written(tmp_path: Path, prompts: list[str]):
    with pytest.raises(ValueError, match=r"train_prompts(\[0\])? (needs at least one|is empty|has 10000)"):
        Trainer(_config(tmp_path / "run"), reward=redness, train_prompts=prompts)
    assert not (tmp_path / "run").exists()


def _draw_plain(pipeline, name: str, prompts: Sequence[str], initial: Tensor) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    count = len(prompts)
    options = {"eta": 0.0} if name == "scenes" else {"max_sequence_length": 1, "prompt_3": [""] * count}
    drawn = pipeline(
        list(prompts), latents=initial.clone(), num_inference_steps=4, guidance_scale=1.0, output_type="pt", **options
    )
    return drawn.images


@pytest.mark.parametrize(
    ("name", "plain_class"), [("scenes", StableDiffusionPipeline), ("scenes-flow", StableDiffusion3Pipeline)]
)
def test_the_adapter_draws_the_same_in_plain_diffusers(tmp_path: Path, name: str, plain_class: type):
    overrides = ["train.learning_rate=0.1", "model.lora_alpha=6", f"model.name={name}"]
    if name == "scenes-flow":
        overrides.append("algorithm.name=grpo")
    _trainer(_config(tmp_path / "run", *overrides)).train()
    _, backbone = load_run(tmp_path / "run")
    ours = draw(backbone, CAPTIONS, [1], num_steps=4, guidance_scale=1.0)
    initial = initial_latents(backbone, [1, 1])
    pipeline = plain_class.from_pretrained(backbones.folder_of(name))
    base = _draw_plain(pipeline, name, CAPTIONS, initial)
    pipeline.load_lora_weights(tmp_path / "run" / "adapter")
    trained = _draw_plain(pipeline, name, CAPTIONS, initial)
    torch.testing.assert_close(ours, trained, rtol=0, atol=1e-4)
    assert (trained - base).abs().amax((1, 2, 3)).min() > 0.05, "training changed every picture"
    with backbone.reference_policy():
        untrained = draw(backbone, CAPTIONS, [1], num_steps=4, guidance_scale=1.0)
    torch.testing.assert_close(untrained, base, rtol=0, atol=1e-4)


def test_every_algorithm_and_selector_of_the_configuration_exists(tmp_path: Path):
    def names(section: str) -> list[str]:
        return [name for name in choices_of(Config.model_fields[section].annotation) if name != OWN]

    assert len(names("algorithm")) == 15
    sets = {"diffusion_dpo": write_pairs(tmp_path / "pairs"), "diffusion_kto": write_judged(tmp_path / "judged")}
    for name in names("algorithm"):
        overrides = [f"algorithm.name={name}", *([f"algorithm.preferences={sets[name]}"] if name in sets else [])]
        assert algorithm_of(Config.load(None, overrides)).name == name
    settings = ["algorithm.backfill=full", "algorithm.attribution=discount", "algorithm.gamma=0.5"]
    made: Any = algorithm_of(Config.load(None, settings))
    assert made.attribution == Attribution(backfill="full", attribution="discount", gamma=0.5)
    needed = {
        "random_fraction": {"fraction": 0.5},
        "static_range": {"start": 2, "end": 9},
        "threshold": {"uncertainty_low": 0.01, "uncertainty_high": 0.1},
    }
    for name in names("selector"):
        config = Config.of({"selector": {"name": name} | needed.get(name, {})})
        assert selector_of(config, LatentSensor()).state_dict() in ({}, {"memory": {}})


def test_selectors_are_built_as_configured():
    def built(*overrides: str) -> object:
        config = Config.load(None, ["run.seed=7", *(f"selector.{override}" for override in overrides)])
        return selector_of(config, LatentSensor())

    assert built("name=static_range", "start=7", "end=15") == StaticRange(start=7, end=15)
    assert built("name=random_fraction", "fraction=0.3") == RandomFraction(fraction=0.3, seed=7)
    assert built("name=late_start") == LateStart()
    assert LateStart().range_of(20) == (4, 20), "SPO's: step 4 of 20 to the end"
    assert built("name=late_start", "start=7", "end=15") == LateStart(start=7, end=15)
    bounds: dict[str, Any] = {"uncertainty_low": 0.01, "uncertainty_high": 0.1}
    assert built("name=threshold", *(f"{key}={value}" for key, value in bounds.items())) == Threshold(**bounds)
    assert built("name=window") == Window(window_size=2, shift_every=25, seed=7)
    keys = ["window_size=3", "shift_every=9", "window_shift=2", "start=1", "end=15", "at_limit=clamp"]
    decay = ["shift_decay=exponential", "decay_rate=0.2", "decay_from=5", "ode_outside=false"]
    assert built("name=window", *keys, *decay) == Window(
        window_size=3, shift_every=9, window_shift=2, start=1, end=15, at_limit="clamp", shift_decay="exponential",
        decay_rate=0.2, decay_from=5, ode_outside=False, seed=7,
    )  # fmt: skip
    linear = built("name=window", "shift_decay=linear", "shift_every_min=2", "last_step=train")
    assert linear == Window(shift_decay="linear", shift_every_min=2, last_step="train", seed=7)
    assert built("name=window", "window_order=random") == Window(window_order="random", seed=7)
    assert built("name=fast_window", "end=10") == FastWindow(window_size=2, end=10, seed=7)
    assert built("name=fast_window", "end=10", "ode_outside=false") == FastWindow(end=10, ode_outside=False, seed=7)


def test_prompts_of_an_iteration_depend_on_the_seed_and_its_number(tmp_path: Path):
    def chosen(seed: int, iteration: int) -> list[str]:
        overrides = ["train.prompts_per_iteration=5", f"run.seed={seed}"]
        prompts: dict[str, Any] = {"train_prompts": list("abcdefgh"), "held_out_prompts": ["i"]}
        trainer = Trainer(_config(tmp_path / "run", *overrides), reward=redness, **prompts)
        return trainer.prompts_of(iteration)

    assert chosen(0, 0) == chosen(0, 0)
    assert len({tuple(chosen(seed, iteration)) for seed in (0, 1) for iteration in (0, 1, 2)}) == 6
    batch = chosen(0, 0)
    assert len(batch) == 10
    assert batch[::2] == batch[1::2], "each prompt is repeated for its group"
    assert len(set(batch)) == 5, "no prompt comes twice while there are enough"
