"""Time to reward: its arms can all be trained, its arithmetic is right, and all of it runs in small."""

import importlib
import json
import logging
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adascope_fast.algorithms.advantages import PerPromptTracker
from adascope_fast.planning.calibration import PAPER, calibrate
from adascope_fast.prompts import load
from adascope_fast.rewards.scene_attributes import SceneAttributes

CHECKOUT = Path(__file__).parents[2]
PEERS = CHECKOUT / "experiments" / "paper" / "peers"
SCENES = CHECKOUT / "adascope_fast" / "assets" / "scenes"


@pytest.fixture(scope="module")
def paper() -> Any:
    """The modules of the experiment by name, found as they find each other when the scripts run."""
    folders = [str(CHECKOUT), str(PEERS), str(CHECKOUT / "bench" / "baselines")]
    scripts = ("loop", "ours", "eager_ddpo", "transformers_4", "common", "eager")
    others = {name: sys.modules.pop(name) for name in scripts if name in sys.modules}  # such as bench/baselines/ours.py
    sys.path[:0] = folders
    names = ("time_to_reward", "arms", "figures", "held_out", "measures")
    found = {name: importlib.import_module(f"experiments.paper.{name}") for name in names}
    found |= {name: importlib.import_module(name) for name in scripts[:4]}
    yield type("Paper", (), found)
    for folder in folders:
        sys.path.remove(folder)
    for name in scripts:
        sys.modules.pop(name, None)
    sys.modules.update(others)


@pytest.fixture
def run(paper: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The command, with the scripts that it starts in this process; the exit code, and the logs of what was started."""
    started: list[str] = []

    def inside(command: Sequence[str], log: Path, *, threads: int = 1) -> None:
        started.append(log.stem)
        monkeypatch.setattr(sys, "argv", [str(one) for one in command[1:]])
        monkeypatch.setattr(logging, "disable", lambda level: None)
        monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
        runpy.run_path(command[1], run_name="__main__")

    monkeypatch.setattr(paper.time_to_reward.runs, "call", inside)

    def script(*arguments: str) -> tuple[Any, list[str]]:
        started.clear()
        asked = ["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json"), *arguments]
        with pytest.raises(SystemExit) as stopped:
            paper.time_to_reward.main(asked)
        return stopped.value.code, list(started)

    return script


def test_arms_are_tuned_trained_measured_and_shown_once(
    paper: Any, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    asked = ("--arms", "every_step_balanced", "adascope")
    code, started = run(*asked)
    tune = [f"tune-{rate:g}-{updates}" for rate, updates in paper.arms.GRID[:2]]
    assert code == 0
    assert [name for name in started if not name.endswith(("-tuning", "-reported"))] == [
        *(f"{arm}-{point}" for arm in ("every_step_balanced", "adascope") for point in tune),
        "every_step_balanced-0",
        "adascope-0",
    ]
    said = capsys.readouterr().out
    assert f"[1/6] every_step_balanced-{tune[0]}: trained and measured in" in said
    assert "[6/6] adascope-0: trained and measured in" in said
    values = json.loads((tmp_path / "out.json").read_text())
    pairs = {name: arm["last_pairs"] for name, arm in values["arms"].items()}
    # Iterations, images, steps; images of equal rewards have no advantage, and are not trained.
    assert 0 <= pairs["every_step_balanced"][0] <= 2 * 4 * 6
    assert pairs["every_step_balanced"][0] % 6 == 0
    assert 0 <= pairs["adascope"][0] < 2 * 4 * 6
    points = paper.held_out.measured(tmp_path / "work" / "adascope-0", tmp_path / "work" / "reported.txt")
    base = paper.held_out.measured(tmp_path / "work" / "base", tmp_path / "work" / "reported.txt")
    assert values["base"] == pytest.approx(np.mean(base[0]["scores"]))
    assert values["arms"]["adascope"]["last_gain"] == [
        pytest.approx(np.mean(points[-1]["scores"]) - np.mean(base[0]["scores"]))
    ]
    best = max(values["tuning"]["adascope"], key=lambda row: row["gain"])
    assert values["settings"]["adascope"]["learning_rate"] == best["learning_rate"]
    assert values["settings"]["adascope"]["updates"] == best["updates"]
    assert [(goal["arm"], goal["base"]) for goal in values["goals"]] == [("adascope", "every_step_balanced")] * 2
    assert "| AdaScope | ours, every step, balanced | +0.05 |" in (tmp_path / "out.md").read_text()
    assert (tmp_path / "out.png").stat().st_size > 5000

    (tmp_path / "work" / "adascope-0" / "finished.json").unlink()  # as a kill leaves it
    assert run(*asked) == (0, ["adascope-0", "adascope-0-reported"]), "what is finished is not repeated"
    scores = tmp_path / "work" / "adascope-0" / "held_out-reported.jsonl"
    scores.write_text(scores.read_text()[:-9])
    assert run(*asked) == (0, ["adascope-0-reported"]), "a line that is cut short is measured again"
    code, started = run(*asked, "--seconds", "7")
    assert (code, started) == (2, [])
    assert f"seconds = {paper.arms.FAMILIES['scenes'].seconds / 2} (asked for: 3.5)" in capsys.readouterr().err


def test_what_was_measured_stands_in_for_a_run_whose_folder_is_gone(
    paper: Any, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    asked = ("--arms", "adascope", "--records", str(tmp_path / "records"))
    assert run(*asked)[0] == 0
    before = json.loads((tmp_path / "out.json").read_text()) | {
        "command": ""
    }  # scripts in this process have changed it
    kept = sorted(path.name for path in (tmp_path / "records").iterdir())
    points = [f"adascope-tune-{rate:g}-{updates}.json" for rate, updates in paper.arms.GRID[:2]]
    assert kept == sorted(["adascope-0.json", *points])
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "records").iterdir())
    shutil.rmtree(tmp_path / "work")
    code, started = run(*asked)
    assert (code, started) == (0, ["base-tuning", "base-reported"])
    assert json.loads((tmp_path / "out.json").read_text()) | {"command": ""} == before

    shutil.rmtree(tmp_path / "work")
    code, started = run(*asked, "--seconds", "7")
    assert code == 0
    assert "adascope-0" in started, "another setting is another run"


def test_the_eager_loop_trains_and_its_weights_are_measured(run: Any, tmp_path: Path):
    code, _ = run("--arms", "eager")
    assert code == 0
    folder = tmp_path / "work" / "eager-0"
    (point,) = [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()]
    assert (point["iteration"], point["pairs"], point["images"]) == (2, 2 * 4 * 6, 2 * 4)
    weights = load_file(folder / "weights" / "00002.safetensors")
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)


def test_mistakes_are_told_with_the_next_step(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, line in (
        (("--arms", "nobody"), "arms of scenes are trl, eager, every_step, "),
        (("--jobs", "0"), "--jobs is above 0, got 0; raise it"),
        (("--arms", "trl", "--trl-python", str(tmp_path / "none")), "makes it, --trl-python names another"),
        (("--arms", "adascope", "--stages", "run"), "adascope has none in"),
    ):
        code, _ = run(*arguments)
        assert code == 2
        assert line in capsys.readouterr().err


def _setting(paper: Any, family: Any, arm: Any, rate: float, updates: int) -> Any:
    return paper.loop.Setting(
        out="out", model=str(family.folder), prompts=["a"], other_prompt="b", seed=3, seconds=10, marks=5,
        learning_rate=rate, updates=updates, num_steps=family.num_steps, guidance_scale=family.guidance_scale,
        changes=[f"model.name={family.model}", *arm.changes],
    )  # fmt: skip


def test_every_arm_can_be_configured_at_each_point_of_its_grid(paper: Any):
    for family in paper.arms.FAMILIES.values():
        assert {len(arm.grid) for arm in family.arms} == {4}, "none is tuned more than another"
        for arm in family.arms:
            for rate, updates in arm.grid:
                if arm.script != "ours.py":
                    continue
                config = paper.ours.configuration(_setting(paper, family, arm, rate, updates))
                assert (config.train.learning_rate, config.train.num_updates) == (rate, updates)
                assert config.sampler.guidance_scale == family.guidance_scale
                assert (config.selector.name == "adascope") == arm.name.startswith("adascope")
        known = {arm.name for arm in family.arms}
        assert {name for goal in family.goals for name in (goal.arm, goal.base)} | {family.rival} <= known


@pytest.mark.parametrize("name", ["scenes", "flow"])
def test_the_thresholds_end_where_the_reward_saturates(paper: Any, name: str):
    family = paper.arms.FAMILIES[name]
    arms = {arm.name: arm for arm in family.arms}
    setting = _setting(paper, family, arms["adascope"], 1e-3, 1)
    config = paper.ours.configuration(setting).changed(["sampler.guidance_scale=1"])
    found = calibrate(config, num_prompts=12)
    end = found.target[1] * found.num_steps
    assert found.configured.mean_start == 0
    assert found.configured.mean_end == pytest.approx(end, abs=1)
    assert end < PAPER[1] * found.num_steps - 1, "sooner than the paper's interval"


def test_captions_are_trained_on_tuned_on_or_reported(paper: Any):
    tuning = paper.time_to_reward.TUNING_CAPTIONS.read_text().splitlines()
    held = load("scenes:held_out")
    reported = held[: paper.time_to_reward.NUM_CAPTIONS]
    assert not set(tuning) & set(reported)
    assert not (set(tuning) | set(reported) | {held[-1]}) & set(load("scenes:train"))


def test_the_eager_statistics_are_ours(paper: Any):
    captions = ["a"] * 3 + ["b"] * 2 + ["c"]
    eager, ours = paper.eager_ddpo.ByCaption(4, 3), PerPromptTracker(buffer_size=4, min_count=3)
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        rewards = torch.rand(6, generator=random)
        torch.testing.assert_close(
            eager(captions, rewards), ours(rewards, captions, 1)[:, 0].float(), rtol=1e-4, atol=1e-5
        )


def test_the_reward_alone_is_the_packages(paper: Any):
    captions = load("scenes:train")[:6]
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    known = set(sys.modules)
    alone = paper.loop.scene_attributes()
    assert set(sys.modules) - known <= {"scene_attributes_alone"}
    torch.testing.assert_close(alone(images, captions), SceneAttributes()(images, captions))


def test_transformers_4_finds_the_text_encoder(paper: Any, tmp_path: Path):
    folder = paper.transformers_4.for_transformers_4(SCENES, tmp_path / "scenes")
    given, found = (load_file(one / "text_encoder" / "model.safetensors") for one in (SCENES, folder))
    assert set(found) == {f"text_model.{name.removeprefix('text_model.')}" for name in given}
    for name, value in given.items():
        assert torch.equal(found[f"text_model.{name.removeprefix('text_model.')}"], value)
    for file in ("model_index.json", "unet/config.json", "text_encoder/config.json"):
        assert (folder / file).read_bytes() == (SCENES / file).read_bytes()
    assert paper.transformers_4.for_transformers_4(SCENES, tmp_path / "scenes") == folder, "again is no error"
    assert paper.transformers_4.named("text_model.final_layer_norm.bias") == "text_model.final_layer_norm.bias"


def test_weights_are_kept_at_even_marks_of_the_seconds(paper: Any, tmp_path: Path):
    """Marks at 25, 50, 75 and 100 s; iterations end at 20, 40, 60 and 110 s, which passes two at once."""
    setting = paper.loop.Setting(
        out=str(tmp_path), model="", prompts=["a"], other_prompt="b", seed=0, seconds=100, marks=4, learning_rate=1e-3,
        updates=1,
    )  # fmt: skip
    kept, wanted = paper.loop.Kept(setting), []
    for seconds in (20, 20, 20, 50):
        assert not kept.is_spent
        wanted.append(kept.add(cpu_seconds=seconds, pairs=10, images=2))
    assert wanted == [False, True, True, True]
    assert kept.is_spent
    kept.keep({"lora_A": torch.ones(2)}, reward=0.5)
    (point,) = [json.loads(line) for line in (tmp_path / "points.jsonl").read_text().splitlines()]
    assert point == {"iteration": 4, "cpu_seconds": 110.0, "pairs": 40, "images": 8, "reward": 0.5}
    assert load_file(tmp_path / "weights" / "00004.safetensors")["lora_A"].tolist() == [1, 1]


def test_captions_of_an_iteration_are_groups_and_follow_the_seed(paper: Any):
    setting = paper.loop.Setting(
        out="", model="", prompts=list("abcdef"), other_prompt="z", seed=0, seconds=1, marks=1, learning_rate=1e-3,
        updates=1, groups=2, group_size=3,
    )  # fmt: skip
    first, second = setting.captions(), setting.captions()
    drawn = first()
    assert drawn == second()
    assert len(set(drawn)) == 2
    assert drawn[:3] == [drawn[0]] * 3
    assert drawn != first()


def test_a_gain_is_each_captions_and_begins_at_the_base(paper: Any):
    points = [{"cpu_seconds": 10, "pairs": 4, "scores": [[0.5, 0.7], [0.2, 0.4]]}]
    x, gain = paper.measures.gains(points, [[0.4, 0.6], [0.3, 0.5]], "cpu_seconds")
    assert x.tolist() == [0, 10]
    assert gain == pytest.approx(np.array([[0, 0], [0.1, -0.1]]))


def test_the_time_to_a_gain_is_between_points_and_infinite_beyond(paper: Any):
    grid, curve = np.array([0.0, 10.0, 20.0]), np.array([0.0, 0.02, 0.08])
    assert paper.measures.time_to(curve, grid, 0.05) == pytest.approx(15)
    assert paper.measures.time_to(curve, grid, 0.02) == 10
    assert paper.measures.time_to(curve, grid, 0.09) == np.inf


def test_a_ratio_is_open_where_a_time_is_not_known(paper: Any):
    bounds, inf = paper.measures.bounds_of_ratio, np.inf
    assert bounds(50.0, 20.0, 100.0) == (2.5, 2.5)
    assert bounds(inf, 20.0, 100.0) == (5.0, inf), "it took longer than 100"
    assert bounds(50.0, inf, 100.0) == (0.0, 0.5)
    assert bounds(inf, inf, 100.0) == (0.0, inf)


def test_verdicts_follow_the_interval(paper: Any):
    of = paper.measures.Interval
    for interval, goal, want in (
        (of(3.0, 2.5, 4.0), 2.5, "confirmed"),
        (of(3.0, 2.4, 4.0), 2.5, "too noisy to tell"),
        (of(2.0, 1.0, 2.4), 2.5, "not confirmed"),
        (of(2.0, 1.0, 2.5), 2.5, "too noisy to tell"),
        (of(None, 2.6, None), 2.5, "confirmed"),
        (of(None, 0.0, None), 1.5, "too noisy to tell"),
        (of(0.1, 0.0, 0.2), 0.0, "confirmed"),
        (of(-0.1, -0.2, -0.01), 0.0, "not confirmed"),
    ):
        assert paper.measures.verdict(interval, goal) == want


def _points(slope: float, noise: np.random.Generator, *, captions: int = 30) -> list[dict[str, Any]]:
    """A run whose gain grows by `slope` a second over 100 s, in captions that differ by chance."""
    own = noise.normal(0, 0.02, captions)
    return [
        {"iteration": k, "cpu_seconds": 10.0 * k, "pairs": 100 * k, "scores": (0.5 + slope * 10 * k + own)[:, None]}
        for k in range(1, 11)
    ]


def test_an_arm_three_times_as_fast_is_confirmed_and_one_as_fast_is_not(paper: Any):
    noise = np.random.default_rng(0)
    family = paper.arms.FAMILIES["scenes"]
    runs = {
        name: [_points(slope, noise) for _ in range(5)]
        for name, slope in (("trl", 0.001), ("every_step_balanced", 0.003), ("adascope", 0.003))
    }
    found = paper.figures.of(runs, np.full((30, 1), 0.5), family)
    assert found["same"] == {"seconds": 100.0, "pairs": 1000.0}
    goals = {(goal["base"], goal["gain"]): goal for goal in found["goals"] if goal["arm"] == "adascope"}
    against = goals["trl", 0.05]
    assert against["value"] == pytest.approx(3, rel=0.3)
    assert against["low"] < against["value"] < against["high"]
    assert goals["every_step_balanced", 0.05]["verdict"] == "not confirmed"
    assert goals["every_step_balanced", 0.05]["value"] == pytest.approx(1, rel=0.3)
    difference = found["arms"]["adascope"]["seconds"]["more_than_rival"]
    assert difference["value"] == pytest.approx(0.2, abs=0.02)
    assert difference["verdict"] == "confirmed"
    alone = paper.figures.of({"adascope": runs["adascope"]}, np.full((30, 1), 0.5), family)
    assert alone["arms"]["adascope"]["seconds"]["best"]["value"] == pytest.approx(0.3, abs=0.02)
    assert alone["goals"] == []


def test_an_arm_that_never_gets_there_leaves_the_ratio_open(paper: Any):
    noise = np.random.default_rng(0)
    runs = {
        "trl": [_points(-0.001, noise) for _ in range(3)],
        "adascope": [_points(0.005, noise) for _ in range(3)],
    }
    found = paper.figures.of(runs, np.full((30, 1), 0.5), paper.arms.FAMILIES["scenes"])
    (goal, _) = found["goals"]
    assert goal["value"] is None
    assert goal["high"] is None
    assert goal["bounds"][0] == pytest.approx(10, rel=0.3)
    assert goal["verdict"] == "confirmed"
    assert found["arms"]["trl"]["seconds"]["to"]["0.05"]["value"] is None
    labels = {name: {"learning_rate": 1e-3, "updates": 1, "label": name} for name in runs}
    told = {"settings": labels, "seeds": [0, 1, 2]}
    assert "do not compare" in paper.figures.table(found | told | {"pace": {"fastest": 1.0, "slowest": 1.6}})
    shown = paper.figures.table(found | told | {"pace": {"fastest": 1.0, "slowest": 1.1}})
    assert "do not compare" not in shown
    assert "| trl | 0.001, 1 | not within 100 | not within 100 |" in shown
    assert "| adascope | trl | +0.05 | above " in shown


def test_draws_are_of_seeds_and_captions(paper: Any):
    """By hand: two seeds that differ by 1 and captions alike, so a draw's mean is 0, 0.5 or 1; the other way round."""
    seeds = np.zeros((2, 1, 2))
    seeds[1] = 1
    by_seed = paper.measures.draws({"arm": seeds}, 400)["arm"]
    assert set(by_seed[:, 0].round(6)) == {0.0, 0.5, 1.0}
    assert (by_seed == 0.5).mean() == pytest.approx(0.5, abs=0.08)
    by_caption = paper.measures.draws({"one": seeds.transpose(2, 1, 0), "two": seeds.transpose(2, 1, 0)}, 400)
    assert np.array_equal(by_caption["one"], by_caption["two"]), "captions are the same for all arms"
    assert set(by_caption["one"][:, 0].round(6)) == {0.0, 0.5, 1.0}
