"""Every family against plain diffusers: pictures, log-probabilities, adapters, full fine-tuning."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from graph_emulation import Emulation
from torch import Tensor

from adascope_fast import backbones, ops
from adascope_fast.algorithms.policy_gradient import ddpo
from adascope_fast.backbone import Ema, take
from adascope_fast.backbones import flux
from adascope_fast.engine.engine import Engine
from adascope_fast.engine.graphs import GradientBuffers, Graphs
from adascope_fast.engine.per_sample import PerSampleGradients
from adascope_fast.engine.settings import Updates
from adascope_fast.rollout import EncodedPrompts, OwnNoise, rollout
from adascope_fast.schedules.settings import Sampler
from adascope_fast.selectors.simple import EveryStep
from adascope_fast.training.draw import draw, initial_latents

# numpy 2 on the part of diffusers' Euler scheduler.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FAMILIES = ["sd", "sd-v", "sdxl", "sd3", "sd35", "flux"]
CAPTIONS = ["a red circle on a grey background", "a blue cross"]
STEPS = 3
T5_TOKENS = 6


def _load(folder: Path, **options: Any) -> Any:
    if folder.name in ("sd3", "sd35", "flux"):
        options.setdefault("max_sequence_length", T5_TOKENS)
    if folder.name == "flux":
        options.setdefault("resolution", 16)
        options.setdefault("embedded_guidance", 2.5)
    adapter = {} if options.get("train") == "full" else {"lora_rank": 2}
    return backbones.load(str(folder), **adapter, **options)


def _plain(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _draw_plain(pipeline: Any, family: str, latents: Tensor, guidance_scale: float, output: str) -> Tensor:
    """`CAPTIONS`, as anyone would draw them."""
    options: dict[str, Any] = dict(num_inference_steps=STEPS, guidance_scale=guidance_scale, output_type=output)
    if family in ("sd3", "sd35", "flux"):
        options["max_sequence_length"] = T5_TOKENS
    if family == "flux":
        options |= dict(guidance_scale=2.5, true_cfg_scale=guidance_scale, height=16, width=16)
        options["negative_prompt"] = ["", ""] if guidance_scale > 1 else None
        latents = flux.pack(latents)
    images = pipeline(CAPTIONS, latents=latents.clone(), **options).images
    return flux.unpack(images, 8, 8) if family == "flux" and output == "latent" else images


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str, tiny: Callable[[str], Path]) -> Any:
    return _load(tiny(family))


@pytest.fixture(scope="module")
def plain(family: str, tiny: Callable[[str], Path]) -> Any:
    return _plain(tiny(family))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_without_noise_the_latents_are_plain_diffusers_own(model, plain, family: str, guidance_scale: float):
    initial = initial_latents(model, [1, 2])
    trajectory = rollout(
        model,
        model.deterministic_schedule(STEPS),
        EncodedPrompts.of(model, CAPTIONS),
        CAPTIONS,
        guidance_scale=guidance_scale,
        noise=OwnNoise(0),
        batch=2,
        initial=initial,
    )
    theirs = _draw_plain(plain, family, initial, guidance_scale, "latent")
    ours = trajectory.latents[:, -1]
    assert (ours - initial).abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_pictures_are_plain_diffusers_own(model, plain, family: str):
    (ours,) = draw(model, CAPTIONS[:1], [5], num_steps=STEPS, guidance_scale=2.0)
    theirs = _draw_plain(plain, family, initial_latents(model, [5, 6]), 2.0, "pt")
    torch.testing.assert_close(ours, theirs[0], rtol=0, atol=1e-4)
    assert ours.std() > 0.01


def test_the_prompt_and_its_absence_matter(model):
    condition = model.encode([*CAPTIONS, ""])
    latents, timestep = initial_latents(model, [1]).expand(3, -1, -1, -1), torch.full((3,), 500.0)
    first, second, none = model.predict(latents, timestep, condition).detach()
    assert (first - second).abs().max() > 1e-4
    assert (first - none).abs().max() > 1e-4


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_log_prob_of_the_rollout_is_the_replays_exactly(model, guidance_scale: float):
    schedule = model.schedule(STEPS)
    encoded = EncodedPrompts.of(model, CAPTIONS)
    trajectory = rollout(model, schedule, encoded, CAPTIONS, guidance_scale=guidance_scale, noise=OwnNoise(3), batch=2)
    optimizer = torch.optim.SGD(model.trainable_parameters())
    engine = Engine(
        model, schedule, ddpo(), EveryStep(), lambda images, prompts: images, optimizer,
        Updates(rollout_batch=2, microbatch=2), sampler=Sampler(guidance_scale=guidance_scale),
    )  # fmt: skip
    assert schedule.trainable.all()
    policy = engine.policy(encoded, schedule)
    for step in range(STEPS):
        pairs = trajectory.gather(torch.tensor([[0, step], [1, step]]))
        output, without = policy.outputs(pairs.sample, pairs.timestep, pairs.prompt_index)
        replayed = ops.guided_transition_log_prob(
            pairs.sample, output, without, guidance_scale, pairs.prev_sample, pairs.coef
        )
        assert torch.equal(replayed, trajectory.log_prob[:, step])
        policy.backward(list(torch.autograd.grad(replayed.sum(), policy.leaves())))
        policy.clear()
        gradients = [parameter.grad for parameter in model.trainable_parameters()]
        assert any(gradient.abs().max() > 0 for gradient in gradients)
        optimizer.zero_grad()


def _train(model: Any, num_steps: int = 2) -> None:
    """A few gradient steps on anything that depends on the output."""
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=20.0)
    condition, latents = model.encode(CAPTIONS), initial_latents(model, [1, 2])
    for _ in range(num_steps):
        model.predict(latents, torch.full((2,), 500.0), condition).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.trainable_parameters(), 0.02)
        optimizer.step()
        optimizer.zero_grad()


def test_an_adapter_changes_the_picture_identically_in_plain_diffusers(family: str, tiny, tmp_path: Path):
    model, pipeline = _load(tiny(family), lora_alpha=6), _plain(tiny(family))
    latents = initial_latents(model, [1, 2])
    base = _draw_plain(pipeline, family, latents, 1.0, "pt")
    _train(model)
    model.save_adapter(tmp_path)
    pipeline.load_lora_weights(tmp_path)
    trained = _draw_plain(pipeline, family, latents, 1.0, "pt")
    ours = torch.stack([draw(model, [text], [seed], num_steps=STEPS, guidance_scale=1.0)[0]
                        for text, seed in zip(CAPTIONS, (1, 2), strict=True)])  # fmt: skip
    torch.testing.assert_close(ours, trained, rtol=0, atol=1e-4)
    assert (trained - base).abs().amax((1, 2, 3)).min() > 1e-3, "training changed every picture"
    with model.reference_policy():
        untrained = draw(model, CAPTIONS[:1], [1], num_steps=STEPS, guidance_scale=1.0)
    torch.testing.assert_close(untrained, base[:1], rtol=0, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_the_default_targets_are_layers_of_the_real_model(model, family: str):
    adapted = {name.split(".lora_A")[0] for name in model.adapter_tensors() if ".lora_A" in name}
    for target in model.default_targets:
        assert any(name.endswith(target) for name in adapted), target
    assert all(any(name.endswith(target) for target in model.default_targets) for name in adapted)


def test_an_adapter_that_is_not_whole_is_refused(tiny):
    model = _load(tiny("sd"))
    tensors = model.adapter_tensors()
    name = sorted(tensors)[0]
    with pytest.raises(ValueError, match=f"of {name} it has nothing, not .*, model.lora_rank and model.lora_targets"):
        model.load_adapter_tensors({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ValueError, match=r"of zebra it has \[2\], not nothing"):
        model.load_adapter_tensors(tensors | {"zebra": torch.zeros(2)})


def test_full_fine_tuning_round_trips(family: str, tiny, tmp_path: Path):
    model = _load(tiny(family), train="full", keep_reference=True)
    assert sum(p.numel() for p in model.trainable_parameters()) == sum(p.numel() for p in model.denoiser.parameters())
    condition, latents, t = model.encode(CAPTIONS), initial_latents(model, [1, 2]), torch.full((2,), 300.0)
    with torch.no_grad():
        before = model.predict(latents, t, condition)
        torch.enable_grad()(_train)(model)
        after = model.predict(latents, t, condition)
        assert (after - before).abs().max() > 1e-3
        with model.reference_policy():
            assert torch.equal(model.predict(latents, t, condition), before)
        with torch.enable_grad(), model.reference_policy():
            assert not model.predict(latents, t, condition).requires_grad
        assert torch.equal(model.predict(latents, t, condition), after)
        other = _load(tiny(family), train="full")
        other.load_adapter_tensors(model.adapter_tensors())
        assert torch.equal(other.predict(latents, t, condition), after)
        with pytest.raises(ValueError, match="keep_reference=True"), other.reference_policy():
            pass
        model.save_adapter(tmp_path)
        saved = type(model.denoiser).from_pretrained(tmp_path / model.denoiser_name)
        assert all(torch.equal(value, saved.state_dict()[key]) for key, value in model.adapter_tensors().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_float32_over_low_precision_weights(family: str, tiny, dtype: torch.dtype):
    model = _load(tiny(family), dtype=dtype)
    assert {parameter.dtype for parameter in model.trainable_parameters()} == {torch.float32}
    assert {p.dtype for p in model.denoiser.parameters() if not p.requires_grad} == {dtype}
    assert {value.dtype for value in model.encode(CAPTIONS).values()} == {dtype}
    assert draw(model, CAPTIONS[:1], [1], num_steps=2, guidance_scale=1.0).dtype == torch.float32


def test_encoders_and_decoder_are_frozen_in_low_precision_whatever_is_trained(family: str, tiny):
    model = _load(tiny(family), train="full", dtype="bfloat16")
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.float32}
    frozen = [p for part in (*model._text_encoders(), model.vae) for p in part.parameters()]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert not any(p.requires_grad for p in frozen)
    assert len(model._text_encoders()) == {"sd": 1, "sdxl": 2, "sd3": 3, "sd35": 3, "flux": 2}[family.split("-")[0]]


@pytest.mark.parametrize(("family", "size"), [("sd", 1e-7), ("sdxl", 1e-7), ("sd35", 1e-7), ("flux", 1e-7)])
def test_small_gradients_survive_float16(family: str, size: float, tiny):
    """d log_prob / d output is that small: it is divided by the latent's elements and the pairs of an update."""
    gradients = []
    for dtype in (torch.float32, torch.float16):
        model = _load(tiny(family), dtype=dtype)
        parameters, generator = model.trainable_parameters(), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        output = model.predict(initial_latents(model, [1, 2]), torch.full((2,), 500.0), model.encode(CAPTIONS))
        output.backward(size * torch.randn(output.shape, generator=generator))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]) / size)
    want, got = gradients
    assert torch.cosine_similarity(got, want, 0) > 0.99
    assert got.norm() / want.norm() == pytest.approx(1, abs=0.05)


def _small_gradient(model: Any, size: float, context: AbstractContextManager[Any]) -> Tensor:
    """In the trained weights of one that enters the denoiser at `size`, over it."""
    parameters, generator = model.trainable_parameters(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    with context:
        output = model.predict(initial_latents(model, [1, 2]), torch.full((2,), 500.0), model.encode(CAPTIONS))
    output.backward(size * torch.randn(output.shape, generator=generator).to(output.dtype))
    return torch.cat([parameter.grad.flatten() for parameter in parameters]) / size


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("family", ["sd", "sd35"])
def test_small_gradients_survive_float16_autocast(family: str, train: str, tiny):
    """And without the scale they do not: what the test would miss is lost there."""
    scaled, plain, wanted = (_load(tiny(family), train=train) for _ in range(3))
    scaled.scale_gradients()
    want = _small_gradient(wanted, 1e-7, nullcontext())
    got = _small_gradient(scaled, 1e-7, torch.autocast("cpu", torch.float16))
    assert torch.cosine_similarity(got, want, 0) > 0.99
    assert got.norm() / want.norm() == pytest.approx(1, abs=0.05)
    lost = _small_gradient(plain, 1e-7, torch.autocast("cpu", torch.float16))
    assert torch.cosine_similarity(lost, want, 0) < 0.9 or lost.norm() / want.norm() < 0.9


def test_small_gradients_of_each_sample_survive_float16_too(tiny):
    gradients = []
    for dtype in (torch.float32, torch.float16):
        model = _load(tiny("sd"), dtype=dtype)
        parameters, generator = model.trainable_parameters(), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        inputs = initial_latents(model, [1, 2]), torch.full((2,), 500.0), model.encode(CAPTIONS)
        with PerSampleGradients(model.denoiser, parameters, 2).leaves(2) as leaves:
            output = model.predict(*inputs)
            found = torch.autograd.grad(output, leaves, 1e-7 * torch.randn(output.shape, generator=generator))
        gradients.append(torch.cat([gradient.flatten(1) for gradient in found], 1) / 1e-7)
    want, got = gradients
    assert torch.cosine_similarity(got, want, 1).min() > 0.99
    torch.testing.assert_close(got.norm(dim=1), want.norm(dim=1), rtol=0.05, atol=0)


def test_checkpointing_changes_nothing(family: str, tiny):
    gradients = []
    for recompute in (False, True):
        model = _load(tiny(family), gradient_checkpointing=recompute)
        output = model.predict(initial_latents(model, [1, 2]), torch.full((2,), 500.0), model.encode(CAPTIONS))
        output.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.trainable_parameters()])
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_a_graph_of_its_forward_and_backward_passes_has_the_same_gradient(family: str, tiny):
    """By the emulation of CUDA graphs, which refuses what waits for the device or draws random numbers."""
    model, lines = _load(tiny(family), gradient_checkpointing=True), []
    condition, buffers = model.encode(CAPTIONS), GradientBuffers(model.trainable_parameters())

    def work(sample: Tensor, timestep: Tensor, prompt_index: Tensor) -> Tensor:
        output = model.predict(sample, timestep, take(condition, prompt_index))
        output.square().mean().backward()
        return output.detach()

    def made(graphs: Graphs | None) -> list[Tensor]:
        buffers.clear()
        outputs = []
        for seed in range(3):
            inputs = initial_latents(model, [seed, 7]), torch.tensor([900.0, 100.0 * seed]), torch.tensor([1, seed % 2])
            outputs.append((work(*inputs) if graphs is None else graphs("pass", work, *inputs)).clone())
        return [*outputs, *(parameter.grad.clone() for parameter in model.trainable_parameters())]

    want, backend = made(None), Emulation()
    for one, other in zip(made(Graphs(backend, tell=lines.append)), want, strict=True):
        assert torch.equal(one, other)
    assert backend.num_replays == 2, lines


def test_flux_patches_are_diffusers_own():
    latents = torch.randn(2, 4, 6, 8)
    want = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(flux.pack(latents), want)
    assert torch.equal(flux.unpack(want, 6, 8), latents)
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 4, torch.device("cpu"), torch.float32)
    assert torch.equal(flux._patch_positions(3, 4, torch.device("cpu"), torch.float32), ids)


def test_flux_guidance_input_matters(tiny):
    low, high = (_load(tiny("flux"), embedded_guidance=value) for value in (1.0, 5.0))
    inputs = initial_latents(low, [1]), torch.tensor([500.0]), low.encode(CAPTIONS[:1])
    assert (low.predict(*inputs) - high.predict(*inputs)).abs().max() > 1e-4


@pytest.mark.parametrize(("name", "size"), [("sd", 24), ("sdxl", 24), ("sd35", 24), ("flux", 24)])
def test_another_resolution_is_drawn_as_plain_diffusers_draws_it(tiny, name: str, size: int):
    model, pipeline = _load(tiny(name), resolution=size), _plain(tiny(name))
    assert model.latent_shape[1:] == (size // 2, size // 2)
    (ours,) = draw(model, CAPTIONS[:1], [1], num_steps=2, guidance_scale=1.0)
    noise = initial_latents(model, [1])
    options: dict[str, Any] = {"max_sequence_length": T5_TOKENS} if name in ("sd35", "flux") else {}
    if name == "flux":
        noise = flux.pack(noise)
    theirs = pipeline(
        CAPTIONS[0],
        latents=noise,
        height=size,
        width=size,
        num_inference_steps=2,
        guidance_scale=2.5 if name == "flux" else 1.0,
        output_type="pt",
        **options,
    )
    torch.testing.assert_close(ours, theirs.images[0], rtol=0, atol=1e-4)


def test_offloaded_text_encoders_are_moved_in_and_out(tiny):
    model = _load(tiny("sdxl"), offload_text_encoders=True)
    model.to(torch.device("cpu"))
    moves = []
    for encoder in model._text_encoders():
        encoder.to = lambda place: moves.append(str(place))
    condition = model.encode(CAPTIONS)
    model.encode(CAPTIONS)
    model.predict(initial_latents(model, [1, 2]), torch.full((2,), 500.0), condition)
    model.predict(initial_latents(model, [1, 2]), torch.full((2,), 500.0), condition)
    assert moves == ["cpu", "cpu"] * 2, "once in and once out, both encoders"


def test_what_is_not_used_stays_where_it_is(tiny):
    pipeline = _plain(tiny("sd"))
    pipeline.safety_checker = torch.nn.Linear(2, 2)
    model = backbones.load(pipeline)
    model.to(torch.device("meta"))
    places = {name: next(part.parameters()).device.type for name, part in pipeline.components.items()
              if isinstance(part, torch.nn.Module)}  # fmt: skip
    assert places == {"vae": "meta", "text_encoder": "meta", "unet": "meta", "safety_checker": "cpu"}


def test_ema_is_the_average_of_the_weights(tiny):
    model = _load(tiny("sd"))
    parameters = model.trainable_parameters()
    start = [parameter.detach().clone() for parameter in parameters]
    ema = Ema(parameters, 0.9)
    seen = []
    for _ in range(3):
        _train(model, 1)
        seen.append([parameter.detach().clone() for parameter in parameters])
        ema.update()
    want = start
    for number, now in enumerate(seen):
        decay = (1 + number) / (10 + number)
        want = [decay * old + (1 - decay) * new for old, new in zip(want, now, strict=True)]
    with ema.applied():
        for parameter, value in zip(parameters, want, strict=True):
            np.testing.assert_allclose(parameter.detach().numpy(), value.numpy(), rtol=1e-5, atol=1e-7)
    assert all(torch.equal(parameter, last) for parameter, last in zip(parameters, seen[-1], strict=True))
    again = Ema(parameters, 0.9)
    again.load(ema.tensors())
    assert all(torch.equal(value, again.tensors()[key]) for key, value in ema.tensors().items())
