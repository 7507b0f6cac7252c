"""TDPO: temporal rewards, the critic's loss and its samples, the reset of its neurons, and that it resumes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import TINY, call, refused
from safetensors.torch import load_file

from adascope_fast import schedules
from adascope_fast.algorithms import tdpo
from adascope_fast.algorithms.advantages import PerPromptTracker
from adascope_fast.algorithms.algorithm import Context, Samples
from adascope_fast.algorithms.critic import is_active_neuron, returns, standardised
from adascope_fast.algorithms.objectives import Clipped, clipped_value_loss
from adascope_fast.rollout import Trajectory

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())["tdpo"]
T = 4
PROMPTS = ["a", "a", "b", "b"]


def _samples(rewards: list[float], seed: int = 0) -> Samples:
    schedule = schedules.dance_sde(torch.linspace(1, 0.2, T + 1), eta=0.3)
    latents = torch.randn(len(rewards), T + 1, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    index = torch.tensor([0, 0, 1, 1])
    trajectory = Trajectory(latents, latents[:, 1:], torch.zeros(len(rewards), T), schedule, PROMPTS, index)
    return Samples(trajectory, torch.tensor(rewards))


def _context(seed: int = 0, keep: torch.Tensor | None = None) -> Context:
    text = torch.tensor([[[1.0, 0.0], [3.0, 2.0]], [[0.0, 0.0], [0.0, 1.0]]])
    policy: Any = SimpleNamespace(
        condition=lambda: {"text": text},
        decode=lambda latents: latents[:, :1].expand(-1, 3, -1, -1),
    )
    keep = torch.ones(4, T, dtype=torch.bool) if keep is None else keep
    return Context(policy, keep, torch.Generator().manual_seed(seed), microbatch=3)


def test_defaults_are_the_originals():
    algorithm = tdpo()
    assert algorithm.advantage == PerPromptTracker(32, 16, float("inf"))
    assert algorithm.objective == Clipped(1e-4)
    section = algorithm.settings
    assert (section.reset_every, section.reset_neurons, section.gamma) == (10, "active", 1.0)
    assert (section.value_learning_rate, section.value_clip, algorithm.kl_weight) == (1e-4, 0.2, 0)
    assert algorithm.train_guidance == "both"


def test_temporal_rewards_against_known_answers():
    final = torch.tensor(VECTORS["final_rewards"], dtype=torch.float64)
    got = returns(final, 3, VECTORS["gamma"])
    torch.testing.assert_close(got, torch.tensor(VECTORS["returns"], dtype=torch.float64), rtol=1e-12, atol=0)
    temporal = got - torch.tensor(VECTORS["residual"], dtype=torch.float64)
    got = standardised(temporal, torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(got, torch.tensor(VECTORS["temporal_rewards"], dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_critics_loss_and_gradient_against_known_answers():
    known = VECTORS["critic"]
    value, old, target = (torch.tensor(known[name], dtype=torch.float64) for name in ("pred", "old", "ret"))
    value.requires_grad_()
    loss = clipped_value_loss(value, old, target, known["clip"]).mean()
    assert loss.item() == pytest.approx(known["loss"], rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, value)
    assert gradient.tolist() == pytest.approx(known["dloss_dpred"], rel=1e-12, abs=1e-15)


def test_only_kept_steps_are_standardised_and_taught():
    keep = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    values = torch.randn(4, T, dtype=torch.float64)
    got = standardised(values, keep)
    assert got[~keep].abs().max() == 0
    assert got[keep].mean().abs() < 1e-12
    assert got[keep].std(correction=0).item() == pytest.approx(1, rel=1e-6)
    found = []
    for noise in (0.0, 5.0):  # at the steps that are not kept
        samples = _samples([1.0, 0.5, 0.2, -1.0])
        samples.trajectory.latents[:, :-1][~keep] += noise
        algorithm = tdpo(value_learning_rate=1e-2, reset_every=1)
        advantages = algorithm.advantages(samples, _context(keep=keep))
        found.append((advantages, algorithm.tensors()))
    assert torch.equal(found[0][0], found[1][0])
    for name, value in found[0][1].items():
        assert torch.equal(value, found[1][1][name]), name


def test_advantages_are_what_returns_are_above_the_critic_before_it_learns():
    algorithm = tdpo(min_count=1, gamma=0.9, value_learning_rate=1e-2)
    samples = _samples([1.0, 0.0, 3.0, 2.0])
    first = algorithm.advantages(samples, _context())
    # Each prompt's two rewards are one standard deviation from their mean; the critic is next to 0 at first.
    target = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None] * 0.9 ** torch.arange(3, -1, -1)
    torch.testing.assert_close(first, target / target.std(correction=0), rtol=0, atol=0.01)
    assert algorithm._critic is not None
    seen = algorithm._seen(samples, _context())
    values = algorithm._critic(seen)[..., 0].detach()
    again = algorithm.advantages(samples, _context())
    above = returns(torch.tensor([1.0, -1.0, 1.0, -1.0]), T, 0.9) - values
    torch.testing.assert_close(again, (above - above.mean()) / above.std(correction=0), rtol=1e-3, atol=1e-3)


def test_the_critic_learns_the_returns():
    """A linear critic of latents can tell these 16 states apart, so it comes to know what each returns."""
    algorithm = tdpo(value_learning_rate=3e-3, reset_every=0, value_clip=1e6, value_steps=16, min_count=1)
    samples = _samples([1.0, 0.0, 1.0, 0.0])
    target = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None].expand(4, T)
    for seed in range(60):
        algorithm.advantages(samples, _context(seed))
    assert algorithm._critic is not None
    values = algorithm._critic(algorithm._seen(samples, _context()))[..., 0]
    assert (values - target).square().mean() < 0.2


@pytest.mark.parametrize("reset_neurons", ["active", "dormant"])
def test_a_reset_draws_the_neurons_anew_and_no_others(reset_neurons: str):
    algorithm = tdpo(reset_every=2, reset_neurons=reset_neurons, value_learning_rate=1e-2, value_steps=4)
    samples = _samples([1.0, 0.0, 1.0, 0.0])
    algorithm.advantages(samples, _context(0))
    without = tdpo(reset_every=0, value_learning_rate=1e-2, value_steps=4)
    without.load_tensors({name: value.clone() for name, value in algorithm.tensors().items()})
    without.load_state_dict(algorithm.state_dict())
    after, before = algorithm, without
    for each in (after, before):
        each.advantages(samples, _context(1))
    seen = before._seen(samples, _context()).flatten(0, 1)
    assert before._critic is not None
    assert after._critic is not None
    x, masks = seen, []
    for layer in before._critic[:-1]:
        x = layer(x)
        active = is_active_neuron(x)
        masks.append(active if reset_neurons == "active" else ~active)
    assert 0 < masks[0].sum() < len(masks[0])
    std = 1 / (seen.shape[1] + 1)
    old, new = before.tensors(), after.tensors()
    for number, mask in enumerate([*masks, torch.tensor([False])]):
        source = masks[number - 1] if number else torch.zeros(seen.shape[1], dtype=torch.bool)
        weight, was = (which[f"critic.{number}.weight"] for which in (new, old))
        touched = mask[:, None] | source[None]
        assert torch.equal(weight[~touched], was[~touched])
        if touched.sum() > 500:
            assert weight[touched].std().item() == pytest.approx(std, rel=0.1)
        bias, bias_was = (which[f"critic.{number}.bias"] for which in (new, old))
        assert (bias[mask] == 0).all()
        assert torch.equal(bias[~mask], bias_was[~mask])
        moments = new[f"optimizer.{2 * number}.exp_avg"]
        assert (moments[touched] == 0).all()
        assert torch.equal(moments[~touched], old[f"optimizer.{2 * number}.exp_avg"][~touched])


def test_dormant_neurons_are_those_without_any_positive_activation():
    activation = torch.tensor([[-1.0, 0.5, 0.0, -2.0], [-3.0, -0.5, 0.0, 1e-3]])
    assert is_active_neuron(activation).tolist() == [False, True, False, True]


def test_it_resumes_where_it_was_resets_included():
    straight = tdpo(reset_every=2, value_learning_rate=1e-3, min_count=1)
    for seed in range(2):
        straight.advantages(_samples([1.0, 0.5, 0.2, 0.1], seed), _context(seed))
    resumed = tdpo(reset_every=2, value_learning_rate=1e-3, min_count=1)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    resumed.load_tensors({name: value.clone() for name, value in straight.tensors().items()})
    for seed in range(2, 4):
        found = [each.advantages(_samples([0.3, 0.9, 0.4, 0.2], seed), _context(seed)) for each in (straight, resumed)]
        assert torch.equal(*found)
    for name, value in straight.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name


def test_it_may_see_the_pictures_of_noisy_latents():
    algorithm = tdpo(critic_features="images")
    with pytest.raises(ValueError, match="needs an encoder of pictures"):
        algorithm.advantages(_samples([1.0, 0.5, 0.2, 0.1]), _context())
    seen = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return images.flatten(1)

    algorithm.encode = encode
    keep = torch.zeros(4, T, dtype=torch.bool)
    keep[:, 1:3] = True
    samples = _samples([1.0, 0.5, 0.2, 0.1])
    advantages = algorithm.advantages(samples, _context(keep=keep))
    assert seen == [3, 3, 2], "the kept states alone, in microbatches"
    assert advantages[~keep].abs().max() == 0
    found = algorithm._seen(samples, _context(keep=keep))
    picture = samples.trajectory.latents[2, 1, 0].expand(3, -1, -1).flatten()
    torch.testing.assert_close(found[2, 1], picture)
    assert found[2, 3].abs().max() == 0


SMALLEST = [
    "algorithm.name=tdpo",
    "algorithm.reset_every=2",
    "reward.name=jpeg_compressibility",
    "sampler.num_steps=4",
    "train.prompts_per_iteration=1",
    "train.learning_rate=0.01",
    "evaluation.num_prompts=1",
    "evaluation.samples_per_prompt=1",
]


@pytest.mark.parametrize(
    "overrides",
    [
        ["selector.name=every_step"],
        ["algorithm.critic_features=images", "model.train=full"],
        ["model.name=scenes-flow", "sampler.shift=2.0", "algorithm.kl_weight=0.1"],
    ],
)
def test_a_run_resumes_bit_for_bit(tmp_path: Path, overrides: list[str]):
    weights = []
    for name, first in (("straight", "4"), ("stopped", "2")):
        run = tmp_path / name
        outcome = call("train", TINY, *SMALLEST, *overrides, f"run.folder={run}", f"train.iterations={first}")
        assert outcome.code == 0, outcome
        if first == "2":
            outcome = call("train", "--resume", run, "train.iterations=4")
            assert outcome.code == 0, outcome
        (file,) = [*sorted((run / "checkpoints").glob("*4/*.safetensors"))]
        weights.append(load_file(file))
    assert weights[0].keys() == weights[1].keys()
    assert any(name.startswith("algorithm.critic") for name in weights[0])
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_what_it_cannot_is_refused():
    line = refused("train", TINY, *SMALLEST, "train.update=one_pass", "selector.name=every_step")
    assert "and tdpo has none" in line
    line = refused("train", TINY, *SMALLEST, "algorithm.critic_clip=openai/clip-vit-large-patch14")
    assert "algorithm.critic_features" in line
    line = refused("train", TINY, *SMALLEST, "algorithm.reset_every=-1")
    assert "algorithm.reset_every" in line
    line = refused("train", TINY, *SMALLEST, "algorithm.critic_features=images", "algorithm.critic_clip=nowhere")
    assert "got 'nowhere'" in line
