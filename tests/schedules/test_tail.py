"""The short way to the picture: diffusers' solver step by step, its order, what a rollout with it costs and keeps."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from adascope_fast.adascope.selector import AdaScope
from adascope_fast.adascope.sensing import LatentSensor
from adascope_fast.algorithms.policy_gradient import ddpo
from adascope_fast.engine.engine import Engine
from adascope_fast.engine.settings import Updates
from adascope_fast.rollout import EncodedPrompts, OwnNoise, rollout
from adascope_fast.schedules import Schedule, flow_sde
from adascope_fast.schedules.settings import Sampler
from adascope_fast.schedules.tail import Tails, tail
from adascope_fast.selectors.protocol import TimestepSelector
from adascope_fast.selectors.simple import EveryStep, RandomFraction, StaticRange

PROMPTS = ["a red one", "a red one", "the green", "see", "see"]
T = 12


def _ddim(num_steps: int = T, **config: Any) -> Schedule:
    beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    scheduler = DDIMScheduler(**beta, **config)  # type: ignore[arg-type]
    return Schedule.from_diffusers(scheduler, num_steps, eta=1.0)


def _solve(schedule: Schedule, start: int, share: float, x: Tensor, guess: Callable[[Tensor, int], Tensor]) -> Tensor:
    found, last = tail(schedule, start, share), torch.zeros_like(x)
    for step, (of_x, of_guess, of_last) in zip(found.step.tolist(), found.coef, strict=True):
        now = guess(x, step)
        x, last = of_x * x + of_guess * now + of_last * last, now
    return x


@pytest.mark.parametrize(("start", "share"), [(0, 1.0), (3, 0.4), (5, 0.7), (10, 1.0), (11, 0.1)])
def test_the_steps_are_diffusers_own(start: int, share: float):
    schedule = _ddim()
    found = tail(schedule, start, share)
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # numpy's, on diffusers' part
        scheduler.set_timesteps(timesteps=schedule.timesteps[found.step].long().tolist())
    x = start_x = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    output = lambda x, t: torch.sin(3 * x) * 0.5 + 0.1 * t / 1000  # noqa: E731
    for t in scheduler.timesteps:
        (x,) = scheduler.step(output(x, float(t)), t, x, return_dict=False)

    def guess(x: Tensor, step: int) -> Tensor:
        of_x, of_output = schedule.x0_coef[step].double()
        return of_x * x + of_output * output(x, float(schedule.timesteps[step]))

    torch.testing.assert_close(_solve(schedule, start, share, start_x, guess), x, rtol=1e-4, atol=1e-4)


def test_it_converges_with_second_order_on_gaussian_data():
    """With the ideal guess the ODE keeps x / sqrt(V): the end is known."""
    variance, errors = 2.0, []
    for num_steps in (20, 40, 80):
        schedule = flow_sde(torch.linspace(0.9, 0.02, num_steps + 1), noise_level=0.7)
        signal, sigma = schedule.levels()
        total = (signal.square() * variance + sigma.square()).sqrt()
        found = tail(schedule, 0, 1.0)
        x, last = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for i in range(num_steps - 1):  # up to the last state with noise
            now = signal[i] * variance / total[i].square() * x
            of_x, of_guess, of_last = found.coef[i]
            x, last = of_x * x + of_guess * now + of_last * last, now
        errors.append(abs(x - total[-1] / total[0]).item())
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert min(ratios) > 3.2, (errors, ratios)  # 4 in the limit, 2 for a first-order solver


def test_the_last_step_is_the_guess_and_a_finished_sample_has_no_tail():
    schedule = _ddim()
    assert tail(schedule, 4, 0.5).coef[-1].tolist() == [0, 1, 0]
    assert tail(schedule, T, 0.5).step.tolist() == []
    assert tail(schedule, T - 1, 0.1).step.tolist() == [T - 1]
    assert tail(schedule, 2, 0.4).step.tolist() == [2, 4, 7, 10]  # 4 of 10
    with pytest.raises(ValueError, match=r"share of the remaining steps in \(0, 1\], but it is 0"):
        tail(schedule, 4, 0.0)


def _sampler(toy: Any) -> Schedule:
    return toy.schedule(T)


def _engine(toy: Any, selector: TimestepSelector, *, tail_share: float, update: Any = "replay") -> Engine:
    optimizer = torch.optim.SGD(toy.trainable_parameters(), lr=1.0)
    settings = Updates(rollout_batch=3, microbatch=2, max_grad_norm=1e9, update=update)
    sampler = Sampler(tail_share=tail_share)
    score = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    return Engine(toy, _sampler(toy), ddpo(clip_range=1e-4), selector, score, optimizer, settings, sampler=sampler)


@pytest.mark.parametrize("update", ["replay", "one_pass"])
@pytest.mark.parametrize(
    "selector", [StaticRange(start=1, end=4), RandomFraction(fraction=0.2, seed=3)], ids=["range", "ragged"]
)
def test_a_rollout_costs_what_its_tails_say(make_toy: Callable, selector: TimestepSelector, update: str):
    toy = make_toy()
    keep = selector.ahead(PROMPTS, _sampler(toy), 0)
    assert keep is not None
    ends = [int(row.nonzero().max()) + 1 for row in keep]
    want = sum(end + -(-(T - end) * 2 // 5) for end in ends)
    engine = _engine(toy, selector, update=update, tail_share=0.4)
    values = engine.step(EncodedPrompts.of(toy, PROMPTS), PROMPTS, iteration=0, seed=1).values
    assert values["forwards_sampled"] == want < len(PROMPTS) * T
    trained = values["pairs_trained"] if update == "replay" else 0
    assert toy.num_rows == want + trained


def _rollout(toy: Any, keep: Tensor | None, batch: int, guidance_scale: float = 1.0) -> Any:
    schedule = _sampler(toy)
    tails = None if keep is None else Tails.of(schedule, keep, 0.4)
    encoded = EncodedPrompts.of(toy, PROMPTS)
    sampler = {"guidance_scale": guidance_scale, "noise": OwnNoise(0), "batch": batch}
    return rollout(toy, schedule, encoded, PROMPTS, tails=tails, **sampler)


def test_the_trained_steps_are_those_of_the_whole_rollout_and_the_rest_is_unknown(make_toy: Callable):
    toy = make_toy(torch.float64)
    keep = RandomFraction(fraction=0.2, seed=3).ahead(PROMPTS, _sampler(toy), 0)
    whole, short = _rollout(toy, None, 5), _rollout(toy, keep, 5)
    for sample, row in enumerate(keep):
        end = int(row.nonzero().max()) + 1
        for name in ("latents", "log_prob", "x0"):
            taken = end + (name == "latents")
            got, want = getattr(short, name)[sample], getattr(whole, name)[sample]
            assert torch.equal(got[:taken], want[:taken]), name
            assert got[taken : T if name == "latents" else None].isnan().all(), name
        assert short.latents[sample, T].isfinite().all()
        assert end == T or not torch.equal(short.latents[sample, T], whole.latents[sample, T])


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_a_sample_does_not_depend_on_its_batch(make_toy: Callable, guidance_scale: float):
    toy = make_toy(torch.float64)
    keep = RandomFraction(fraction=0.2, seed=3).ahead(PROMPTS, _sampler(toy), 0)
    want = _rollout(toy, keep, 5, guidance_scale).latents
    for batch in (1, 2):
        torch.testing.assert_close(
            _rollout(toy, keep, batch, guidance_scale).latents, want, rtol=1e-6, atol=1e-6, equal_nan=True
        )


def test_the_tail_of_a_rollout_is_the_solver_by_hand(make_toy: Callable):
    toy = make_toy(torch.float64)
    schedule, encoded = _sampler(toy), EncodedPrompts.of(toy, PROMPTS)
    keep = torch.zeros(len(PROMPTS), T, dtype=torch.bool)
    keep[:, 2] = True
    short, index = _rollout(toy, keep, 2, 2.5), encoded.index(PROMPTS, torch.device("cpu"))

    def guess(x: Tensor, step: int) -> Tensor:
        t = schedule.timesteps[step].expand(len(x))
        plain = {name: value.expand(len(x), *value.shape[1:]) for name, value in encoded.negative.items()}
        with torch.no_grad():
            some = toy.predict(x, t, {name: value[index] for name, value in encoded.condition.items()})
            none = toy.predict(x, t, plain)
        return schedule.x0_coef[step, 0] * x + schedule.x0_coef[step, 1] * (none + 2.5 * (some - none))

    want = _solve(schedule, 3, 0.4, short.latents[:, 3], guess)
    torch.testing.assert_close(short.latents[:, T], want.to(short.latents), rtol=1e-5, atol=1e-5)


def test_steps_that_are_known_too_late_are_refused_with_what_to_change(make_toy: Callable):
    engine = _engine(make_toy(), AdaScope(), tail_share=1.0, update="one_pass")
    with pytest.raises(ValueError, match=r"selector\.mask_source = 'previous'"):
        engine.step(EncodedPrompts.of(engine.backbone, PROMPTS), PROMPTS, iteration=0, seed=1)


def test_adascope_samples_in_full_when_it_senses_and_short_in_between(make_toy: Callable):
    engine = _engine(
        make_toy(), AdaScope(latest_end=0.5, sensor=LatentSensor(every=2), mask_source="previous"), tail_share=0.4
    )
    encoded = EncodedPrompts.of(engine.backbone, PROMPTS)
    first, second, third = (engine.step(encoded, PROMPTS, iteration=number, seed=number).values for number in range(3))
    assert first["forwards_sampled"] == third["forwards_sampled"] == len(PROMPTS) * T
    assert second["forwards_sampled"] < len(PROMPTS) * T
    assert "curves" in third["selector"]
    assert "curves" not in second["selector"]
    assert EveryStep().senses(0) is False
