"""Whether a mask that looks at the actions it masks biases the policy gradient: Monte Carlo on a Gaussian policy.

Axes: `b` trajectories, `t` steps. The policy is x_{i+1} = x_i + mu + noise: the score d log p / d mu of step i is its
noise. With a constant reward the expected gradient is 0, whatever baseline is subtracted: so it must stay for each
mask. Here the advantage is a constant B that is not 0, as a baseline of another prompt's rewards leaves it.
"""

import numpy as np
import pytest
import torch

from adascope_fast.adascope.selector import AdaScope
from adascope_fast.adascope.sensing import Curves
from adascope_fast.schedules import samplers as schedules
from adascope_fast.selectors.simple import StaticRange

T, SAMPLES, ITERATIONS = 12, 4, 1500
ADVANTAGE = 1.5
STATE = torch.arange(T + 1.0)


def _curves(noise: torch.Tensor) -> Curves:
    """Structure and preference whose pace follows the noise: what the policy does moves the interval.

    A trajectory whose early noise is high has formed its structure earlier and saturates later.
    """
    walk = torch.cat([torch.zeros(len(noise), 1), noise.cumsum(1)], 1)
    pace = torch.exp(-0.5 * noise[:, :4].mean(1, keepdim=True))
    structure = torch.exp(-STATE / (1.2 * pace)) + 0.05 * walk
    return Curves(1 - torch.exp(-STATE / (3 / pace)) + 0.05 * walk, structure=structure)


def _gradient_per_iteration(mask_source: str, pooling: str) -> np.ndarray:
    """Sum over kept pairs of B * score, over the number of pairs of a full run, in each of many iterations."""
    generator = torch.Generator().manual_seed(0)
    selector = AdaScope(mask_source=mask_source, pooling=pooling, rule="knee", memory_decay=0.5)  # type: ignore[arg-type]
    found = []
    for _ in range(ITERATIONS):
        noise = torch.randn(SAMPLES, T, generator=generator)
        keep = selector.decide(_curves(noise), ["a"] * SAMPLES)
        found.append((ADVANTAGE * noise * keep).sum().item() / (SAMPLES * T))
    return np.array(found)


def _standard_errors(gradients: np.ndarray) -> float:
    return float(gradients.mean() / (gradients.std(ddof=1) / len(gradients) ** 0.5))


@pytest.mark.parametrize("pooling", ["prompt", "sample"])
def test_the_previous_mask_leaves_the_expected_gradient_of_a_constant_reward_zero(pooling: str):
    assert abs(_standard_errors(_gradient_per_iteration("previous", pooling))) < 3


def test_the_current_mask_need_not():
    """Each trajectory decides for itself here, from the very noise that is masked: the bias is plain."""
    assert abs(_standard_errors(_gradient_per_iteration("current", "sample"))) > 6


def test_a_mask_that_is_fixed_is_the_control():
    generator = torch.Generator().manual_seed(0)
    schedule = schedules.dance_sde(torch.linspace(1, 0, T + 1), eta=0.3)
    keep = StaticRange(start=2, end=8).ahead(["a"] * SAMPLES, schedule, 0)
    noise = torch.randn(ITERATIONS, SAMPLES, T, generator=generator)
    assert abs(_standard_errors((ADVANTAGE * noise * keep).mean((1, 2)).numpy())) < 3


def test_the_mask_of_an_iteration_moves_with_its_noise_only_where_it_is_current():
    """The reason for the above: with the noise of an iteration replaced, the previous mask is the same."""
    for mask_source in ("previous", "current"):
        kept = []
        for seed in (1, 2):
            selector = AdaScope(mask_source=mask_source, pooling="sample")  # type: ignore[arg-type]
            selector.decide(
                _curves(torch.randn(SAMPLES, T, generator=torch.Generator().manual_seed(0))), ["a"] * SAMPLES
            )
            noise = torch.randn(SAMPLES, T, generator=torch.Generator().manual_seed(seed))
            kept.append(selector.decide(_curves(noise), ["a"] * SAMPLES))
        assert torch.equal(*kept) == (mask_source == "previous")
