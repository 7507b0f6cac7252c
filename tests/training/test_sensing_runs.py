"""Every way of sensing through the trainer: kinds, decoders and rules, resuming, settings that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from adascope_fast import backbones, rewards
from adascope_fast.adascope.settings import Rule
from adascope_fast.cli import app
from adascope_fast.config import Config, ConfigError
from adascope_fast.rewards.settings import JpegCompressibility
from adascope_fast.rollout import EncodedPrompts, OwnNoise, Trajectory, rollout
from adascope_fast.training.building import selector_of, sensor_of
from adascope_fast.training.trainer import Trainer

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
# Two iterations of the smallest run, 6 steps long; one picture before and one after.
SMALL = [
    "reward.name=jpeg_compressibility",  # tells any two images apart, so that every kept pair has an advantage
    "evaluation.num_prompts=1",
    "evaluation.samples_per_prompt=1",
    "train.prompts_per_iteration=1",
    "sensing.every=1",
]
RULES = get_args(Rule)


def _red(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean((1, 2))


def _config(folder: Path, *overrides: str) -> Config:
    return Config.load(TINY, [*SMALL, f"run.folder={folder}", *overrides])


@pytest.fixture(scope="module")
def tiny_autoencoder(tmp_path_factory: pytest.TempPathFactory, save_tiny: Callable) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    return folder


def _sensing(kind: str, decoder: str, rule: str, tiny_autoencoder: Path) -> list[str]:
    """Overrides for a kind, with the keys that it and its decoder have."""
    overrides = [f"selector.rule={rule}", f"sensing.kind={kind}"]
    if kind != "latent":
        overrides += [f"sensing.decoder={decoder}", f"sensing.stride={1 if rule == 'knee_causal' else 2}"]
    return [*overrides, f"sensing.tiny={tiny_autoencoder}"] if decoder == "tiny" else overrides


KINDS = [
    ("latent", "vae"),
    *((kind, decoder) for kind in ("semantic", "reward_only") for decoder in ("vae", "tiny", "linear")),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("kind", "decoder"), KINDS)
def test_every_kind_decoder_and_rule_decides_on_a_rollout(
    tmp_path: Path,
    tiny_autoencoder: Path,
    backbone: Any,
    rollouts: list[Trajectory],
    kind: str,
    decoder: str,
    rule: str,
):
    overrides = _sensing(kind, decoder, rule, tiny_autoencoder)
    if rule == "knee_causal" and kind == "latent":
        with pytest.raises(ConfigError, match="knee_causal decides while sampling"):
            _config(tmp_path, *overrides)
        return
    config = _config(tmp_path, *overrides)
    sensor = sensor_of(config, backbone, rewards.load(JpegCompressibility()))
    selector = selector_of(config, sensor)
    for iteration, trajectory in enumerate(rollouts):
        keep = selector(trajectory, iteration)
        assert keep.any(1).all()
        told = selector.telemetry()
        assert json.loads(json.dumps(told)) == told
        names = {"latent": {"preference", "volatility"}, "reward_only": {"preference", "volatility"}}
        sensed = names.get(kind, {"preference", "structure"})
        assert set(told.get("curves", {})) == (set() if rule in ("schedule", "fixed") else sensed)
        if sensed and "curves" in told:
            assert all(value is not None for curve in told["curves"].values() for value in curve)
    assert bool(sensor.tensors()) == (decoder == "linear" and rule not in ("schedule", "fixed"))


@pytest.fixture(scope="module")
def backbone() -> Any:
    return backbones.load("scenes", lora_rank=1)


@pytest.fixture(scope="module")
def rollouts(backbone: Any) -> list[Trajectory]:
    """Two rollouts of the embedded model, 6 steps long."""
    prompts = ["a large red circle on a grey background"] * 2
    schedule, encoded = backbone.schedule(6), EncodedPrompts.of(backbone, prompts)
    return [
        rollout(
            backbone, schedule, encoded, prompts,
            guidance_scale=1.0, batch=2, noise=OwnNoise(seed),
        )
        for seed in (0, 1)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("kind", "decoder"), KINDS)
def test_every_kind_decoder_and_rule_runs_from_the_command_line(
    tmp_path: Path, tiny_autoencoder: Path, kind: str, decoder: str, rule: str
):
    """The same decisions as above, two iterations with their updates; the fast suite runs a part of them, below."""
    overrides = _sensing(kind, decoder, rule, tiny_autoencoder)
    command = ["train", str(TINY), *SMALL, *overrides, f"run.folder={tmp_path / 'run'}"]
    result = CliRunner().invoke(app, command)
    if rule == "knee_causal" and kind == "latent":
        assert isinstance(result.exception, ConfigError)
        return
    assert result.exit_code == 0, result.exception
    records = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    assert [0 < record["fraction_trained"] <= 1 for record in records] == [True, True]


RUNS = [
    ["sensing.kind=semantic", "sensing.decoder=linear", "selector.rule=knee_causal", "sensing.stride=1"],
    ["sensing.kind=semantic", "sensing.decoder=vae", "selector.pooling=batch", "evaluation.clip=scenes-clip"],
    ["sensing.kind=semantic", "sensing.decoder=tiny", "selector.rule=fraction"],
    ["sensing.kind=reward_only", "sensing.decoder=linear", "selector.rule=literal", "sensing.num_samples=1"],
    ["sensing.kind=semantic", "sensing.decoder=linear", "sensing.every=2", "reward.name=clip_similarity"],
    ["sensing.kind=semantic", "selector.mask_source=previous", "train.update=one_pass"],
    ["sensing.kind=reward_only", "selector.mask_source=previous", "train.update=one_pass"],
    ["sensing.kind=latent", "selector.mask_source=previous", "train.update=one_pass"],
    ["sensing.kind=latent", "selector.rule=schedule"],
    ["sensing.kind=latent", "selector.rule=knee", "selector.min_fraction=0.3", "selector.max_fraction=0.5"],
    ["sensing.kind=latent", "selector.rule=fixed", "selector.fallback=[0.2, 0.8]", "selector.memory_decay=0.0"],
]


@pytest.mark.parametrize("overrides", RUNS, ids=lambda overrides: "-".join(item.split("=")[-1] for item in overrides))
def test_two_iterations_from_the_command_line(tmp_path: Path, tiny_autoencoder: Path, overrides: list[str]):
    if "sensing.kind=latent" not in overrides and "sensing.stride=1" not in overrides:
        overrides = [*overrides, "sensing.stride=2"]
    if "sensing.decoder=tiny" in overrides:
        overrides = [*overrides, f"sensing.tiny={tiny_autoencoder}"]
    result = CliRunner().invoke(app, ["train", str(TINY), *SMALL, *overrides, f"run.folder={tmp_path / 'run'}"])
    assert result.exit_code == 0, result.exception
    first, second = (json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines())
    for record in (first, second):
        assert 0 < record["fraction_trained"] <= 1
        seconds = record["seconds"]
        assert record["sensing_share"] == pytest.approx(seconds["sensing"] / sum(seconds.values()), rel=1e-6)
    if "selector.rule=knee_causal" in overrides:
        assert list(first["selector"]["reasons"]) == ["fallback:first"], "no rollout is known before the first"
        assert list(second["selector"]["reasons"]) != ["fallback:first"]
    if "selector.min_fraction=0.3" in overrides:
        assert 2 / 6 <= first["fraction_trained"] <= 3 / 6, "of 6 steps, rounded"
    if "sensing.every=2" in overrides:
        assert "curves" in first["selector"]
        assert "curves" not in second["selector"]
    if "selector.mask_source=previous" in overrides:
        assert first["selector"]["intervals"] != second["selector"]["intervals"] or "curves" in first["selector"]
    if "evaluation.clip=scenes-clip" in overrides:
        evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
        assert all(-1 <= evaluation[when]["clip_score"] <= 1 for when in ("before", "after"))
        assert "clip score" in (tmp_path / "run" / "report.html").read_text()
    assert "sensing, % of the time" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    "kind",
    [
        ["sensing.kind=semantic", "sensing.decoder=linear", "selector.rule=knee_causal", "sensing.stride=1"],
        ["sensing.kind=reward_only", "sensing.decoder=linear", "selector.mask_source=previous"],
    ],
    ids=["semantic", "reward_only"],
)
@pytest.mark.parametrize("call", [5, 12], ids=["early", "late"])
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, kind: list[str], call: int):
    """Decisions, the linear decoder and the weights are those of the run left alone; tests/test_train.py has latent.

    The reward is called once for the evaluation, then once for each rollout and once for each state that is sensed, 7
    or 4 here: call 5 comes while the first rollout is sensed, 12 in the second iteration, or the third.
    """
    overrides = [*kind, "train.learning_rate=0.01", "train.iterations=3"]
    prompts = {"train_prompts": ["a large red circle on a grey background"], "held_out_prompts": ["a"], "quiet": True}
    number = 0

    def dying(images: Tensor, prompts: list[str]) -> Tensor:
        nonlocal number
        number += 1
        if number == call:
            raise KeyboardInterrupt
        return _red(images, prompts)

    dying.__qualname__ = _red.__qualname__  # what files call it
    Trainer(_config(tmp_path / "alone", *overrides), reward=_red, **prompts).train()  # type: ignore[arg-type]
    config = _config(tmp_path / "killed", *overrides)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, reward=dying, **prompts).train()  # type: ignore[arg-type]
    Trainer(config, reward=_red, **prompts).resume(accept_changes=True)  # type: ignore[arg-type]
    name = "checkpoints/000003/state.safetensors"
    got, want = load_file(tmp_path / "killed" / name), load_file(tmp_path / "alone" / name)
    assert got.keys() == want.keys()
    assert "sensor.weight" in want
    assert all(torch.equal(got[key], want[key]) for key in want)
    states = [json.loads((tmp_path / run / "checkpoints/000003/state.json").read_text()) for run in ("killed", "alone")]
    own = {"config": "", "log": ""}
    assert states[0] | own == states[1] | own, "the folder is another, and so are the seconds"
    decisions = [
        [json.loads(line)["selector"] for line in (tmp_path / run / "stats.jsonl").read_text().splitlines()]
        for run in ("killed", "alone")
    ]
    assert decisions[0] == decisions[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sensing.kind=semantic", "sensing.decoder=tiny"], r'sensing.decoder = "tiny" needs sensing.tiny, got none'),
        (["sensing.kind=semantic", "sensing.tiny=folder"], r'is the decoder of sensing.decoder = "tiny", got "vae"'),
        (["sensing.decoder=tiny"], r'sensing.decoder belongs to sensing.kind = "semantic" or "reward_only", got'),
        (["selector.name=every_step", "sensing.kind=latent"], r"\[sensing\] is what AdaScope sees of a rollout, got"),
        (["selector.rule=knee_causal"], "knee_causal decides while sampling, so it needs sensing.kind semantic"),
        (["selector.rule=schedule", "selector.min_fraction=0.3"], "selector.min_fraction has a meaning with"),
        (["selector.rule=knee_causal", "sensing.kind=semantic", "sensing.stride=2"], "got semantic and 2"),
        (
            ["selector.pooling=sample", "sensing.kind=semantic", "sensing.num_samples=1"],
            r"num_samples must be 0 \(all\), got 1",
        ),
        (["selector.min_fraction=0.9", "selector.max_fraction=0.8"], "min_fraction must not exceed"),
        (["selector.fallback=[0.5, 0.5]"], r"start below end, got \[0.5, 0.5\]"),
        (["selector.rule=knees"], "selector.rule"),
        (["sensing.kind=semantic", "sensing.stride=0"], "sensing.stride must be at least 1, got 0"),
        (["sensing.kind=clip"], "sensing.kind"),
    ],
)
def test_settings_that_cannot_be_sensed_are_refused(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        Config.load(TINY, overrides)
