"""Rewards: the scene judge is right about drawn pictures, blind to nothing; JPEG sizes are PIL's; errors are clear."""

import io
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from adascope_fast import rewards
from adascope_fast.config import Config
from adascope_fast.pretraining.drawing import draw
from adascope_fast.prompts.scenes import BACKGROUNDS, Scene, every_scene
from adascope_fast.rewards import settings
from adascope_fast.rewards.scene_attributes import ATTRIBUTES, SceneAttributes

JUDGE = SceneAttributes()
SINGLE = Scene(1, "large", "red", "circle", "grey", "left")
# The same scene with one attribute changed. (A second object may stand anywhere, so the place is left open there.)
VIOLATIONS = {
    "size": replace(SINGLE, size="small"),
    "colour": replace(SINGLE, colour="orange"),
    "shape": replace(SINGLE, shape="cross"),
    "background": replace(SINGLE, background="black"),
    "position": replace(SINGLE, position="top"),
}


def _judge(pictures: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(scores [b], satisfied [b, 6]) in parts, since the analysis of 1,536 pictures at once takes a gigabyte."""
    scores, satisfied = [], []
    for start in range(0, len(captions), 256):
        part = slice(start, start + 256)
        scores.append(JUDGE(pictures[part], captions[part]))
        satisfied.append(JUDGE.attributes(pictures[part], captions[part])[0])
    return torch.cat(scores), torch.cat(satisfied)


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, list[str]]:
    """One picture of every scene there is, and its caption."""
    scenes = every_scene()
    pictures = [draw(scenes[start : start + 128], seed=start) for start in range(0, len(scenes), 128)]
    return torch.cat(pictures), [scene.caption for scene in scenes]


def test_drawn_pictures_satisfy_their_captions(drawn: tuple[Tensor, list[str]]):
    pictures, captions = drawn
    scores, satisfied = _judge(pictures, captions)
    assert scores.shape == (1536,)
    assert scores.mean() >= 0.98
    single = torch.tensor(["at the" in caption or "in the" in caption for caption in captions])
    for index, name in enumerate(ATTRIBUTES):
        share = satisfied[single if name == "position" else slice(None), index].float().mean()
        assert share >= 0.97, f"{name} is recognised in {share:.1%}"


def test_shuffled_captions_score_near_chance(drawn: tuple[Tensor, list[str]]):
    pictures, captions = drawn
    shuffled = random.Random(0).sample(captions, len(captions))
    scores, satisfied = _judge(pictures, shuffled)
    assert scores.mean() < 0.40
    colour = satisfied[:, ATTRIBUTES.index("colour")].float().mean().item()
    assert colour == pytest.approx(1 / 6, abs=0.04)  # 1 in 6 colours agrees by chance; standard error 0.01
    background = satisfied[:, ATTRIBUTES.index("background")].float().mean().item()
    assert background == pytest.approx(1 / 4, abs=0.04)


@pytest.mark.parametrize("attribute", VIOLATIONS)
def test_each_attribute_notices_its_own_violation_and_no_other(attribute: str):
    pictures = draw([VIOLATIONS[attribute]] * 10, seed=7)
    satisfied, named = JUDGE.attributes(pictures, [SINGLE.caption] * 10)
    assert named.all()
    wrong = ATTRIBUTES.index(attribute)
    assert not satisfied[:, wrong].any()
    others = [index for index in range(6) if index != wrong]
    assert satisfied[:, others].all()
    torch.testing.assert_close(JUDGE(pictures, [SINGLE.caption] * 10), torch.full((10,), 5 / 6))


@pytest.mark.parametrize(("asked", "shown"), [(1, 2), (2, 1), (2, 3), (3, 2), (3, 1)])
def test_the_count_is_noticed_alone(asked: int, shown: int):
    scene = Scene(asked, "small", "yellow", "triangle", "black")
    pictures = draw([replace(scene, count=shown)] * 10, seed=3)
    satisfied, named = JUDGE.attributes(pictures, [scene.caption] * 10)
    assert satisfied.tolist() == [[False, True, True, True, True, satisfied[i, 5].item()] for i in range(10)]
    assert not named[:, ATTRIBUTES.index("position")].any(), "no position was asked for"
    torch.testing.assert_close(JUDGE(pictures, [scene.caption] * 10), torch.full((10,), 4 / 5))


def test_one_wrong_object_among_several_is_noticed():
    red, blue = (
        Scene(1, "small", colour, "square", "white", side) for colour, side in (("red", "left"), ("blue", "right"))
    )
    both = torch.cat([draw([red], 0)[..., :32], draw([blue], 0)[..., 32:]], -1)
    satisfied, _ = JUDGE.attributes(both, ["two small red squares on a white background"])
    assert dict(zip(ATTRIBUTES, satisfied[0].tolist(), strict=True)) | {"position": None} == {
        "count": True, "size": True, "colour": False, "shape": True, "background": True, "position": None,
    }  # fmt: skip


def test_breakdown_leaves_out_what_no_caption_names():
    scene = Scene(2, "large", "green", "square", "beige")
    pictures = draw([scene, replace(scene, colour="purple")], seed=0)
    shares = JUDGE.breakdown(pictures, [scene.caption] * 2)
    assert shares == {"count": 1.0, "size": 1.0, "colour": 0.5, "shape": 1.0, "background": 1.0}


def test_a_blank_picture_satisfies_the_background_alone():
    grey = torch.tensor(BACKGROUNDS["grey"]).view(1, 3, 1, 1).expand(1, 3, 64, 64) / 255
    assert JUDGE(grey, ["two small red circles on a grey background"]).item() == pytest.approx(1 / 5)
    assert JUDGE(grey, ["two small red circles on a black background"]).item() == 0


def test_noise_has_no_colour_and_scores_no_more_than_chance():
    noise = torch.rand(40, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    captions = [scene.caption for scene in random.Random(2).sample(every_scene(), 40)]
    satisfied, _ = JUDGE.attributes(noise, captions)
    assert not satisfied[:, ATTRIBUTES.index("colour")].any()
    assert JUDGE(noise, captions).mean() < 0.40


@pytest.mark.parametrize("size", [(128, 128), (256, 256)])
def test_other_resolutions_are_judged_alike(size: tuple[int, int]):
    scenes = random.Random(1).sample(every_scene(), 40)
    pictures, captions = draw(scenes, seed=0), [scene.caption for scene in scenes]
    enlarged = torch.nn.functional.interpolate(pictures, size, mode="nearest")
    assert torch.equal(JUDGE(enlarged, captions), JUDGE(pictures, captions))


@pytest.mark.parametrize("shape", [(2, 1, 64, 64), (3, 64, 64), (2, 64, 64, 3)])
def test_pictures_of_another_shape_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"pictures have shape \[b, 3, h, w\], got \["):
        JUDGE(torch.zeros(shape), [SINGLE.caption] * 2)


def test_a_prompt_that_is_no_scene_is_refused():
    with pytest.raises(ValueError, match=r"scene captions read .* got 'a cat'"):
        JUDGE(torch.zeros(1, 3, 64, 64), ["a cat"])


def test_jpeg_rewards_are_the_size_of_pils_file():
    rng = np.random.default_rng(0)
    pixels = [
        rng.integers(0, 256, (37, 50, 3), dtype=np.uint8),
        np.full((37, 50, 3), 200, np.uint8),
        np.broadcast_to(np.arange(50, dtype=np.uint8)[None, :, None] * 5, (37, 50, 3)).copy(),
    ]
    sizes = []
    for picture in pixels:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    images = torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(rewards.load(settings.JpegIncompressibility())(images, [""] * 3), torch.tensor(sizes))
    torch.testing.assert_close(rewards.load(settings.JpegCompressibility())(images, [""] * 3), -torch.tensor(sizes))
    assert sizes[0] > sizes[2] > sizes[1], "noise is large, a single colour small"


def _named(name: str) -> rewards.Reward:
    """The reward of a configuration that names it."""
    return rewards.load(Config.load(None, [f"reward.name={name}"]).reward)


def test_rewards_are_found_by_name_and_by_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_reward_by_module.py").write_text(
        "def constant(images, prompts):\n    return [0.5] * len(prompts)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = _named("my_reward_by_module:constant")
    assert rewards.score(reward, torch.zeros(3, 3, 4, 4), ["a"] * 3).tolist() == [0.5] * 3
    assert isinstance(_named("scene_attributes"), SceneAttributes)


def test_a_reward_module_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_reward_in_the_folder.py").write_text("def zero(images, prompts):\n    return images[:, 0, 0, 0]\n")
    monkeypatch.syspath_prepend(".")  # restores sys.path afterwards
    monkeypatch.chdir(tmp_path)
    assert _named("my_reward_in_the_folder:zero").__name__ == "zero"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "scene_atributes",
            r'reward.name must be one of scene_attributes, jpeg_compressibility, .* got "scene_atributes"',
        ),
        (
            "no_such_module:reward",
            'reward.name = "no_such_module:reward" could not be imported: there is no module no_such_module; run',
        ),
        (
            "math:no_such_function",
            'reward.name = "math:no_such_function" could not be imported: .* has no no_such_function; check',
        ),
        (":reward", r'reward.name must be module:object, got ":reward"'),
        ("math:pi", "reward 'math:pi' must be a function of .*, got float"),
    ],
)
def test_a_reward_that_cannot_be_found_is_refused(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        _named(name)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            torch.zeros(4, 1),
            r"must return one number an image, shape \[4\], got shape \[4, 1\]; reduce over everything",
        ),
        (torch.zeros(3), r"must return .* shape \[4\], got shape \[3\]"),
        (torch.tensor(1.0), r"must return .* shape \[4\], got shape \[\]"),
        (torch.tensor([0, 0, math.nan, 0]), r"must be finite, got nan for 'c'; return a low score"),
        ([0, math.inf, 0, 0], r"must be finite, got inf for 'b'"),
        (None, r"must return a tensor or numbers, got NoneType"),
        (["x"] * 4, r"must return a tensor or numbers, got list"),
    ],
)
def test_bad_scores_are_refused_by_the_rewards_name(returned: object, message: str):
    def my_reward(images: Tensor, prompts: list[str]) -> object:
        return returned

    with pytest.raises(ValueError, match=f"reward 'my_reward' {message}"):
        rewards.score(my_reward, torch.zeros(4, 3, 2, 2), list("abcd"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "returned", [[1, 2, 3], np.array([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)]
)
def test_scores_may_be_numbers_or_arrays_and_become_float32(returned: object):
    scores = rewards.score(lambda images, prompts: returned, torch.zeros(3, 3, 2, 2), ["a"] * 3)  # type: ignore[arg-type,return-value]
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1, 2, 3]
