"""A folded adapter predicts what it predicts unfolded, faster, and leaves the base weights as they were."""

from typing import Any

import pytest
import torch
from torch import Tensor

from adascope_fast import backbones
from adascope_fast.algorithms.policy_gradient import ddpo
from adascope_fast.backbones.folding import Folding
from adascope_fast.engine.engine import Engine
from adascope_fast.engine.settings import Updates
from adascope_fast.rollout import EncodedPrompts
from adascope_fast.schedules.settings import Sampler
from adascope_fast.selectors.simple import StaticRange

PROMPTS = ["a small red circle on a grey background", "two large blue crosses on a black background"]


def _trained(name: str, **options: Any) -> Any:
    model = backbones.load(name, lora_rank=2, **options)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.03)
    return model


@torch.no_grad()
def _predict(model: Any) -> Tensor:
    sample = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    return model.predict(sample, torch.full((2,), 500.0), model.encode(PROMPTS))


@pytest.mark.parametrize("name", ["scenes", "scenes-flow"])
def test_the_prediction_is_the_same_and_the_weights_come_back(name: str):
    model = _trained(name)
    before = {key: value.clone() for key, value in model.denoiser.state_dict().items()}
    with model.reference_policy():
        base = _predict(model)
    want, folding = _predict(model), Folding(model.denoiser)
    assert folding.num_layers > 8
    with folding:
        torch.testing.assert_close(_predict(model), want, rtol=1e-4, atol=1e-5)
        folding.off()
        assert torch.equal(_predict(model), want)
        folding.on()
        folded = _predict(model)
    assert not torch.equal(folded, want), "nothing was folded"
    assert (want - base).abs().max() > 1e-2, "the adapter does nothing"
    after = model.denoiser.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(_predict(model), want)


def test_a_trained_adapter_is_folded_anew():
    model = _trained("scenes")
    folding = Folding(model.denoiser)
    layer = next(layer for layer in model.denoiser.modules() if getattr(layer, "merged_adapters", None) == [])
    base = layer.get_base_layer().weight
    with folding:
        old, place = _predict(model), base.data_ptr()
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.03)
    with folding:
        new = _predict(model)
        assert base.data_ptr() == place, "graphs read the folded weights where they were"
    assert base.data_ptr() != place
    assert (new - old).abs().max() > 1e-2
    torch.testing.assert_close(new, _predict(model), rtol=1e-4, atol=1e-5)


def test_half_precision_weights_are_left_alone():
    assert Folding(_trained("scenes", dtype=torch.bfloat16).denoiser).num_layers == 0


def test_autocast_leaves_the_adapter_apart_since_it_would_round_it_away():
    model = _trained("scenes")
    with torch.autocast("cpu", torch.bfloat16):
        want = _predict(model)
        with Folding(model.denoiser) as folding:
            assert torch.equal(_predict(model), want)
            folding.off()
            folding.on()
            assert torch.equal(_predict(model), want)


@pytest.mark.parametrize("update", ["replay", "one_pass"])
def test_an_iteration_is_the_same_with_a_folded_rollout(update: str):
    found = []
    for fold in (False, True):
        model = _trained("scenes")
        schedule = model.schedule(4)
        optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1.0)
        settings = Updates(rollout_batch=2, max_grad_norm=1e9, update=update)  # type: ignore[arg-type]
        engine = Engine(
            model, schedule, ddpo(), StaticRange(start=1, end=3), lambda x, _: x.mean((1, 2, 3)), optimizer, settings,
            sampler=Sampler(guidance_scale=2.0), folds_adapter=fold,
        )  # fmt: skip
        before = torch.cat([parameter.detach().flatten().clone() for parameter in model.trainable_parameters()])
        values = engine.step(EncodedPrompts.of(model, PROMPTS), PROMPTS, iteration=0, seed=1).values
        after = torch.cat([parameter.detach().flatten() for parameter in model.trainable_parameters()])
        found.append((after - before, values["reward_mean"]))
    (want, reward), (got, other) = found
    assert other == pytest.approx(reward, rel=1e-4)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=2e-3 * want.abs().max().item())
