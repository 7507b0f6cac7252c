"""The paper's other experiments: each is declared soundly; the runner trains, shares, compares and shows its arms."""

import importlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call

from adascope_fast.config import Config
from adascope_fast.prompts import load

CHECKOUT = Path(__file__).parents[2]
TINY = CHECKOUT / "configs" / "tiny.toml"


@pytest.fixture(scope="module")
def paper() -> Any:
    sys.path.insert(0, str(CHECKOUT))
    found = {name: importlib.import_module(f"experiments.paper.{name}") for name in ("run", "declaring", "showing")}
    yield type("Paper", (), found)
    sys.path.remove(str(CHECKOUT))


@pytest.fixture
def run(paper: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The command, with the trainings in this process; the exit code, and the run folders that were trained."""
    started: list[str] = []

    def inside(command: Sequence[str], log: Path, *, threads: int = 1) -> None:
        started.append(log.stem)
        outcome = call(*command[3:])
        assert outcome.code == 0, outcome

    monkeypatch.setattr(paper.run.runs, "call", inside)

    def script(*arguments: str) -> tuple[Any, list[str]]:
        started.clear()
        with pytest.raises(SystemExit) as stopped:
            paper.run.main([*arguments, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")])
        return stopped.value.code, list(started)

    return script


def test_a_control_is_as_long_as_the_interval_it_is_like_and_nothing_is_trained_twice(
    run: Any, paper: Any, tmp_path: Path
):
    asked = ("ablations", "--quick", "--arms", "control_random_place", "v1")
    code, started = run(*asked)
    assert (code, len(started)) == (0, 3), "adascope, which both are compared with, comes along"
    values = json.loads((tmp_path / "out.json").read_text())
    arms = values["arms"]
    assert list(arms) == ["adascope", "v1", "control_random_place"]
    folder = {
        json.loads((one / "run.json").read_text())["status"]: one
        for one in (tmp_path / "work").iterdir()
        if one.is_dir() and Config.load(one / "config.toml").selector.name == "window"
    }["finished"]
    selector: Any = Config.load(folder / "config.toml").selector
    size = selector.window_size
    chosen = [
        json.loads(line)["selector"]["fraction"]
        for one in (tmp_path / "work").iterdir()
        if one.is_dir() and Config.load(one / "config.toml").selector.name == "adascope"
        for line in (one / "stats.jsonl").read_text().splitlines()
    ]
    assert size == max(1, round(np.mean(chosen) * 6))
    assert arms["v1"]["more"]["value"] == pytest.approx(arms["v1"]["gain"]["value"] - arms["adascope"]["gain"]["value"])
    assert arms["v1"]["more"]["word"] in ("more", "less", "too noisy to tell")
    table = (tmp_path / "out.md").read_text()
    (tmp_path / "out.md").unlink()
    paper.run.main(["ablations", "--redraw", "--out", str(tmp_path / "out.json")])
    assert (tmp_path / "out.md").read_text() == table
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")] == [
        "| `adascope`", "| `v1`", "| `control_random_place`"
    ] * 2, "what was gained, and what it cost"  # fmt: skip
    assert (tmp_path / "out.png").stat().st_size > 5000
    assert run(*asked) == (0, []), "what is finished is not repeated"
    code, started = run("fig3", "--quick", "--arms", "backfilled")
    assert (code, len(started)) == (0, 2), "sparse and backfilled"
    assert run("fig3", "--quick", "--arms", "adascope") == (0, []), "the common arm is shared"


def test_each_arm_gets_the_best_of_its_own_tuning(run: Any, paper: Any, tmp_path: Path):
    code, started = run("flow", "--quick", "--arms", "adascope")
    assert (code, len(started)) == (0, 2 * 2 + 2), "two rates each, then flow_grpo and adascope"
    values = json.loads((tmp_path / "out.json").read_text())
    assert list(values["tuning"]) == list(values["arms"]) == ["flow_grpo", "adascope"]
    for name, tuned in values["tuning"].items():
        assert [one["rate"] for one in tuned] == [3e-3, 1e-2]
        best = max(tuned, key=lambda one: one["gain"])["rate"]
        assert values["arms"][name]["learning_rate"] == best
        assert values["arms"][name]["within"]["cpu_seconds"]["limit"] <= values["arms"][name]["cpu_seconds"]["low"]
    made = [Config.load(one / "config.toml") for one in (tmp_path / "work").iterdir() if one.is_dir()]
    tunings = [one for one in made if one.run.seed == paper.run.runs.TUNING_SEED]
    assert len(tunings) == 4
    assert {one.prompts.held_out for one in tunings} == {"experiments/algorithms/tuning_captions.txt"}
    assert all(one.prompts.held_out == "scenes:held_out" for one in made if one not in tunings)
    assert "Each arm has the best of 2 learning rates" in (tmp_path / "out.md").read_text()
    assert paper.run.best_rate([{"rate": 1, "gain": math.nan}, {"rate": 2, "gain": -0.1}]) == 2
    config = paper.declaring.config_of(paper.run.declared()["flow"], "adascope").train
    half = paper.declaring.tuning_changes(paper.run.declared()["flow"], "adascope", 1e-2, ())
    assert f"train.iterations={config.iterations // 2}" in half
    with pytest.raises(ValueError, match="are not tuned; remove rates"):
        paper.declaring.Experiment(
            "", "", {"one": paper.declaring.Arm((), captions="red", is_of_scenes=True)}, rates=(1e-3,)
        )


def test_what_learns_from_preferences_gets_a_set_of_its_own(run: Any, tmp_path: Path):
    code, started = run("tab3", "--quick", "--arms", "diffusion_kto")
    assert code == 0
    sets = [one for one in started if one.startswith("preferences")]
    assert len(sets) == 1, "one for all its runs"
    assert started[-1] == "out-evaluated"
    values = json.loads((tmp_path / "out.json").read_text())
    assert list(values["arms"]) == ["ddpo", "diffusion_kto"]
    assert (tmp_path / "out_images.png").stat().st_size > 5000
    table = (tmp_path / "out.md").read_text().splitlines()
    heads = next(line for line in table if line.startswith("|  | scene_attributes, higher is better"))
    rows = [line for line in table if line.count("|") == heads.count("|") and line.startswith("| `")]
    assert [line.split("`")[1] for line in rows][:3] == ["base", "ddpo", "diffusion_kto"]
    assert any(line.startswith("- FID needs the weights of inception") for line in table), "what is missing is said"


def test_the_best_value_of_a_metric_is_bold(paper: Any):
    lines = [
        "arm,group,metric,better,value,low,high,why",
        "base,quality,BRI,lower,48.51,47,49,", "mine,quality,BRI,lower,44.83,43,46,",
        "base,besides,RMSD,higher,0.3356,,,", "mine,besides,RMSD,higher,,,,", "base,fidelity,FID,lower,,,,FID needs x",
        "mine,fidelity,FID,lower,,,,FID needs x",
    ]  # fmt: skip
    assert paper.showing._of_csv(lines) == [
        "|  | BRI, lower is better |", "|---|---|", "| `base` | 48.5 [47, 49] |", "| `mine` | **44.8** [43, 46] |", "",
        "|  | RMSD, higher is better |", "|---|---|", "| `base` | **0.336** |", "| `mine` |  |", "", "- FID needs x",
    ]  # fmt: skip


def test_mistakes_are_told_with_the_next_step(run: Any, capsys: pytest.CaptureFixture[str]):
    for arguments, line in (
        (("nothing",), "an experiment is one of ablations, "),
        (("fig3", "--arms", "nobody"), "arms of fig3 are sparse, backfilled, adascope, got nobody; name these"),
        (("fig3", "--jobs", "0"), "--jobs is above 0, got 0; raise it"),
    ):
        code, _ = run(*arguments)
        assert code == 2
        assert line in capsys.readouterr().err


def test_every_arm_is_a_configuration_in_full_and_in_small(paper: Any, tmp_path: Path):
    interval = {"fraction": "0.4", "length": 3, "start": 1, "end": 4}
    for name, experiment in paper.run.declared().items():
        folders = set()
        for arm in experiment.arms:
            paper.run.write_captions(experiment.arms[arm], tmp_path)
            for changes in (paper.run.quick_of(experiment, arm), ()):
                folder, config, settings = paper.declaring.settings_of(
                    experiment, arm, 0, tmp_path, interval, changes=changes
                )
                made = Config.load(config, settings)
                assert made.run.folder == str(folder)
                end = getattr(made.selector, "end", None)
                assert end is None or end <= made.sampler.num_steps
            folders.add(folder)
        assert len(folders) == len(experiment.arms), f"arms of {name} differ"
    listed = paper.run.listed(paper.run.declared())
    assert "fig3" in listed
    assert "CPU hours in all" in listed


def test_the_fixed_intervals_are_the_papers_at_10_steps(paper: Any):
    arms = paper.run.declared()["ablations"].arms
    for name, want in {"v1": (1, 6), "v2_early": (0, 7), "v2_late": (2, 7), "v3_long": (1, 8)}.items():
        assert f"selector.start={want[0]}" in arms[name].changes
        assert f"selector.end={want[1]}" in arms[name].changes


def test_unseen_captions_are_judged_and_never_trained_on(paper: Any, tmp_path: Path):
    arm = paper.run.declared()["unseen"].arms["colour_adascope"]
    paper.run.write_captions(arm, tmp_path)
    train, held_out = (
        paper.declaring.captions_file(tmp_path, part, pattern).read_text().splitlines()
        for part, pattern in arm.patterns().items()
    )
    assert train
    assert held_out
    assert not any(colour in text for text in train for colour in ("blue", "purple"))
    assert all("blue" in text or "purple" in text for text in held_out)
    assert set(train) <= set(load("scenes:train"))
    assert set(held_out) <= set(load("scenes:held_out"))


def test_an_arm_has_the_colour_of_its_host_and_many_arms_are_rows(paper: Any, tmp_path: Path):
    def lines(**against: str | None) -> dict[str, tuple[str, str]]:
        return paper.showing._lines({name: {"against": other} for name, other in against.items()})

    paired = lines(ddpo=None, ddpo_adascope="ddpo", dpok=None, dpok_adascope="dpok")
    assert paired["ddpo"] == (paired["ddpo_adascope"][0], "--")
    assert paired["ddpo_adascope"][1] == "-"
    assert len({colour for colour, _ in paired.values()}) == 2
    shared = lines(sparse=None, backfilled="sparse", adascope="backfilled")
    assert len({colour for colour, _ in shared.values()}) == 3, "its own is compared with another"
    assert len({colour for colour, _ in lines(adascope=None, a="adascope", b="adascope").values()}) == 3
    ablations = json.loads((CHECKOUT / "experiments" / "paper" / "results" / "ablations.json").read_text())
    assert len(ablations["arms"]) > paper.showing.MOST_LINES
    paper.showing.plot(ablations, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 5000


def test_theorem_2_is_that_of_the_schedule(paper: Any):
    """By hand at the last step: what is left clean has correlation sqrt(1 / (1 + 1/SNR)) with what went in."""
    from adascope_fast import backbones

    curve = importlib.import_module("experiments.paper.declared.fig1").theorem_2(10)
    config = Config.load(None, ["model.name=scenes"])
    schedule = backbones.load("scenes", **config.model.options()).schedule(
        10, kind="auto", eta=None, noise_level=None, shift=None
    )
    noise = float((-schedule.log_snr[-1].double()).exp())
    assert len(curve) == 10
    assert curve[-1] == pytest.approx(1 - (1 / (1 + noise)) ** 0.5)
    assert curve[0] > curve[5]


def _run(folder: Path, rewards: Sequence[float], *, seconds: float) -> Path:
    """A finished run of three iterations, evaluated after each, on four captions with one image each."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(Config.load(None, ["train.learning_rate=2e-3"]).to_toml())
    records = [
        {"cpu_seconds": seconds, "pairs_trained": 10, "fraction_trained": 0.5, "selector": {"fraction": 0.5}}
        for _ in rewards[1:]
    ]
    (folder / "stats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sides = {
        when: {"mean": value, "scores": [[value + k / 100] for k in range(4)], "diversity": 0.3, "contrast": 0.1}
        for when, value in (("before", rewards[0]), ("after", rewards[-1]))
    }
    history = [{"iteration": k, "mean": value} for k, value in enumerate(rewards)]
    (folder / "evaluation.json").write_text(json.dumps(sides | {"history": history}))
    return folder


def test_an_arm_is_compared_with_its_own_other(paper: Any, tmp_path: Path):
    arm = paper.declaring.Arm
    experiment = paper.declaring.Experiment(
        "", "", {"slow": arm(()), "fast": arm((), against="slow")}, seeds=(0, 1), gain=0.1
    )
    folders = {
        "slow": [_run(tmp_path / f"slow{k}", (0.5, 0.52, 0.54, 0.65), seconds=20) for k in range(2)],
        "fast": [_run(tmp_path / f"fast{k}", (0.5, 0.6, 0.7, 0.72), seconds=10) for k in range(2)],
    }
    found = paper.showing.arms_of(experiment, folders)
    assert found["fast"]["gain"]["value"] == pytest.approx(0.22)
    assert found["fast"]["more"]["value"] == pytest.approx(0.07)
    assert found["fast"]["more"]["word"] == "more"
    assert found["fast"]["share_of_seconds"] == pytest.approx(0.5)
    assert found["fast"]["to_gain"]["cpu_seconds"]["value"] == pytest.approx(10)
    assert found["slow"]["to_gain"]["cpu_seconds"]["value"] == pytest.approx(40 + 20 * 0.06 / 0.11, rel=1e-2)
    times = found["fast"]["to_gain"]["cpu_seconds"]["times"]
    assert times["value"] is None, "slow is not there within the 30 s that both have"
    assert times["bounds"][0] == pytest.approx(3)
    assert found["fast"]["cpu_seconds"] == {"mean": 30, "low": 30, "high": 30}
    assert found["slow"]["learning_rate"] == 2e-3
    within = {name: arm["within"] for name, arm in found.items()}
    assert within["slow"]["cpu_seconds"]["limit"] == pytest.approx(30), "where fast ends"
    assert within["slow"]["cpu_seconds"]["value"] == pytest.approx(0.03), "half-way to its second point"
    assert within["fast"]["cpu_seconds"]["value"] == pytest.approx(0.22)
    assert within["slow"]["pairs"]["value"] == pytest.approx(0.15)
    with pytest.raises(ValueError, match="arms are compared with arms of the same experiment, got nobody; add them"):
        paper.declaring.Experiment("", "", {"one": arm((), against="nobody")})


def test_a_configuration_of_ones_own_takes_the_place_of_the_models(
    run: Any, paper: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tmp_path / "mine.toml"
    config.write_text(TINY.read_text().replace("num_steps = 6", "num_steps = 20"))
    own = ("--config", str(config), "--thresholds", "0.5", "0.3")
    code, started = run("fig3", "--quick", *own)
    assert (code, len(started)) == (0, 3)
    made = [Config.load(one / "config.toml") for one in (tmp_path / "work").iterdir() if one.is_dir()]
    assert {one.model.lora_rank for one in made} == {4}, "the configuration's, not 8"
    selectors: list[Any] = [one.selector for one in made if one.selector.name == "adascope"]
    assert [(one.kappa, one.phi_end) for one in selectors] == [(0.5, 0.3)]
    ablations = paper.declaring.on(paper.run.declared()["ablations"], config, (0.5, 0.3), None)
    assert "the_papers_mean" not in ablations.arms
    assert "control_complement" in ablations.arms
    fixed = paper.declaring.settings_of(ablations, "v1", 0, tmp_path)
    selector: Any = Config.load(*fixed[1:]).selector
    assert (selector.start, selector.end) == (2, 12), "of 20 steps"
    for arguments, line in (
        (("rewards", *own), "captions or thresholds of the embedded models alone"),
        (("tab1", *own, "--quick"), "name a file of them with --tuning"),
        (("fig3", "--config", str(config)), "give --thresholds KAPPA PHI_END"),
        (("fig3", "--thresholds", "0.5", "0.3"), "for a --config of your own, got none"),
    ):
        code, _ = run(*arguments)
        assert code == 2
        assert line in capsys.readouterr().err
    with pytest.raises(ValueError, match="set is_of_scenes of such arms"):
        paper.declaring.Experiment("", "", {"one": paper.declaring.Arm((), captions="red")})
