"""An engine on a toy, how far an iteration moves it, and the model outputs of a rollout in a plain loop.

Axes: `b` samples, `t` steps.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from adascope_fast.engine.engine import Engine
from adascope_fast.engine.settings import Updates
from adascope_fast.rollout import EncodedPrompts, OwnNoise, Trajectory, rollout
from adascope_fast.schedules.settings import Sampler
from adascope_fast.selectors.simple import StaticRange

PROMPTS = ["a red one", "a red one", "the green", "the green", "see", "see"]
T, SEED = 6, 7


class Moved(NamedTuple):
    """What iterations subtracted from the parameters, and the values of the last one."""

    by: Tensor
    values: dict[str, Any]


@pytest.fixture
def make_engine() -> Callable[..., Engine]:
    """Builds engines with SGD, so that one update at rate 1 subtracts the gradient."""
    return _engine


def _engine(
    toy: Any,
    algorithm: Any,
    *,
    selector: Any = None,
    kind: str = "auto",
    guidance_scale: float = 1.0,
    train_guidance: Any = None,
    score: Any = None,
    learning_rate: float = 1.0,
    graphs: Any = None,
    **updates: Any,
) -> Engine:
    optimizer = torch.optim.SGD(toy.trainable_parameters(), lr=learning_rate)
    settings = Updates(**{"rollout_batch": 4, "microbatch": 4, "max_grad_norm": 1e9, **updates})
    sampler = Sampler(guidance_scale=guidance_scale, train_guidance=train_guidance)
    schedule, selector = toy.schedule(T, kind=kind), selector or StaticRange(start=1, end=5)
    score = score or (lambda images, prompts: images.mean((1, 2, 3)))
    return Engine(toy, schedule, algorithm, selector, score, optimizer, settings, sampler=sampler, graphs=graphs)


@pytest.fixture
def move() -> Callable[..., Moved]:
    """Runs iterations of an engine on `PROMPTS`."""
    return _move


def _move(engine: Engine, iterations: int = 1) -> Moved:
    before = flat(engine.backbone)
    encoded, values = EncodedPrompts.of(engine.backbone, PROMPTS), {}
    for number in range(iterations):
        values = engine.step(encoded, PROMPTS, iteration=number, seed=SEED + number).values
    return Moved(before - flat(engine.backbone), values)


@pytest.fixture
def sample() -> Callable[..., Trajectory]:
    """The rollout that the first iteration of `move` trains on; of an engine that has not moved yet."""
    return _sample


def _sample(engine: Engine) -> Trajectory:
    toy = engine.backbone
    encoded, scale = EncodedPrompts.of(toy, PROMPTS), engine.sampler.guidance_scale
    kind = engine.algorithm.log_prob_kind(engine.schedule)
    shared: dict[str, Any] = {"guidance_scale": scale, "noise": OwnNoise(SEED).of_use(0), "batch": 4, "kind": kind}
    return rollout(toy, engine.schedule, encoded, PROMPTS, **shared)


@pytest.fixture
def outputs() -> Callable[..., Tensor]:
    """The guided outputs [b, t, ...] of a toy along a rollout, in a plain loop, which can be differentiated."""
    return _outputs


def _outputs(toy: Any, trajectory: Trajectory, guidance_scale: float = 1.0, *, is_conditional: bool = False) -> Tensor:
    found = []
    with_prompt, without_prompt = toy.encode(trajectory.prompts), toy.encode([""] * len(trajectory.prompts))
    for step in range(trajectory.num_steps):
        state = trajectory.latents[:, step].double()
        timestep = trajectory.schedule.timesteps[step].expand(len(state))
        output = toy.predict(state, timestep, with_prompt)
        if guidance_scale != 1:
            without = toy.predict(state, timestep, without_prompt)
            without = without.detach() if is_conditional else without
            output = without + guidance_scale * (output - without)
        found.append(output)
    return torch.stack(found, 1)


@pytest.fixture
def log_probs() -> Callable[..., Tensor]:
    """Log-probabilities [b, t] of a rollout from its outputs, by torch's own normal distribution."""
    return _log_probs


def _log_probs(trajectory: Trajectory, outputs: Tensor) -> Tensor:
    weights = trajectory.schedule.coef.double()[:, :, None, None, None].unbind(1)
    mean = weights[0] * trajectory.latents[:, :-1].double() + weights[1] * outputs
    normal = torch.distributions.Normal(mean, weights[2].clamp(min=1e-30).expand_as(mean))
    return normal.log_prob(trajectory.latents[:, 1:].double()).mean((2, 3, 4))


@pytest.fixture
def make_other_reference() -> Callable[..., Any]:
    """Gives a toy another one's outputs as its reference policy's; returns the other one."""
    return _other_reference


def _other_reference(make_toy: Callable, toy: Any, factor: float) -> Any:
    other = make_toy(toy.dtype)
    with torch.no_grad():
        for parameter in other.trainable_parameters():
            parameter.mul_(factor)

    @contextmanager
    def reference_policy():
        own, toy.layers = toy.layers, other.layers
        yield
        toy.layers = own

    toy.reference_policy = reference_policy
    return other


@pytest.fixture
def gradient() -> Callable[[Tensor, Any], Tensor]:
    """The gradient of a number in a toy's parameters, as one vector."""
    return lambda value, toy: torch.cat([g.flatten() for g in torch.autograd.grad(value, toy.trainable_parameters())])


def flat(toy: Any) -> Tensor:
    """A toy's parameters as one vector."""
    return torch.cat([parameter.detach().flatten().clone() for parameter in toy.trainable_parameters()])
