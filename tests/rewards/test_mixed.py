"""Several rewards: their sum, their advantages mixed, what is logged of each, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from command_line import TINY, call, refused
from small_runs import CAPTIONS, SMALLEST, lines_of
from torch import Tensor

from adascope_fast import rewards
from adascope_fast.algorithms.advantages import GroupRelative, added, decoupled, standardized
from adascope_fast.algorithms.algorithm import Samples
from adascope_fast.algorithms.policy_gradient import grpo, mix_grpo
from adascope_fast.config import Config, ConfigError
from adascope_fast.engine.scoring import Scoring
from adascope_fast.training.trainer import Trainer

PARTS = "reward.parts={jpeg_compressibility=1.0, clip_similarity=0.5}"
KEYED = 'reward.parts={jpeg_compressibility=1.0, clip_similarity={weight=0.5, clip="scenes-clip", batch=4}}'
MIXED = ["reward.name=mixed", PARTS, "algorithm.name=grpo"]
PROMPTS = ["a", "a", "a", "b", "b", "b"]
ONE, TWO = torch.tensor([1.0, 2, 3, 10, 10, 13]), torch.tensor([5.0, 5, 5, 0, 1, 0])


def _red(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean((1, 2))


def _green(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 1].mean((1, 2))


def test_the_value_is_the_weighted_sum_of_the_parts():
    mixed = rewards.Mixed({"red": _red, "green": _green}, {"red": 2.0, "green": -0.5})
    images = torch.rand(5, 3, 4, 4)
    want = 2 * _red(images, []) - 0.5 * _green(images, [])
    torch.testing.assert_close(rewards.score(mixed, images, ["x"] * 5), want)
    value, parts = rewards.Scorer(mixed).with_parts(images, ["x"] * 5)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(parts["green"], _green(images, []))
    told = mixed.breakdown(images, ["x"] * 5)
    assert told == pytest.approx({"red": _red(images, []).mean().item(), "green": _green(images, []).mean().item()})


def _group(values: Tensor, correction: int, epsilon: float) -> Tensor:
    parts = [(part - part.mean()) / (part.std(correction=correction) + epsilon) for part in values.double().split(3)]
    return torch.cat(parts)


def test_advantages_are_added_by_weight():
    """The group's sample std + 1e-8, as MixGRPO; a group whose rewards are alike in every part has 0 exactly."""
    got = added(GroupRelative("group_sample"), {"one": ONE, "two": TWO}, {"two": 0.25}, PROMPTS, 2)
    want = _group(ONE, 1, 1e-8) + 0.25 * _group(TWO, 1, 1e-8)
    torch.testing.assert_close(got[:, 1].double(), want, rtol=1e-6, atol=1e-7)
    alike = added(GroupRelative(), {"one": torch.ones(6), "two": torch.zeros(6)}, {}, PROMPTS, 1)
    assert (alike == 0).all()


def test_gdpo_divides_the_sum_by_its_std_over_the_batch():
    got = decoupled(GroupRelative("group"), {"one": ONE, "two": TWO}, {"one": 3.0}, PROMPTS, 1)[:, 0]
    total = 3 * _group(ONE, 0, 1e-4) + _group(TWO, 0, 1e-4)
    want = (total - total.mean()) / (total.std() + 1e-4)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)


def test_the_whole_is_clipped_and_not_each_part():
    clipped = GroupRelative("group", advantage_clip=1.0)
    got = added(clipped, {"one": ONE, "two": -ONE}, {"one": 1.5}, PROMPTS, 1)[:, 0]
    torch.testing.assert_close(got.double(), (0.5 * _group(ONE, 0, 1e-4)).clamp(-1, 1), rtol=1e-6, atol=1e-7)


def test_normalized_rewards_are_standardised_over_all_images_before_they_are_added():
    """By hand: one 1 2 3 10 10 13 has mean 6.5 and variance 21.58333, two 5 5 5 0 1 0 has 16/6 and 5.55556."""
    one = (ONE.double() - 6.5) / 21.58333333333333**0.5
    two = (TWO.double() - 16 / 6) / 5.555555555555555**0.5
    got = standardized(GroupRelative("group"), {"one": ONE, "two": TWO}, {"two": -0.25}, PROMPTS, 2)
    assert (got.shape, got.dtype) == ((6, 2), torch.float32)
    torch.testing.assert_close(got[:, 1].double(), _group(one - 0.25 * two, 0, 1e-4), rtol=1e-6, atol=1e-6)
    scaled = standardized(GroupRelative("group"), {"one": 100 * ONE + 7, "two": TWO}, {"two": -0.25}, PROMPTS, 2)
    torch.testing.assert_close(scaled, got)
    alone = standardized(GroupRelative("group"), {"one": ONE, "two": torch.full((6,), 0.1)}, {}, PROMPTS, 1)
    torch.testing.assert_close(alone[:, 0].double(), _group(one, 0, 1e-4), rtol=1e-6, atol=1e-6)
    alike = standardized(GroupRelative(), {"one": torch.ones(6), "two": torch.full((6,), 0.1)}, {}, PROMPTS, 1)
    assert (alike == 0).all()
    clipped = standardized(GroupRelative("group", advantage_clip=0.5), {"one": ONE, "two": TWO}, {}, PROMPTS, 1)
    assert clipped.abs().max() == 0.5


@pytest.mark.parametrize("mixing", ["rewards", "advantages", "gdpo", "normalized"])
def test_an_algorithm_mixes_as_it_is_told(mixing: Any):
    algorithm = grpo(mixing=mixing, advantage_scale="group")
    trajectory: Any = type("Trajectory", (), {"num_steps": 2, "prompts": PROMPTS})()
    samples = Samples(trajectory, ONE + 0.5 * TWO, parts={"one": ONE, "two": TWO}, weights={"two": 0.5})
    context: Any = None
    by_hand = {
        "rewards": lambda: _group(ONE + 0.5 * TWO, 0, 1e-4),
        "advantages": lambda: _group(ONE, 0, 1e-4) + 0.5 * _group(TWO, 0, 1e-4),
    }

    def whole(part: Tensor) -> Tensor:
        return (part.double() - part.double().mean()) / part.double().std(correction=0)

    by_hand["normalized"] = lambda: _group(whole(ONE) + 0.5 * whole(TWO), 0, 1e-4)
    by_hand["gdpo"] = lambda: by_hand["advantages"]() / (by_hand["advantages"]().std() + 1e-4)
    got = algorithm.advantages(samples, context)
    torch.testing.assert_close(got[:, 0].double(), by_hand[mixing](), rtol=1e-6, atol=1e-6)
    single = Samples(trajectory, ONE)
    if mixing in ("gdpo", "normalized"):
        with pytest.raises(ValueError, match="is of several rewards"):
            algorithm.advantages(single, context)
    else:
        torch.testing.assert_close(algorithm.advantages(single, context)[:, 0].double(), _group(ONE, 0, 1e-4))


@pytest.mark.parametrize("overlap", [False, True])
def test_images_that_are_not_finite_leave_with_their_parts(make_toy: Callable, overlap: bool):
    toy, prompts = make_toy(), [str(number) for number in range(7)]
    latents = torch.randn(7, *toy.latent_shape)
    latents[[1, 4, 5, 6]] = torch.nan  # one of the first batch, one of the second, all of the third
    mixed = rewards.Scorer(rewards.Mixed({"red": _red, "green": _green}, {"red": 1.0, "green": 2.0}))
    with Scoring(toy, mixed, prompts, overlap=overlap) as scoring:
        for rows in (slice(0, 3), slice(3, 5), slice(5, 7)):
            scoring.submit(rows, latents[rows])
        values = scoring.rewards()
    whole = torch.tensor([0, 2, 3])
    red = _red(toy.decode(latents[whole]), [])
    for got, want in ((values, 3 * red), (scoring.parts["red"], red), (scoring.parts["green"], red)):
        torch.testing.assert_close(got[whole], want)
        assert got.isnan().tolist() == [False, True, False, False, True, True, True]


def test_a_run_logs_a_curve_for_each_reward_and_repeats_after_a_stop(tmp_path: Path):
    records = []
    for name, first in (("straight", 3), ("stopped", 1)):
        run = tmp_path / name
        settings = [*SMALLEST, *MIXED, "algorithm.mixing=advantages", f"train.iterations={first}", "train.device=cpu"]
        assert call("train", TINY, *settings, f"run.folder={run}").code == 0
        if first == 1:
            assert call("train", "--resume", run, "train.iterations=3").code == 0
        records.append(lines_of(run))
    for one, other in zip(*records, strict=True):
        parts = one["reward_parts"]
        assert parts == other["reward_parts"]
        assert (one["reward_mean"], one["grad_norm"]) == (other["reward_mean"], other["grad_norm"])
        total = parts["jpeg_compressibility"] + 0.5 * parts["clip_similarity"]
        assert one["reward_mean"] == pytest.approx(total, rel=1e-5)
    after = json.loads((tmp_path / "straight" / "evaluation.json").read_text())["after"]
    assert after["attributes"].keys() == {"jpeg_compressibility", "clip_similarity"}
    kept = json.loads((tmp_path / "straight" / "parts.json").read_text())["parts"]["reward"]
    assert kept["digest"], "the weights of its CLIP are compared on resume"


class Own:
    weights: ClassVar[dict[str, float]] = {"red": 3.0}

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        raise AssertionError("its parts say it all")

    def parts(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        return {"red": _red(images, prompts), "green": _green(images, prompts)}


def test_a_reward_passed_in_python_may_have_parts(tmp_path: Path):
    overrides = [*SMALLEST, "algorithm.name=mix_grpo", "train.iterations=1", f"run.folder={tmp_path / 'run'}"]
    config = Config.load(TINY, overrides)
    result = Trainer(
        config, reward=Own(), train_prompts=CAPTIONS[:1], held_out_prompts=CAPTIONS[1:], quiet=True
    ).train()
    (record,) = lines_of(result.folder)
    parts = record["reward_parts"]
    assert record["reward_mean"] == pytest.approx(3 * parts["red"] + parts["green"], rel=1e-5)
    assert mix_grpo().mixing == "advantages"


def test_a_part_that_is_another_is_told_on_resume(tmp_path: Path):
    from adascope_fast.training import origin

    made = {"red": _red, "green": _green}
    one, other = ({"reward": origin.of_object(rewards.Mixed(made, weights), is_given=False)}
                  for weights in ({"red": 1.0, "green": 1.0}, {"red": 1.0, "green": 2.0}))  # fmt: skip
    assert origin.differences(one, one) == []
    assert origin.differences(one, other) != []
    another = {"reward": origin.of_object(rewards.Mixed(made | {"green": _red}, {"red": 1.0, "green": 1.0}),
                                          is_given=False)}  # fmt: skip
    assert origin.differences(one, another) != []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.name=mixed"], "mixed needs reward.parts, got none"),
        (["reward.name=mixed", "reward.parts={jpeg_compressibility=1.0}"], "two rewards or more, got 1"),
        (["reward.name=mixed", "reward.parts=[1]"], "must be a table of rewards and their weights, got [1]"),
        (["reward.name=mixed", 'reward.parts={jpeg_compressibility="a", b=1}'], 'and their weights, got "a"'),
        (["reward.name=mixed", "reward.parts={jpeg_compressibility=1.0, nope=2}"], "or module:object, got 'nope'"),
        (["reward.name=mixed", "reward.parts={jpeg_compressibility=1.0, clip_similarity=0}"], "must not be 0"),
        (
            ["reward.name=mixed", KEYED, "reward.parts.clip_similarity.weight=1e7"],
            "lie within -1e6 and 1e6, got 10000000",
        ),
        (["reward.name=mixed", KEYED, "reward.parts.clip_similarity={batch=3}"], "must have a weight, got {batch = 3}"),
        (
            ["reward.name=mixed", KEYED, "reward.parts.clip_similarity.bacth=4"],
            "unknown key reward.parts.clip_similarity.bacth = 4; the keys of clip_similarity besides weight: ",
        ),
        (
            ["reward.name=mixed", KEYED, "reward.parts.clip_similarity.batch=0"],
            "reward.parts.clip_similarity.batch is not valid, got 0: ",
        ),
        (
            ["reward.name=mixed", KEYED, "reward.parts.clip_similarity.device=tpu"],
            'reward.parts.clip_similarity.device must be auto, cpu, cuda or cuda:NUMBER, got "tpu"',
        ),
        (["reward.name=mixed", KEYED, "reward.parts.nope.weight=1"], "or module:object, got 'nope'"),
        (["reward.name=mixed", KEYED, "reward.parts.my:score=1"], "unknown key reward.parts.my:score = 1"),
        (["algorithm.name=grpo", "algorithm.mixing=gdpo"], "mixes several rewards, got one, scene_attributes"),
        (["algorithm.name=mix_grpo", "algorithm.mixing=gdpo"], "mixes several rewards, got one"),
        (["algorithm.name=ddpo", "algorithm.mixing=gdpo"], "algorithm.mixing belongs to"),
    ],
)
def test_what_cannot_be_mixed_is_refused(tmp_path: Path, overrides: list[str], message: str):
    assert message in refused("train", TINY, f"run.folder={tmp_path / 'run'}", *overrides)


def test_a_part_may_have_keys_of_its_own(tmp_path: Path):
    config = Config.load(TINY, ["reward.name=mixed", KEYED])
    section: Any = config.reward
    assert section.weights == {"jpeg_compressibility": 1.0, "clip_similarity": 0.5}
    mixed: Any = rewards.load(config.reward)
    assert mixed.weights == section.weights
    assert mixed.rewards["clip_similarity"].batch == 4
    path = tmp_path / "again.toml"
    path.write_text(config.to_toml())
    assert Config.load(path) == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "reward.parts.clip_similarity.batch=8",
            {"clip_similarity": {"weight": 0.5, "clip": "scenes-clip", "batch": 8}},
        ),
        ("reward.parts.clip_similarity=2", {"clip_similarity": {"weight": 2, "clip": "scenes-clip", "batch": 4}}),
        ("reward.parts.clip_similarity={weight=3}", {"clip_similarity": {"weight": 3}}),
        ("reward.parts.jpeg_compressibility=7", {"jpeg_compressibility": 7.0}),
        ("reward.parts.jpeg_compressibility.weight=7", {"jpeg_compressibility": {"weight": 7}}),
        ('reward.parts."mine:score"=0.5', {"mine:score": 0.5}),
        ('reward.parts."mine:score".text="a=b"', {"mine:score": {"weight": 0.1, "text": "a=b"}}),
    ],
)
def test_the_command_line_changes_one_part_and_leaves_the_others(tmp_path: Path, override: str, parts: dict[str, Any]):
    path = tmp_path / "file.toml"
    own = ['reward.parts."mine:score"=0.1'] if "text" in override else []
    path.write_text(Config.load(TINY, ["reward.name=mixed", KEYED, *own]).to_toml())
    sections: list[Any] = [Config.load(path, keys).reward for keys in ([], [override])]
    before, after = (section.parts for section in sections)
    assert after == before | parts


def test_a_part_of_ones_own_takes_keys_as_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine_with_keys.py").write_text(
        "def make(level):\n    def score(images, prompts):\n        return [level] * len(prompts)\n    return score\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parts = {"mine_with_keys:make": {"weight": 2.0, "level": 3.0}, "jpeg_compressibility": 1e-6}
    mixed = rewards.load(Config.of({"reward": {"name": "mixed", "parts": parts}}).reward)
    assert rewards.score(mixed, torch.zeros(2, 3, 8, 8), ["a", "b"]).tolist() == pytest.approx([6, 6], abs=1e-3)


def test_a_run_of_somebody_elses_whose_parts_import_code_needs_trust():
    from adascope_fast.training import trust

    config = Config.of({"reward": {"name": "mixed", "parts": {"evil:score": 1.0, "jpeg_compressibility": 1.0}}})
    assert trust.own_code(config) == ["reward.parts has evil:score"]
    with pytest.raises(ConfigError, match=r"would import reward\.parts has evil:score"):
        trust.refuse_foreign(Path("run"), config, "", is_trusted=False)


def test_configurations_with_parts_are_written_and_read_alike(tmp_path: Path):
    config = Config.load(TINY, MIXED)
    path = tmp_path / "again.toml"
    path.write_text(config.to_toml())
    assert Config.load(path) == config
    with pytest.raises(ConfigError, match=r"reward\.parts"):
        Config.load(path, ["reward.parts=3"])
