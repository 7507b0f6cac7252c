"""Algorithms are compositions: their parts are the ones named, and step weights do what they say."""

import pytest
import torch

from adascope_fast.algorithms.advantages import GroupRelative, PerPromptTracker
from adascope_fast.algorithms.policy_gradient import balanced, ddpo, grpo, grpo_guard
from adascope_fast.config import Config
from adascope_fast.schedules import Schedule, flow_sde
from adascope_fast.training.trainer import _needs_x0


def _schedule(coef: list[tuple[float, float, float]]) -> Schedule:
    rows = torch.tensor(coef)
    return Schedule(
        timesteps=torch.arange(len(coef)).float(),
        coef=rows,
        x0_coef=rows[:, :2],
        log_snr=torch.zeros(len(coef)),
        kind="ddim",
    )


def test_balanced_weights_by_hand() -> None:
    # std / |b| is 1, 0.25 and (deterministic) nothing; the trainable two are scaled to a mean of 1.
    weights = balanced(_schedule([(1.0, -0.5, 0.5), (1.0, 0.4, 0.1), (1.0, 0.3, 0.0)]))
    torch.testing.assert_close(weights, torch.tensor([1.6, 0.4, 0.0]))


def test_balanced_weights_make_every_step_equally_sensitive() -> None:
    schedule = flow_sde(torch.linspace(1, 0, 11).tolist(), noise_level=0.7)
    _, weight_output, std = schedule.coef.unbind(1)
    sensitivity = balanced(schedule) * weight_output.abs() / std
    torch.testing.assert_close(sensitivity, sensitivity[:1].expand_as(sensitivity))


def test_aliases_are_made_of_the_named_parts() -> None:
    algorithm = ddpo(clip_range=0.1, clip_range_high=0.3, advantage_clip=2.0, buffer_size=5, min_count=3)
    assert algorithm.advantage == PerPromptTracker(buffer_size=5, min_count=3, advantage_clip=2.0)
    assert grpo(advantage_scale="group", advantage_clip=2.0).advantage == GroupRelative(
        advantage_scale="group", advantage_clip=2.0
    )
    assert algorithm.step_weight is None
    assert grpo(step_weight="balanced").step_weight is balanced
    # PPO at ratio 2 with A = 1: clipped to 1.3; with A = -1 the larger loss, 2, stands.
    loss, ratio = algorithm.objective(torch.tensor([2.0, 2.0]).log(), torch.zeros(2), torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(loss, torch.tensor([-1.3, 2.0]))
    torch.testing.assert_close(ratio, torch.tensor([2.0, 2.0]))


def test_unknown_step_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="'none' or 'balanced'"):
        ddpo(step_weight="heavy")


def test_an_algorithm_that_looks_at_what_a_rollout_guessed_says_so() -> None:
    """By its own word, whatever the configuration calls it: whoever draws the rollout must tell the guesses."""
    config = Config.load(None, ["algorithm.name=grpo", "selector.name=every_step"])
    assert _needs_x0(config, grpo_guard()) == 'algorithm.name = "grpo_guard"'
    assert _needs_x0(config, grpo()) == ""
    similar = Config.load(None, ["algorithm.attribution=similarity", "selector.name=every_step"])
    assert _needs_x0(similar, ddpo()) == 'algorithm.attribution = "similarity"'
