"""What only a GPU can show: compiled kernels against float64, exact equalities, graphs, no waiting, and 64-bit offsets.

Needs torch and triton alone, but for whole iterations. The names of the tests name the operation, and `bench/kernels`
reports no figure of an operation whose test fails.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from adascope_fast import ops, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
needs_models = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
RTOL = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(4, 64, 64), (16, 33, 7), (16, 128, 128)]
GUIDANCE = 3.5
CLIP = {"clip_range": 0.05}
Outputs = dict[str, Tensor]


def _data(n: int, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
    generator = torch.Generator("cuda").manual_seed(n)

    def latents() -> Tensor:
        return torch.randn(n, *shape, generator=generator, device="cuda", dtype=dtype)

    def rows(*width: int) -> Tensor:
        return torch.rand(n, *width, generator=generator, device="cuda")

    data = SimpleNamespace(sample=latents(), output=latents(), uncond=latents(), noise=latents(), ref=latents())
    data.prev_x0, data.x0_coef = latents(), rows(2)
    data.coef = torch.tensor([1.01, -0.2, 0.3], device="cuda") + 0.1 * rows(3)
    data.prev_sample, data.log_prob = reference.transition_step(
        data.sample, data.output, data.noise, data.coef, output_uncond=data.uncond, guidance_scale=GUIDANCE
    )
    data.old_log_prob = data.log_prob + 0.2 * (rows() - 0.5)
    data.advantage, data.kl_weight = 2 * rows() - 1, rows()
    return data


def _select(data: SimpleNamespace, change: Callable[[Tensor], Tensor]) -> SimpleNamespace:
    return SimpleNamespace(**{name: change(value) for name, value in vars(data).items()})


def _guidance(data: SimpleNamespace) -> dict[str, Any]:
    return {"output_uncond": data.uncond, "guidance_scale": GUIDANCE}


def _step(provider: Any, data: SimpleNamespace) -> Outputs:
    prev_sample, log_prob = provider.transition_step(data.sample, data.output, data.noise, data.coef, **_guidance(data))
    return {"prev_sample": prev_sample, "log_prob": log_prob}


def _step_with_x0(provider: Any, data: SimpleNamespace) -> Outputs:
    step = provider.transition_step_with_x0(
        data.sample, data.output, data.noise, data.coef, data.x0_coef, prev_x0=data.prev_x0, **_guidance(data)
    )
    return step._asdict()


def _log_prob(provider: Any, data: SimpleNamespace) -> Outputs:
    output, uncond = data.output.detach().requires_grad_(), data.uncond.detach().requires_grad_()
    value = provider.guided_transition_log_prob(data.sample, output, uncond, GUIDANCE, data.prev_sample, data.coef)
    grad, grad_uncond = torch.autograd.grad(value, (output, uncond), data.advantage.to(value.dtype))
    return {"log_prob": value.detach(), "grad": grad, "grad_uncond": grad_uncond}


def _log_prob_grad(provider: Any, data: SimpleNamespace) -> Outputs:
    rows = (data.sample, data.output, data.prev_sample, data.coef, data.advantage)
    grad, grad_uncond = provider.transition_log_prob_grad(*rows, **_guidance(data))
    return {"grad": grad, "grad_uncond": grad_uncond}


def _policy(data: SimpleNamespace, clip: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    rows = (data.prev_sample, data.coef, data.old_log_prob, data.advantage)
    settings = {"clip": clip, "ref_output": data.ref, "kl_weight": data.kl_weight, "guidance_scale": GUIDANCE, **CLIP}
    return rows, settings


def _policy_loss(provider: Any, data: SimpleNamespace, clip: str = "ppo") -> Outputs:
    output, uncond = data.output.detach().requires_grad_(), data.uncond.detach().requires_grad_()
    rows, settings = _policy(data, clip)
    loss, stats = provider.transition_policy_loss(data.sample, output, *rows, output_uncond=uncond, **settings)
    grad, grad_uncond = torch.autograd.grad(loss.sum(), (output, uncond))
    return {**stats, "loss": loss.detach(), "grad": grad, "grad_uncond": grad_uncond}


def _policy_grad(provider: Any, data: SimpleNamespace, clip: str = "dpok") -> Outputs:
    rows, settings = _policy(data, clip)
    loss, stats, grad, grad_uncond = provider.transition_policy_grad(
        data.sample, data.output, *rows, output_uncond=data.uncond, **settings
    )
    return {**stats, "loss": loss, "grad": grad, "grad_uncond": grad_uncond}


def _clipped(provider: Any, data: SimpleNamespace) -> Outputs:
    log_prob = data.log_prob.detach().requires_grad_()
    loss, ratio = provider.clipped_policy_loss(log_prob, data.old_log_prob, data.advantage, **CLIP)
    return {"loss": loss.detach(), "ratio": ratio, "slope": torch.autograd.grad(loss.sum(), log_prob)[0]}


def _kl(provider: Any, data: SimpleNamespace) -> Outputs:
    output = data.output.detach().requires_grad_()
    kl = provider.gaussian_kl(output, data.ref, data.coef)
    return {"kl": kl.detach(), "grad": torch.autograd.grad(kl.sum(), output)[0]}


def _correlation(provider: Any, data: SimpleNamespace) -> Outputs:
    shifted = data.sample + 100 if data.sample.dtype in (torch.float32, torch.float64) else data.sample
    state = torch.zeros(len(shifted), 6, device="cuda", dtype=torch.promote_types(shifted.dtype, torch.float32))
    streamed = reference.correlation_from_state(provider.correlation_update(state, shifted, data.prev_sample))
    channels = {"center": "channel", "num_channels": math.gcd(data.sample.shape[1], 64)}
    return {
        "correlation": provider.correlation(shifted, data.prev_sample, **channels),
        "streamed": streamed,
    }


def _on_policy(provider: Any, data: SimpleNamespace) -> Outputs:
    return _policy_grad(provider, SimpleNamespace(**vars(data) | {"old_log_prob": None}), "ppo")


def _correlations(provider: Any, data: SimpleNamespace) -> Outputs:
    stack = torch.stack([data.prev_sample, data.noise, data.prev_x0], dim=1)
    return {"correlation": provider.correlations(stack, data.sample)}


OPERATIONS: dict[str, Callable[[Any, SimpleNamespace], Outputs]] = {
    "transition_step": _step,
    "transition_step_with_x0": _step_with_x0,
    "transition_log_prob": _log_prob,
    "transition_log_prob_grad": _log_prob_grad,
    "transition_policy_loss": _policy_loss,
    "transition_policy_grad": _policy_grad,
    "transition_policy_grad_on_policy": _on_policy,
    "clipped_policy_loss": _clipped,
    "gaussian_kl": _kl,
    "correlation": _correlation,
    "correlations": _correlations,
}
every_operation = pytest.mark.parametrize("name", OPERATIONS)


def _exact(name: str, data: SimpleNamespace, got: Outputs) -> Outputs:
    """The results from float64; log-probability and correlations of a step are those of what was stored, rounded."""
    double = _select(data, lambda x: x.double())
    want = OPERATIONS[name](reference, double)
    if "prev_sample" in got:
        rows = (double.sample, double.output, double.uncond, GUIDANCE, got["prev_sample"].double(), double.coef)
        want["log_prob"] = reference.guided_transition_log_prob(*rows)
    if "x0" in got:
        want["x0_correlation"] = reference.correlation(got["x0"].double(), double.prev_x0)
        want["sample_correlation"] = reference.correlation(double.sample, got["prev_sample"].double())
    return want


def _assert_equal(got: Outputs, want: Outputs) -> None:
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(
            got[key], want[key], rtol=0, atol=0, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("shape", SHAPES)
@every_operation
def test_value_and_gradient_match_float64(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _check_values(name, _data(5, shape, dtype))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed"])
@every_operation
def test_value_and_gradient_match_float64_as_the_engine_calls(name: str, layout: str) -> None:
    """float32 latents beside bfloat16 outputs; in the mixed layout the outputs alone are channels last."""
    data = _data(5, (16, 33, 7), torch.float32)
    for key, value in vars(data).items():
        if value.dim() == 4:
            is_output = key in ("output", "uncond", "ref")
            value = value.bfloat16() if is_output else value
            is_last = layout == "channels_last" or (layout == "mixed" and is_output)
            setattr(data, key, value.contiguous(memory_format=torch.channels_last) if is_last else value)
    _check_values(name, data)


def _check_values(name: str, data: SimpleNamespace) -> None:
    with ops.strict():
        got = OPERATIONS[name](ops, data)
    for key, exact in _exact(name, data, got).items():
        rtol = RTOL[got[key].dtype] if got[key].dim() > 1 else 2e-5
        atol = rtol * exact.abs().max().item() / (1 if "correlation" in key else 10) + 1e-6
        torch.testing.assert_close(got[key].double(), exact, rtol=rtol, atol=atol, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("shape", SHAPES)
def test_transition_step_and_the_update_agree_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    data = _data(8, shape, dtype)
    for guidance in ({}, _guidance(data)):
        prev_sample, stored = ops.transition_step(data.sample, data.output, data.noise, data.coef, **guidance)
        with_x0 = ops.transition_step_with_x0(
            data.sample, data.output, data.noise, data.coef, data.x0_coef, prev_x0=data.prev_x0, **guidance
        )
        assert torch.equal(with_x0[0], prev_sample)
        rows = (prev_sample, data.coef, stored, data.advantage)
        uncond = guidance.get("output_uncond")
        again = [
            with_x0[1],
            ops.guided_transition_log_prob(data.sample, data.output, uncond, GUIDANCE, prev_sample, data.coef),
            ops.transition_policy_loss(data.sample, data.output, *rows, **CLIP, **guidance)[1]["log_prob"],
            ops.transition_policy_grad(data.sample, data.output, *rows, **CLIP, **guidance)[1]["log_prob"],
        ]
        for log_prob in again:
            assert torch.equal(log_prob, stored)
        stats = ops.transition_policy_loss(data.sample, data.output, *rows, **CLIP, **guidance)[1]
        assert torch.equal(stats["ratio"], torch.ones_like(stored))


@pytest.mark.parametrize("shape", SHAPES)
@every_operation
def test_a_row_does_not_depend_on_its_batch_nor_on_the_run(name: str, shape: tuple[int, ...]) -> None:
    data = _data(64, shape)
    together = OPERATIONS[name](ops, data)
    _assert_equal(OPERATIONS[name](ops, data), together)
    alone = OPERATIONS[name](ops, _select(data, lambda x: x[37:38]))
    _assert_equal(alone, {key: value[37:38] for key, value in together.items()})


@every_operation
def test_replays_from_a_graph_and_never_waits_for_the_device(name: str) -> None:
    data = _data(8, (4, 64, 64))
    want = OPERATIONS[name](ops, data)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        OPERATIONS[name](ops, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = OPERATIONS[name](ops, data)
    for value in got.values():
        value.fill_(math.nan)
    graph.replay()
    _assert_equal(got, want)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["transition_step", "transition_log_prob", "transition_policy_loss", "correlation"])
def test_compiles_with_inductor_without_a_graph_break(name: str) -> None:
    data = _data(8, (4, 64, 64))
    names = {"transition_log_prob": "guided_transition_log_prob"}
    function = names.get(name, name)
    provider = SimpleNamespace(**vars(ops) | {function: torch.compile(getattr(ops, function), fullgraph=True)})
    _assert_equal(OPERATIONS[name](provider, data), OPERATIONS[name](ops, data))


@pytest.mark.parametrize("name", ["transition_step", "transition_log_prob", "transition_policy_grad", "correlation"])
def test_rows_beyond_two_to_the_31_elements(name: str) -> None:
    n, d = 8200, 262144  # 2.1e9 elements, 4.3 GB
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB of memory on the device")
    small = _data(8, (d,))
    latents = {"sample", "output", "uncond", "noise", "prev_sample", "ref"}
    used = {key: value for key, value in vars(small).items() if value.shape[-1] != d or key in latents}
    big = SimpleNamespace(**{key: value.repeat(n // 8, *[1] * (value.dim() - 1)) for key, value in used.items()})
    got = OPERATIONS[name](ops, big)
    want = OPERATIONS[name](ops, small)
    _assert_equal({key: value[-8:] for key, value in got.items()}, want)


@needs_models
def test_a_run_uses_the_gpu_and_starts_on_policy(tmp_path) -> None:
    from adascope_fast.config import Config
    from adascope_fast.training.trainer import Trainer

    config = Config.load("configs/tiny.toml", [f"run.folder={tmp_path / 'run'}", 'train.device="cuda"'])
    trainer = Trainer(config, quiet=True)
    trainer.train()
    assert trainer.backbone.device.type == "cuda"
    assert set(ops.explain("cuda").values()) != {"reference"}


@needs_models
@pytest.mark.parametrize("tail_share", [1.0, 0.4])
@pytest.mark.parametrize("update", ["replay", "one_pass"])
def test_rollout_and_update_never_wait_for_the_device(update: str, tail_share: float) -> None:
    """Once it is known which pairs there are, what they are worth, and which update takes which of them."""
    from adascope_fast import backbones
    from adascope_fast.algorithms.algorithm import Context, Samples
    from adascope_fast.algorithms.policy_gradient import Pairs, ddpo
    from adascope_fast.engine.collection import Collection
    from adascope_fast.engine.engine import Engine
    from adascope_fast.engine.settings import Updates
    from adascope_fast.rollout import EncodedPrompts, OwnNoise, Trajectory
    from adascope_fast.schedules.settings import Sampler
    from adascope_fast.schedules.tail import Tails
    from adascope_fast.selectors.simple import StaticRange

    model = backbones.load("scenes", lora_rank=2)
    model.to(torch.device("cuda"))
    schedule, selector = model.schedule(6), StaticRange(start=1, end=3)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-3, fused=True)
    settings = Updates(rollout_batch=2, update=update)  # type: ignore[arg-type]
    sampler = Sampler(guidance_scale=2.0, tail_share=tail_share)
    score = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    engine = Engine(model, schedule, ddpo(), selector, score, optimizer, settings, sampler=sampler)
    prompts = ["a small red circle on a grey background", "two large blue crosses on a black background"] * 2
    encoded = EncodedPrompts.of(model, prompts)
    engine.step(encoded, prompts, iteration=0, seed=0)  # compiles and allocates
    keep = selector.ahead(prompts, schedule, 1)
    tails = Tails.of(schedule, keep, tail_share) if tail_share < 1 else None
    is_one_pass = update == "one_pass"
    scoring: Any = SimpleNamespace(clear=lambda: None, submit=lambda rows, latents: None)
    pairs, generator = keep.nonzero().cuda(), torch.Generator("cuda").manual_seed(1)
    policy = engine.policy(encoded, schedule)
    collection = Collection(engine, policy, encoded, prompts, schedule, OwnNoise(1), 1)
    collection._deal(len(prompts))
    with _no_waiting():
        trajectory, _ = collection._rollout(prompts, scoring, keep if is_one_pass else None, total=24, tails=tails)
    assert isinstance(trajectory, Trajectory)
    advantages = torch.randn(4, device="cuda")
    if collection.gradients is None:
        is_live = pairs[:, 0] != 3  # the last image's advantage is zero, as of a group that all got the same reward
        rows: Any = Pairs(trajectory, pairs, advantages[pairs[:, 0]] * is_live, is_live)
        planned = engine.planned(rows, generator)
        assert [len(one.rows) for one in planned] == [6]
        with mock.patch.object(engine, "planned", return_value=planned), _no_waiting():
            engine._replay(policy, rows, 6, generator)
    else:
        samples = Samples(trajectory, advantages)
        context = Context(policy, keep.cuda(), generator)
        slopes = engine.algorithm.slopes(samples, context)  # type: ignore[attr-defined]
        told = mock.patch.object(engine.algorithm, "slopes", return_value=slopes)
        with told, mock.patch.object(Trajectory, "pairs", return_value=pairs), _no_waiting():
            engine._apply(collection.gradients, samples, context, schedule, collection.own)


@contextmanager
def _exactly_repeatable() -> Iterator[None]:
    """Convolutions and attention whose backward passes round alike each time."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.backends.cudnn.deterministic = before


def _graphs(lines: list[str]) -> Any:
    from adascope_fast.engine.graphs import CudaBackend, Graphs

    return Graphs(CudaBackend(torch.device("cuda")), tell=lines.append)


def _scenes(name: str = "scenes", **options: Any) -> Any:
    from adascope_fast import backbones

    model = backbones.load(name, **{"lora_rank": 2, **options})
    model.to(torch.device("cuda"))
    return model


CASES: dict[str, dict[str, Any]] = {
    "scenes": {},
    "scenes-flow": {},
    "guided": {"guidance_scale": 2.5},
    "conditional": {"guidance_scale": 2.5, "train_guidance": "conditional"},
    "bf16": {"autocast": lambda: torch.autocast("cuda", dtype=torch.bfloat16)},
    "float16": {},
    "tail": {"tail_share": 0.5},
    "one_pass": {"update": "one_pass", "guidance_scale": 2.0},
}


@needs_models
@pytest.mark.parametrize("case", CASES)
def test_iterations_in_graphs_have_the_bits_of_those_without(case: str) -> None:
    """Trajectories, statistics and weights of three iterations, in all of which shapes are met again."""
    from graph_runs import Run, assert_same

    from adascope_fast.algorithms.policy_gradient import ddpo, grpo

    is_ahead = case in ("tail", "one_pass")
    keys: dict[str, Any] = {"dtype": torch.float16, "gradient_checkpointing": True} if case == "float16" else {}
    options: dict[str, Any] = {"updates_per_iteration": 1 if is_ahead else 2, "microbatch": 3, "folds_adapter": True}

    def run(graphs: Any) -> Any:
        model = _scenes("scenes-flow" if case == "scenes-flow" else "scenes", **keys)
        return Run(model, ddpo() if is_ahead else grpo(kl_weight=0.1), graphs, **options, **CASES[case])

    lines: list[str] = []
    with _exactly_repeatable():
        want, again, graphs = run(None), run(None), _graphs(lines)
        assert_same(again, want)  # else nothing is said of graphs
        assert_same(run(graphs), want)
    assert graphs.num_replays > graphs.num_calls / 2, lines
    assert not any("without" in line for line in lines), lines


@needs_models
def test_a_step_is_one_graph_launch_and_memory_stays() -> None:
    from graph_runs import SCENES, STEPS, Run
    from torch.profiler import ProfilerActivity, profile

    from adascope_fast.algorithms.policy_gradient import ddpo
    from adascope_fast.rollout import EncodedPrompts

    lines: list[str] = []
    graphs = _graphs(lines)
    run = Run(_scenes(), ddpo(), graphs, folds_adapter=True, prompts=SCENES, iterations=3)
    batch = [prompt for prompt in SCENES for _ in range(2)]
    encoded, held, size = EncodedPrompts.of(run.model, batch), [], graphs._backend.num_bytes()
    calls = graphs.num_calls
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run.engine.step(encoded, batch, iteration=3, seed=3)
    counts = {event.key: event.count for event in profiled.key_averages()}
    calls = graphs.num_calls - calls
    assert calls == 2 * STEPS + 3  # 6 images in batches of 4, 12 pairs in microbatches of 4
    assert counts["cudaGraphLaunch"] == calls
    for iteration in range(4, 7):
        run.left.clear()
        run.engine.step(encoded, batch, iteration=iteration, seed=iteration)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[0] == held[-1], held
    assert graphs._backend.num_bytes() == size > 0


def test_what_cannot_be_recorded_leaves_the_device_and_other_graphs_as_they_were() -> None:
    lines: list[str] = []
    graphs, stream = _graphs(lines), torch.cuda.current_stream()
    weight = torch.randn(256, 256, device="cuda")

    def good(x: Tensor) -> Tensor:
        return (x @ weight).relu() @ weight

    def bad(x: Tensor) -> Tensor:
        return good(x) * x.sum().item()

    for seed in range(4):
        x = torch.randn(64, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        assert torch.equal(graphs("good", good, x).clone(), good(x))
        assert torch.equal(graphs("bad", bad, x), bad(x))
        assert torch.cuda.current_stream() == stream
    torch.rand(3, device="cuda")  # the device's own generator was being recorded too
    assert graphs.num_replays == 3
    (line,) = (line for line in lines if "bad" in line)
    assert "cannot be recorded and runs without" in line
    assert "captur" in line


def test_random_numbers_are_those_of_their_generator() -> None:
    """Whether its draws can be recorded, as the default generator's can, or are done without."""
    graphs, generator = _graphs([]), torch.Generator("cuda")

    def noisy(x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=generator, device="cuda")

    x = torch.zeros(5, device="cuda")
    for seed in range(4):
        generator.manual_seed(seed)
        got = graphs("noisy", noisy, x)
        generator.manual_seed(seed)
        assert torch.equal(got, noisy(x))


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Whatever waits for the device within it is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
