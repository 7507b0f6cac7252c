"""The KL from the reference policy: its forms, its weight, its gradient, and that it costs nothing without a weight."""

from collections.abc import Callable

import pytest
import torch

from adascope_fast.algorithms.policy_gradient import Pairs, ddpo, kl_factor
from adascope_fast.engine.engine import Engine
from adascope_fast.rollout import EncodedPrompts, Trajectory
from adascope_fast.schedules import samplers as schedules

T, WEIGHT = 6, 0.25


def _update(engine: Engine, trajectory: Trajectory, keep: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """What an update without any advantage subtracts from the parameters, and its values."""
    pairs = trajectory.pairs(keep)
    rows = Pairs(trajectory, pairs, torch.zeros(len(pairs), dtype=torch.float64), None)
    policy = engine.policy(EncodedPrompts.of(engine.backbone, trajectory.prompts), engine.schedule)
    before = [parameter.detach().clone() for parameter in engine.backbone.trainable_parameters()]
    values = engine.update(policy, rows, T, torch.Generator().manual_seed(4))
    after = engine.backbone.trainable_parameters()
    return torch.cat([(a - b).flatten() for a, b in zip(before, after, strict=True)]), values


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["dance_sde", "flow_sde"])
@pytest.mark.parametrize("kl_form", ["divergence", "flow_grpo", "output"])
def test_the_kl_pulls_towards_the_reference_by_its_weight(
    make_toy: Callable,
    make_engine: Callable,
    make_other_reference: Callable,
    sample: Callable,
    outputs: Callable,
    gradient: Callable,
    kl_form: str,
    kind: str,
    guidance_scale: float,
):
    """With no advantage the gradient is that of the KL alone; the reference is another toy's output."""
    toy = make_toy(torch.float64)
    reference = make_other_reference(make_toy, toy, 0.9)
    algorithm = ddpo(kl_weight=WEIGHT, kl_form=kl_form)
    engine = make_engine(toy, algorithm, kind=kind, guidance_scale=guidance_scale)
    trajectory = sample(engine)
    keep = torch.rand(len(trajectory.prompts), T, generator=torch.Generator().manual_seed(2)) < 0.5
    ours, theirs = (outputs(model, trajectory, guidance_scale) for model in (toy, reference))
    distance = (ours - theirs.detach()).square().mean((2, 3, 4))
    _, weight_output, std = trajectory.schedule.coef.double().unbind(1)
    divergence = weight_output.square() * distance / (2 * std.square())
    # The sigmas fall evenly from 1 to 0 in T steps, so -dt is 1 / T.
    kl = {"divergence": divergence, "flow_grpo": divergence / T, "output": distance}[kl_form]
    want = gradient(WEIGHT * kl[keep].mean(), toy)
    loss = (WEIGHT * kl[keep]).mean().item()
    got, values = _update(engine, trajectory, keep)
    assert want.norm() > 1e-5
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
    assert values["loss"] == pytest.approx(loss, rel=1e-5)
    assert values["kl"] == pytest.approx(divergence[keep].mean().item(), rel=1e-5), "told as what it is in every form"


def test_flow_grpos_form_follows_the_steps_of_the_sampler():
    sigmas = [1.0, 0.9, 0.5, 0.2, 0.0]
    for schedule in (schedules.flow_sde(sigmas, noise_level=0.7), schedules.dance_sde(sigmas, eta=0.3)):
        assert kl_factor("flow_grpo", schedule).tolist() == pytest.approx([0.1, 0.4, 0.3, 0.2], rel=1e-6)
    ddim = schedules.ddim([0.9, 0.5, 0.1], [2, 1], stride=1, eta=1.0)
    with pytest.raises(ValueError, match="is that of flow samplers, got 'ddim'"):
        kl_factor("flow_grpo", ddim)


def test_without_a_kl_weight_there_is_no_reference_pass(make_toy: Callable, make_engine: Callable, move: Callable):
    toy = make_toy()

    def reference_policy():
        raise AssertionError("the reference policy was asked for")

    toy.reference_policy = reference_policy
    move(make_engine(toy, ddpo()))
    with pytest.raises(ValueError, match=r"is the form of a KL, got algorithm\.kl_weight = 0"):
        ddpo(kl_form="output")
