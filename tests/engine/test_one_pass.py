"""The update without a replay is the update with it; each sample's gradient apart, against plain autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adascope_fast import backbones
from adascope_fast.adascope.selector import AdaScope
from adascope_fast.algorithms.policy_gradient import balanced, ddpo
from adascope_fast.engine.engine import Engine
from adascope_fast.engine.per_sample import PerSampleGradients, PerSampleLinear
from adascope_fast.engine.settings import Updates
from adascope_fast.rollout import EncodedPrompts
from adascope_fast.schedules.settings import Sampler
from adascope_fast.selectors.protocol import TimestepSelector
from adascope_fast.selectors.simple import EveryStep, RandomFraction, StaticRange

PROMPTS = ["a red one", "a red one", "the green", "see", "see"]
SCENES = ["a small red circle on a grey background", "two large blue crosses on a black background"]
T = 6


def _score(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3))


def _engine(
    backbone: Any,
    selector: TimestepSelector,
    update: str,
    *,
    guidance_scale: float = 1.0,
    step_weight: str = "none",
    **changes: Any,
) -> Engine:
    optimizer = torch.optim.SGD(backbone.trainable_parameters(), lr=1.0)
    algorithm = ddpo(clip_range=1e-4, step_weight=step_weight)
    settings: dict[str, Any] = {"rollout_batch": 3, "microbatch": 2, "max_grad_norm": 1e9, "update": update, **changes}
    schedule, sampler = backbone.schedule(T), Sampler(guidance_scale=guidance_scale)
    return Engine(backbone, schedule, algorithm, selector, _score, optimizer, Updates(**settings), sampler=sampler)


def _displacement(engine: Engine, prompts: list[str]) -> tuple[Tensor, dict[str, Any]]:
    before = [parameter.detach().clone() for parameter in engine.backbone.trainable_parameters()]
    values = engine.step(EncodedPrompts.of(engine.backbone, prompts), prompts, iteration=3, seed=7).values
    after = engine.backbone.trainable_parameters()
    return torch.cat([(a - b).flatten() for a, b in zip(before, after, strict=True)]), values


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize(
    "selector",
    [EveryStep(last_step="train"), StaticRange(start=1, end=4), RandomFraction(fraction=0.5, seed=3)],
    ids=["every", "range", "ragged"],
)
def test_the_gradient_is_that_of_the_replay(make_toy: Callable, selector: TimestepSelector, guidance_scale: float):
    same: dict[str, Any] = {"guidance_scale": guidance_scale, "step_weight": "balanced"}
    want, replayed = _displacement(_engine(make_toy(torch.float64), selector, "replay", **same), PROMPTS)
    got, values = _displacement(_engine(make_toy(torch.float64), selector, "one_pass", **same), PROMPTS)
    assert want.norm() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())
    for name in ("loss", "reward_mean", "fraction_trained", "pairs_trained", "grad_norm", "ratio_max_deviation"):
        assert values[name] == pytest.approx(replayed[name], rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("name", ["scenes", "scenes-flow"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_the_replay_on_an_embedded_model(name: str, checkpointing: bool):
    found = []
    for update in ("replay", "one_pass"):
        model = backbones.load(name, lora_rank=2, gradient_checkpointing=checkpointing)
        with torch.no_grad():
            for parameter in model.trainable_parameters():
                parameter.add_(0.02)
        found.append(_displacement(_engine(model, StaticRange(start=1, end=5), update, guidance_scale=2.0), SCENES)[0])
    want, got = found
    torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-4 * want.abs().max().item())


def test_the_denoiser_runs_once_a_step_and_no_more(make_toy: Callable):
    toy = make_toy()
    _displacement(_engine(toy, StaticRange(start=1, end=4), "one_pass"), PROMPTS)
    assert toy.num_rows == len(PROMPTS) * T


def test_the_batch_of_the_rollout_and_the_microbatch_do_not_matter(make_toy: Callable):
    selector, found = RandomFraction(fraction=0.5, seed=3), []
    for rollout_batch, microbatch in ((1, 1), (2, 2), (5, 3), (100, 100)):
        toy = make_toy(torch.float64)
        sizes: dict[str, Any] = {"rollout_batch": rollout_batch, "microbatch": microbatch}
        found.append(_displacement(_engine(toy, selector, "one_pass", **sizes), PROMPTS)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-7)


def test_adascope_needs_the_interval_of_earlier_rollouts(make_toy: Callable):
    with pytest.raises(ValueError, match="mask_source = 'previous'"):
        _displacement(_engine(make_toy(), AdaScope(), "one_pass"), PROMPTS)
    first = _displacement(_engine(make_toy(torch.float64), AdaScope(mask_source="previous"), "one_pass"), PROMPTS)
    second = _displacement(_engine(make_toy(torch.float64), AdaScope(mask_source="previous"), "replay"), PROMPTS)
    torch.testing.assert_close(first[0], second[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("changes", [{"updates_per_iteration": 2}, {}])
def test_several_updates_or_a_kl_are_refused(make_toy: Callable, changes: dict[str, Any]):
    toy = make_toy()
    engine = _engine(toy, EveryStep(), "replay")
    algorithm = ddpo(kl_weight=0.0 if changes else 0.1)
    settings = Updates(rollout_batch=3, update="one_pass", **changes)
    with pytest.raises(ValueError, match="one update an iteration, without KL"):
        Engine(toy, engine.schedule, algorithm, EveryStep(), _score, engine.optimizer, settings)


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("tokens", [(), (5,), (2, 3)])
def test_each_sample_has_its_own_gradient(copies: int, tokens: tuple[int, ...]):
    torch.manual_seed(0)
    model, samples = _Mlp().double(), 3
    x = torch.randn(copies, samples, *tokens, 4, dtype=torch.float64)
    parameters = list(model.parameters())
    each = []
    for sample in range(samples):
        value = model(x[:, sample]).square().sum()
        each.append(torch.autograd.grad(value, parameters))
    gradients = PerSampleGradients(model, parameters, 5)
    assert isinstance(model.first, PerSampleLinear)
    for rows in (slice(0, 3), torch.tensor([4, 1, 0])):
        with gradients.leaves(samples) as leaves:
            value = model(x.flatten(0, 1)).square().sum()
            gradients.add(rows, torch.autograd.grad(value, leaves))
    weight = torch.tensor([0.5, -2.0, 3.0, 7.0, 1.5], dtype=torch.float64)
    # Row 0 got samples 0 and 2, row 1 got 1 twice, row 2 got 2, row 4 got 0.
    total = [0.5 * (a + c) - 2 * 2 * b + 3 * c + 1.5 * a for a, b, c in zip(*each, strict=True)]
    for got, want in zip(gradients.weighted(weight), total, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    plain = torch.autograd.grad(model(x.flatten(0, 1)).square().sum(), parameters)
    summed = [a + b + c for a, b, c in zip(*each, strict=True)]
    for got, want in zip(plain, summed, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)  # outside, it is an ordinary layer again


def test_layers_that_mix_samples_or_are_not_linear_are_refused():
    model = _Mlp()
    gradients = PerSampleGradients(model, list(model.parameters()), 3)
    with gradients.leaves(3) as leaves, pytest.raises(ValueError, match="4 rows for 3 samples"):
        torch.autograd.grad(model(torch.randn(4, 4)).sum(), leaves)
    convolution = nn.Sequential(nn.Conv2d(2, 2, 1))
    with pytest.raises(ValueError, match=r"0\.weight of a Conv2d; use train\.update = 'replay'"):
        PerSampleGradients(convolution, list(convolution.parameters()), 3)
    with pytest.raises(ValueError, match="1 trainable parameters are not in the denoiser"):
        PerSampleGradients(model, [nn.Parameter(torch.ones(2))], 3)


def test_balanced_weights_are_finite_where_a_step_has_no_noise(make_toy: Callable):
    schedule = make_toy().schedule(T)
    assert balanced(schedule).isfinite().all()
