"""Acceleration changes time and memory, never a result beyond rounding; batches shrink where memory runs out."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from adascope_fast import backbones
from adascope_fast.algorithms.policy_gradient import Pairs, ddpo
from adascope_fast.engine.acceleration import accelerate, halving
from adascope_fast.engine.engine import Engine
from adascope_fast.engine.settings import Acceleration, Updates
from adascope_fast.rollout import EncodedPrompts, OwnNoise, rollout
from adascope_fast.selectors.simple import StaticRange
from adascope_fast.training import checkpoint

SCENES = ["a small red circle on a grey background", "two large blue crosses on a black background"] * 2
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    yield
    torch.compiler.reset()


def _step(model: Any, update: str = "replay", **changes: Any) -> tuple[Tensor, dict[str, Any]]:
    """What one iteration does to the parameters, and its values."""
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.02)
    before = [parameter.detach().clone() for parameter in model.trainable_parameters()]
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1.0)
    settings: dict[str, Any] = {"rollout_batch": 4, "microbatch": 4, "max_grad_norm": 1e9, "update": update}
    schedule = model.schedule(4)
    engine = Engine(
        model, schedule, ddpo(), StaticRange(start=1, end=3), lambda images, _: images.mean((1, 2, 3)), optimizer,
        Updates(**{**settings, **changes}),
    )  # fmt: skip
    values = engine.step(EncodedPrompts.of(model, SCENES), SCENES, iteration=0, seed=1).values
    after = model.trainable_parameters()
    return torch.cat([(a - b).flatten() for a, b in zip(before, after, strict=True)]), values


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated"
)  # dynamo's own
@pytest.mark.parametrize(
    ("name", "update"),
    [
        ("scenes", "replay"),
        ("scenes-flow", "one_pass"),
        pytest.param("scenes", "one_pass", marks=pytest.mark.slow),
        pytest.param("scenes-flow", "replay", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_denoiser_has_the_same_gradient(name: str, update: str):
    plain, compiled = (backbones.load(name, lora_rank=2) for _ in range(2))
    done = accelerate(compiled.denoiser, Acceleration(compile="regional", compile_backend="aot_eager"), CPU)
    assert done["compile"].startswith("regional: ")
    torch._dynamo.utils.counters.clear()
    want, got = _step(plain, update)[0], _step(compiled, update)[0]
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_inductors_gradient_is_the_same():
    plain, compiled = (backbones.load("scenes", lora_rank=2) for _ in range(2))
    accelerate(compiled.denoiser, Acceleration(compile="regional"), CPU)
    want, got = _step(plain)[0], _step(compiled)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


def test_channels_last_has_the_same_gradient():
    plain, other = (backbones.load("scenes", lora_rank=2) for _ in range(2))
    done = accelerate(other.denoiser, Acceleration(), CPU, decoder=other.vae)
    assert done["channels_last"] == "on: UNet2DConditionModel, AutoencoderKL"
    for convolution in (other.denoiser.conv_in, other.vae.decoder.conv_in):
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    want, got = _step(plain)[0], _step(other)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


def test_moments_that_are_loaded_lie_in_memory_as_their_parameters_do():
    """A fused optimiser pairs a parameter with its moments by their place in memory, and files have no layout."""

    def made() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        start = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
        weight = torch.nn.Parameter(start.to(memory_format=torch.channels_last))
        return weight, torch.optim.AdamW([weight], lr=0.1, fused=True)

    def step(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, seed: int) -> None:
        gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        weight.grad = gradient.to(memory_format=torch.channels_last)
        optimizer.step()

    (whole, optimizer), (resumed, other) = made(), made()
    step(whole, optimizer, 2)
    filed = {
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in checkpoint.optimizer_tensors(optimizer).items()
    }
    checkpoint.load_optimizer_tensors(other, filed)
    with torch.no_grad():
        resumed.copy_(whole)
    for weight, its in ((whole, optimizer), (resumed, other)):
        step(weight, its, 3)
    assert torch.equal(resumed, whole)


def test_a_transformer_keeps_its_layout():
    """Its one convolution cuts patches, which do not overlap."""
    flow = backbones.load("scenes-flow", lora_rank=2)
    assert accelerate(flow.denoiser, Acceleration(), CPU)["channels_last"] == "off: pays for convolutions"
    assert flow.denoiser.pos_embed.proj.weight.is_contiguous()


def test_what_does_not_pay_here_stays_off_and_says_why(make_toy: Callable):
    toy = make_toy()
    done = accelerate(toy.denoiser, Acceleration(), CPU)
    assert done["compile"] == "off: takes minutes on a CPU"
    assert done["channels_last"].startswith("off: ")
    assert Acceleration().is_fused
    assert not Acceleration(fused_optimizer="off").is_fused
    with pytest.raises(ValueError, match=r"got Sequential; set acceleration\.compile = 'full' or 'off'"):
        accelerate(toy.denoiser, Acceleration(compile="regional"), CPU)
    assert done["cuda_graphs"] == "off: needs a GPU"
    assert accelerate(toy.denoiser, Acceleration(compile="off"), torch.device("cuda"))["cuda_graphs"].startswith(
        "off: "
    )
    with pytest.raises(
        ValueError, match=r'acceleration\.cuda_graphs = "on" needs a CUDA device, got \'cpu\'; set it to'
    ):
        accelerate(toy.denoiser, Acceleration(cuda_graphs="on"), CPU)


def test_batches_are_halved_until_they_fit():
    tried = []

    def attempt(size: int) -> str:
        tried.append(size)
        if size > 2:
            raise torch.OutOfMemoryError("full")
        return "done"

    assert halving(attempt, 11, "train.microbatch") == ("done", 2)
    assert tried == [11, 6, 3, 2]
    with pytest.raises(torch.OutOfMemoryError, match=r"even with train\.microbatch = 1; set model\.gradient_check"):
        halving(lambda size: attempt(5), 3, "train.microbatch")


@pytest.mark.parametrize("update", ["replay", "one_pass"])
def test_running_out_of_memory_does_not_change_the_gradient(make_toy: Callable, update: str):
    """Some rows are differentiated already when a later microbatch does not fit."""
    want, _ = _step(make_toy(torch.float64), update)
    toy = make_toy(torch.float64)
    predict, calls = toy.predict, []

    def scarce(sample: Tensor, *rest: Tensor) -> Tensor:
        calls.append(len(sample))
        if torch.is_grad_enabled() and len(sample) > 2 and len(calls) > 5:
            raise torch.OutOfMemoryError("full")
        return predict(sample, *rest)

    toy.predict = scarce
    got, values = _step(toy, update, rollout_batch=4)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
    if update == "replay":
        assert values["microbatch"] == 2


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_not_finite_is_skipped_with_its_momentum(make_toy: Callable, fused: bool):
    """The fused optimiser skips on the device; the moments of the skipped step must not count either."""

    def parameters_after(worths: list[float]) -> tuple[Tensor, list[int]]:
        toy, skipped = make_toy(), []
        optimizer = torch.optim.AdamW(toy.trainable_parameters(), lr=0.1, fused=fused)
        schedule = toy.schedule(4)
        settings = Updates(rollout_batch=4)
        engine = Engine(
            toy, schedule, ddpo(), StaticRange(start=0, end=3), lambda *_: torch.ones(2), optimizer, settings
        )
        encoded = EncodedPrompts.of(toy, ["a", "bb"])
        for worth in worths:
            generator = torch.Generator().manual_seed(1)
            sampler = {"guidance_scale": 1.0, "noise": OwnNoise(1), "batch": 4}
            trajectory = rollout(toy, schedule, encoded, ["a", "bb"], **sampler)
            pairs = trajectory.pairs(torch.ones(2, 4, dtype=torch.bool))
            rows = Pairs(trajectory, pairs, torch.tensor([worth, -worth])[pairs[:, 0]], None)
            values = engine.update(engine.policy(encoded, schedule), rows, 4, generator)
            skipped.append(values["updates_skipped"])
        return torch.cat([parameter.detach().flatten() for parameter in toy.trainable_parameters()]), skipped

    got, skipped = parameters_after([1.0, math.nan, 1.0])
    want, _ = parameters_after([1.0, 1.0])
    assert skipped == [0, 1, 0]
    assert torch.equal(got, want)
