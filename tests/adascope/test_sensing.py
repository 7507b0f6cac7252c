"""Sensors on made-up trajectories: what they judge, what they leave out, what lies between strides."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adascope_fast.adascope.interval_rule import select_interval
from adascope_fast.adascope.sensing import DecodedSensor, interpolated, latent_curves, splined
from adascope_fast.config import Config, ConfigError
from adascope_fast.rollout import Trajectory
from adascope_fast.schedules import samplers as schedules
from adascope_fast.training.building import sensor_of
from adascope_fast.training.trainer import Trainer

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"


def _trajectory(b: int = 4, t: int = 8, prompts: list[str] | None = None, seed: int = 0) -> Trajectory:
    generator = torch.Generator().manual_seed(seed)
    latents, x0 = (torch.rand(b, n, 3, 4, 4, generator=generator) for n in (t + 1, t))
    schedule = schedules.dance_sde(torch.linspace(1, 0, t + 1), eta=0.3)
    return Trajectory(latents, x0, torch.zeros(b, t), schedule, prompts or ["a"] * b, torch.zeros(b, dtype=torch.int64))


def _red(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean((1, 2))


def _blue(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 2].mean((1, 2)) * torch.tensor([len(prompt) for prompt in prompts])


def _states(trajectory: Trajectory) -> Tensor:
    return torch.cat([trajectory.x0, trajectory.latents[:, -1:]], 1)


def test_every_state_of_every_sample_is_judged_with_its_own_prompt():
    trajectory = _trajectory(prompts=["a", "bb", "a", "ccc"])
    curves = DecodedSensor(lambda x: x, _red, _blue, batch=3)(trajectory)
    states = _states(trajectory)
    torch.testing.assert_close(curves.preference, states[:, :, 0].mean((2, 3)))
    length = torch.tensor([1.0, 2.0, 1.0, 3.0])[:, None]
    torch.testing.assert_close(curves.structure, states[:, :, 2].mean((2, 3)) * length)
    assert curves.volatility is None
    only = DecodedSensor(lambda x: x, _red)(trajectory)
    torch.testing.assert_close(only.preference, curves.preference)
    assert only.volatility is not None
    assert torch.equal(only.volatility, latent_curves(trajectory)[0])


def test_stride_and_subset_decode_less_and_leave_the_rest_unsensed():
    trajectory, decoded = _trajectory(b=5, t=8, prompts=["a", "b", "a", "a", "b"]), []

    def decode(latents: Tensor) -> Tensor:
        decoded.append(len(latents))
        return latents

    curves = DecodedSensor(decode, _red, _blue, stride=3, num_samples=1)(trajectory)
    assert decoded == [2] * 4, "states 0, 3, 6 and 8 of one sample of each prompt"
    whole = DecodedSensor(lambda x: x, _red, _blue)(trajectory)
    for states in ([0, 3, 6, 8],):
        torch.testing.assert_close(curves.preference[:2, states], whole.preference[:2, states])
        assert curves.structure is not None
        assert whole.structure is not None
        torch.testing.assert_close(curves.structure[:2, states], whole.structure[:2, states])
    assert curves.preference[:2].isfinite().all()
    assert curves.preference[2:].isnan().all()
    for settings in ({"stride": 0}, {"num_samples": -1}, {"batch": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            DecodedSensor(decode, _red, **settings)  # type: ignore[arg-type]


def test_a_latent_that_is_not_finite_is_never_shown_and_spoils_its_own_sample_alone():
    trajectory = _trajectory(b=3)
    trajectory.x0[1, 4, 0, 0, 0] = torch.nan

    def judge(images: Tensor, prompts: list[str]) -> Tensor:
        assert images.isfinite().all()
        return _red(images, prompts)

    clean = DecodedSensor(lambda x: x, judge, judge)(_trajectory(b=3))
    curves = DecodedSensor(lambda x: x, judge, judge)(trajectory)
    assert curves.preference[1].isnan().tolist() == [i == 4 for i in range(9)]
    assert torch.equal(curves.preference[[0, 2]], clean.preference[[0, 2]])
    strided = DecodedSensor(lambda x: x, judge, judge, stride=4)(trajectory)
    assert strided.preference[1].isnan().all()
    assert strided.preference[[0, 2]].isfinite().all()


def test_a_guess_that_the_reward_cannot_judge_is_left_out_and_a_wrong_shape_is_refused():
    config = Config.load(TINY, ["sensing.kind=reward_only", "sensing.stride=1", "sensing.num_samples=0"])
    backbone: Any = _Decodes()

    def picky(images: Tensor, prompts: list[str]) -> Tensor:
        return torch.where(images.mean((1, 2, 3)) > 0.5, torch.nan, 1.0)

    curves = sensor_of(config, backbone, picky)(_trajectory())
    assert 0 < int(curves.preference.isnan().sum()) < curves.preference.numel()
    with pytest.raises(ValueError, match="one number an image"):
        sensor_of(config, backbone, lambda images, prompts: images.mean((2, 3)))(_trajectory())


class _Decodes:
    name = "somebody/some-model"

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def test_values_between_strides():
    """Straight lines are found again by both; a cubic by the spline alone. States that were judged stay exactly."""
    states, i = [0, 4, 8, 12, 15], torch.arange(16.0)
    line, cubic = 2 - 0.25 * i, (i / 10) ** 3 - (i / 5) ** 2
    for fill in (interpolated, splined):
        got = fill(torch.stack([line, cubic])[:, states], states)
        torch.testing.assert_close(got[0], line)
        assert torch.equal(got[1, states], cubic[states])
        bad = torch.stack([line, cubic])[:, states]
        bad[0, 2] = torch.inf
        assert fill(bad, states)[0].isnan().all()
        assert torch.equal(fill(bad, states)[1], got[1])
        assert torch.equal(fill(line[None], list(range(16))), line[None])
    torch.testing.assert_close(splined(cubic[None, states], states)[0], cubic)
    want = np.interp(i.numpy(), states, cubic[states].numpy())
    np.testing.assert_allclose(interpolated(cubic[None, states], states)[0], want, atol=1e-6)
    assert interpolated(torch.tensor([[1.0, 3.0]]), [0, 2]).tolist() == [[1.0, 2.0, 3.0]]
    assert splined(torch.tensor([[1.0, 3.0]]), [0, 2]).tolist() == [[1.0, 2.0, 3.0]]


def test_the_knee_is_found_near_the_same_step_with_a_stride():
    """Structure settles like exp(-i / tau). With straight lines between strides, tau = 10 would start at 5, not 14."""
    i = torch.arange(51.0)
    gain = (1 - torch.exp(-i / 12)).expand(1, -1)
    for tau in (2.0, 4.0, 6.0, 8.0, 10.0):
        structure = torch.exp(-i / tau).expand(1, -1).contiguous()
        want = select_interval(structure, gain)
        for stride in (2, 3, 4, 5):
            states = [*range(0, 50, stride), 50]
            start, end, reason = select_interval(
                splined(structure[:, states], states), interpolated(gain[:, states], states)
            )
            assert abs(start - want.start) <= stride // 2 + 1, (tau, stride)
            assert abs(end - want.end) <= 2, (tau, stride)
            assert reason == want.reason


def test_semantic_sensing_of_another_model_needs_a_clip_that_knows_its_pictures():
    config = Config.load(
        TINY, ["sensing.kind=semantic", "model.name=somebody/some-model", "prompts.train=scenes:train"]
    )
    backbone: Any = _Decodes()
    with pytest.raises(ConfigError, match="needs a CLIP that knows the images of 'somebody/some-model'"):
        Trainer(config, reward=_red)  # before the model is looked for
    with pytest.raises(ConfigError, match=r"needs a CLIP that knows the images of 'somebody/some-model', got none"):
        sensor_of(config, backbone, _red)
    named = Config.load(
        TINY,
        [
            "sensing.kind=semantic",
            "model.name=somebody/some-model",
            "prompts.train=scenes:train",
            "sensing.clip=nowhere",
        ],
    )
    with pytest.raises(ValueError, match="got 'nowhere'"):
        sensor_of(named, backbone, _red)
