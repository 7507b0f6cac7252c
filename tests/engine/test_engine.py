"""One iteration: the packed, microbatched update is the plain loop over steps, and skipped steps cost nothing."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adascope_fast import backbones
from adascope_fast.algorithms.policy_gradient import Pairs, ddpo
from adascope_fast.engine.engine import Engine
from adascope_fast.engine.settings import Updates
from adascope_fast.rollout import EncodedPrompts, OwnNoise, Trajectory, rollout
from adascope_fast.schedules import Schedule
from adascope_fast.schedules.settings import Sampler
from adascope_fast.selectors.simple import EveryStep, StaticRange

aten = torch.ops.aten
PROMPTS = ["a red one", "a red one", "the green", "see", "see"]
B, T = len(PROMPTS), 6
CLIP_RANGE = 1e-4


def _updates(**changes: Any) -> Updates:
    return Updates(**{"rollout_batch": 3, "microbatch": 4, "max_grad_norm": 1e9, **changes})


def _score(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3))


def _engine(
    backbone: Any,
    settings: Updates,
    *,
    learning_rate: float = 1.0,
    selector: Any = None,
    guidance_scale: float = 1.0,
) -> Engine:
    schedule, sampler = backbone.schedule(T), Sampler(guidance_scale=guidance_scale)
    selector = selector or EveryStep(last_step="train")
    optimizer = torch.optim.SGD(backbone.trainable_parameters(), lr=learning_rate)
    algorithm = ddpo(clip_range=CLIP_RANGE, buffer_size=4, min_count=2)
    return Engine(backbone, schedule, algorithm, selector, _score, optimizer, settings, sampler=sampler)


def _rollout(engine: Engine, prompts: list[str] = PROMPTS) -> tuple[EncodedPrompts, Trajectory]:
    encoded = EncodedPrompts.of(engine.backbone, prompts)
    trajectory = rollout(
        engine.backbone,
        engine.schedule,
        encoded,
        prompts,
        guidance_scale=engine.sampler.guidance_scale,
        noise=OwnNoise(1),
        batch=100,
    )
    return encoded, trajectory


def _ragged(b: int = B, t: int = T) -> Tensor:
    return torch.rand(b, t, generator=torch.Generator().manual_seed(2)) < 0.5


def _advantages(b: int = B, t: int = T) -> Tensor:
    return torch.randn(b, t, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _update(engine: Engine, keep: Tensor, advantages: Tensor, prompts: list[str] = PROMPTS) -> dict[str, Any]:
    encoded, trajectory = _rollout(engine, prompts)
    return _replayed(engine, encoded, trajectory, keep, advantages)


def _replayed(
    engine: Engine, encoded: EncodedPrompts, trajectory: Trajectory, keep: Tensor, advantages: Tensor
) -> dict[str, Any]:
    rows, policy = _rows(trajectory, keep, advantages), engine.policy(encoded, engine.schedule)
    return engine.update(policy, rows, trajectory.num_steps, torch.Generator().manual_seed(4))


def _rows(trajectory: Trajectory, keep: Tensor, advantages: Tensor) -> Pairs:
    pairs = trajectory.pairs(keep)
    return Pairs(trajectory, pairs, advantages[pairs[:, 0], pairs[:, 1]], None)


def _gradient(engine: Engine, keep: Tensor, advantages: Tensor, prompts: list[str] = PROMPTS) -> Tensor:
    """What one update subtracts from the parameters: with SGD at rate 1 and no clipping, the gradient."""
    before = _flat(engine)
    _update(engine, keep, advantages, prompts)
    return before - _flat(engine)


def _flat(engine: Engine) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in engine.backbone.trainable_parameters()])


def _dense_gradient(
    backbone: Any, trajectory: Trajectory, keep: Tensor, advantages: Tensor, guidance_scale: float
) -> Tensor:
    """The plain way: one step after the other on the whole batch, masked, with torch's own normal distribution."""
    parameters = backbone.trainable_parameters()
    with_prompt, without_prompt = backbone.encode(trajectory.prompts), backbone.encode([""] * len(keep))
    total = torch.zeros((), dtype=torch.float64)
    for step in range(trajectory.num_steps):
        sample, following = trajectory.latents[:, step].double(), trajectory.latents[:, step + 1].double()
        timestep = trajectory.schedule.timesteps[step].expand(len(sample))
        output = backbone.predict(sample, timestep, with_prompt)
        if guidance_scale != 1:
            without = backbone.predict(sample, timestep, without_prompt)
            output = without + guidance_scale * (output - without)
        weight_sample, weight_output, std = trajectory.schedule.coef[step].double()
        normal = torch.distributions.Normal(weight_sample * sample + weight_output * output, std)
        log_prob = normal.log_prob(following).mean((1, 2, 3))
        ratio = (log_prob - log_prob.detach()).exp()  # no parameter has moved since the rollout
        clipped = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
        gain = torch.minimum(advantages[:, step] * ratio, advantages[:, step] * clipped)
        total = total - (gain * keep[:, step]).sum()
    gradients = torch.autograd.grad(total / keep.sum(), parameters)
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("microbatch", [1, 7, 1000])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("is_dense", [False, True])
def test_gradient_is_that_of_the_plain_loop_over_steps(
    make_toy: Callable, microbatch: int, guidance_scale: float, is_dense: bool
):
    engine = _engine(make_toy(torch.float64), _updates(microbatch=microbatch), guidance_scale=guidance_scale)
    keep = torch.ones(B, T, dtype=torch.bool) if is_dense else _ragged()
    _, trajectory = _rollout(engine)
    want = _dense_gradient(engine.backbone, trajectory, keep, _advantages(), guidance_scale)
    torch.testing.assert_close(_gradient(engine, keep, _advantages()), want, rtol=1e-9, atol=1e-12)


def test_gradient_is_that_of_the_plain_loop_on_an_embedded_model():
    prompts = ["a small red circle on a grey background", "two large blue crosses on a black background"]
    keep, advantages = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 1]]).bool(), _advantages(2)
    model = backbones.load("scenes", lora_rank=2)
    with torch.no_grad():
        for parameter in model.trainable_parameters():  # a fresh adapter is zero and has no gradient in half of it
            parameter.add_(0.02)
    engine = _engine(model, _updates(microbatch=4))
    _, trajectory = _rollout(engine, prompts)
    want = _dense_gradient(model, trajectory, keep, advantages, 1.0).float()
    start = {name: value.clone() for name, value in model.adapter_tensors().items()}
    got = _gradient(engine, keep, advantages, prompts)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())

    recomputing = backbones.load("scenes", lora_rank=2, gradient_checkpointing=True)
    recomputing.load_adapter_tensors(start)
    assert recomputing.denoiser.is_gradient_checkpointing
    again = _gradient(_engine(recomputing, _updates(microbatch=4)), keep, advantages, prompts)
    torch.testing.assert_close(again, got, rtol=1e-5, atol=1e-6 * want.abs().max().item())


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_steps_that_are_not_kept_cost_no_denoiser_call(make_toy: Callable, guidance_scale: float):
    keep = _ragged()
    toy = make_toy()
    engine = _engine(toy, _updates(), guidance_scale=guidance_scale)
    encoded, trajectory = _rollout(engine)
    toy.num_rows = 0
    values = _replayed(engine, encoded, trajectory, keep, _advantages())
    assert values["pairs_trained"] == keep.sum()
    assert toy.num_rows == keep.sum() * (1 if guidance_scale == 1 else 2)


@pytest.mark.parametrize("num_kept", [3, 4, 11, 30])
def test_the_number_of_updates_does_not_depend_on_the_selection(make_toy: Callable, num_kept: int):
    engine = _engine(make_toy(), _updates(updates_per_iteration=3, microbatch=2))
    keep = torch.zeros(B * T, dtype=torch.bool)
    keep[torch.randperm(B * T)[:num_kept]] = True
    steps = []
    engine.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    _update(engine, keep.view(B, T), _advantages())
    assert len(steps) == 3


def test_several_updates_do_not_depend_on_the_microbatch(make_toy: Callable):
    results = []
    for microbatch in (1, 7, 1000):
        engine = _engine(make_toy(torch.float64), _updates(updates_per_iteration=3, microbatch=microbatch))
        results.append((_update(engine, _ragged(), _advantages()), _flat(engine)))
    (values, parameters), *others = results
    for other_values, other_parameters in others:
        torch.testing.assert_close(other_parameters, parameters, rtol=1e-9, atol=1e-12)
        assert other_values == pytest.approx(values, rel=1e-5)


def test_each_update_is_made_of_its_own_pairs(make_toy: Callable):
    """Two updates that move next to nothing: together they are the gradient of all pairs, halves counted as wholes."""
    rate, keep = 1e-7, torch.ones(B, T, dtype=torch.bool)
    one, two = (_engine(make_toy(torch.float64), _updates(updates_per_iteration=n), learning_rate=rate) for n in (1, 2))
    whole, halves = (_gradient(engine, keep, _advantages()) / rate for engine in (one, two))
    torch.testing.assert_close(halves, 2 * whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())


def test_the_denoiser_sees_the_kept_pairs_in_microbatches(make_toy: Callable):
    engine, sizes = _engine(make_toy(), _updates(microbatch=4)), []
    encoded, trajectory = _rollout(engine)
    predict = engine.backbone.predict
    engine.backbone.predict = lambda sample, *rest: (sizes.append(len(sample)), predict(sample, *rest))[1]  # type: ignore[method-assign]
    keep = torch.zeros(B, T, dtype=torch.bool)
    keep[1:3, :5] = True
    _replayed(engine, encoded, trajectory, keep, _advantages())
    assert sizes == [4, 3, 3]


def test_step_weights_multiply_the_advantages_of_their_steps(make_toy: Callable):
    def displacement(weight: Callable[[Schedule], Tensor] | None) -> Tensor:
        engine = _engine(make_toy(torch.float64), _updates())
        engine.algorithm = replace(engine.algorithm, step_weight=weight)
        before = _flat(engine)
        engine.step(EncodedPrompts.of(engine.backbone, PROMPTS), PROMPTS, iteration=0, seed=0)
        return before - _flat(engine)

    def only(steps: list[int]) -> Callable[[Schedule], Tensor]:
        return lambda schedule: torch.tensor([float(step in steps) for step in range(schedule.num_steps)])

    parts = displacement(only([0, 3])), displacement(only([1, 2, 4, 5]))
    assert min(part.norm() for part in parts) > 0
    torch.testing.assert_close(parts[0] + parts[1], displacement(None), rtol=1e-6, atol=1e-9)


def test_ratio_is_exactly_one_until_a_parameter_moves(make_toy: Callable):
    first = _update(_engine(make_toy(), _updates()), _ragged(), _advantages())
    assert (first["ratio_max_deviation"], first["clipfrac"], first["approx_kl"]) == (0, 0, 0)
    assert first["rollout_drift"] < 1e-4
    second = _update(_engine(make_toy(), _updates(updates_per_iteration=2)), _ragged(), _advantages())
    assert second["ratio_max_deviation"] > CLIP_RANGE
    assert 0 < second["clipfrac"] <= 0.5, "only the second half of the pairs can leave the clip range"


def test_a_nonfinite_gradient_skips_its_update_and_is_counted(make_toy: Callable):
    engine = _engine(make_toy(), _updates(updates_per_iteration=2))
    advantages = _advantages()
    advantages[2, 3] = math.nan
    before = _flat(engine)
    values = _update(engine, torch.ones(B, T, dtype=torch.bool), advantages)
    assert (values["updates_skipped"], values["nonfinite"]) == (1, 1)
    assert _flat(engine).isfinite().all()
    assert math.isfinite(values["grad_norm"])
    assert not torch.equal(_flat(engine), before), "the other update is made"
    nothing = _update(engine, torch.ones(B, T, dtype=torch.bool), torch.full((B, T), math.nan))
    assert nothing["updates_skipped"] == 2
    assert _flat(engine).isfinite().all()


def test_gradients_are_scaled_down_to_the_largest_norm(make_toy: Callable):
    free, bound = (_engine(make_toy(), _updates(max_grad_norm=norm)) for norm in (1e9, 1e-3))
    gradient, clipped = (_gradient(engine, _ragged(), _advantages()) for engine in (free, bound))
    assert gradient.norm() > 0.01
    assert clipped.norm().item() == pytest.approx(1e-3, rel=1e-2)
    torch.testing.assert_close(clipped / clipped.norm(), gradient / gradient.norm(), rtol=0, atol=1e-3)


class _Asks(TorchDispatchMode):
    """Counts the operations whose result the host needs before it can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_fused", [True, False])
def test_rollout_and_update_ask_the_device_nothing(make_toy: Callable, is_fused: bool):
    engine = _engine(make_toy(), _updates(updates_per_iteration=2))
    engine.optimizer = torch.optim.AdamW(engine.backbone.trainable_parameters(), lr=1e-3, fused=is_fused)
    encoded, trajectory = _rollout(engine)
    rows, policy = _rows(trajectory, _ragged(), _advantages()), engine.policy(encoded, engine.schedule)
    with _Asks() as asks:
        _rollout(engine)
        engine._replay(policy, rows, T, torch.Generator().manual_seed(4))
    assert bool(asks.found) is not is_fused, "only an optimiser that cannot skip by itself needs to be told"


def test_fewer_pairs_than_updates_are_refused(make_toy: Callable):
    engine = _engine(make_toy(), _updates(updates_per_iteration=6), selector=StaticRange(start=2, end=3))
    with pytest.raises(ValueError, match=r"each of the 6 updates .* kept 5; lower train\.updates_per_iteration"):
        engine.step(EncodedPrompts.of(engine.backbone, PROMPTS), PROMPTS, iteration=0, seed=0)


def test_an_iteration_raises_the_reward_and_reports_what_it_did(make_toy: Callable):
    prompts = ["a"] * 24
    engine = _engine(make_toy(), _updates(microbatch=100), selector=StaticRange(start=1, end=4))
    engine.optimizer = torch.optim.Adam(engine.backbone.trainable_parameters(), lr=0.02)
    encoded = EncodedPrompts.of(engine.backbone, prompts)
    reports = [engine.step(encoded, prompts, iteration=i, seed=i) for i in range(40)]
    rewards = [report.values["reward_mean"] for report in reports]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.05
    last = reports[-1]
    assert last.values["fraction_trained"] == 3 / T
    assert last.values["pairs_trained"] == 24 * 3
    assert last.values["selector"] == {"start": 1, "end": 4, "fraction": 0.5}
    assert set(last.seconds) == {"rollout", "reward", "sensing", "update"}


def test_an_iteration_repeats_itself_bit_for_bit_from_its_seed(make_toy: Callable):
    def parameters_after(seed: int) -> Tensor:
        engine = _engine(make_toy(), _updates(updates_per_iteration=2), learning_rate=0.1)
        engine.step(EncodedPrompts.of(engine.backbone, PROMPTS), PROMPTS, iteration=0, seed=seed)
        return _flat(engine)

    assert torch.equal(parameters_after(1), parameters_after(1))
    assert not torch.equal(parameters_after(1), parameters_after(2))


def test_the_denoiser_runs_within_autocast(make_toy: Callable):
    inside = []

    @contextmanager
    def autocast():
        inside.append(1)
        yield

    toy = make_toy()
    plain = _engine(toy, _updates(microbatch=1000))
    engine = Engine(
        toy, plain.schedule, plain.algorithm, plain.selector, _score, plain.optimizer, plain.settings,
        autocast=autocast,
    )  # fmt: skip
    engine.step(EncodedPrompts.of(toy, PROMPTS), PROMPTS, iteration=0, seed=0)
    assert len(inside) == 2  # the rollout, and one microbatch
