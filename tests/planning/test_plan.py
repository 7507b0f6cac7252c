"""Counts against numbers worked out by hand, published ones, and what the real computation does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from adascope_fast import backbones
from adascope_fast.algorithms.policy_gradient import ddpo
from adascope_fast.backbones import ASSETS
from adascope_fast.config import Config
from adascope_fast.engine.engine import Engine
from adascope_fast.engine.settings import Updates
from adascope_fast.planning.measured import measured_step, measured_table
from adascope_fast.planning.plan import fraction_trained, peak_of, plan, weight_bytes
from adascope_fast.schedules.settings import Sampler
from adascope_fast.selectors.simple import EveryStep
from adascope_fast.settings import OWN, choices_of
from adascope_fast.training.monitoring.flops import Cost, denoiser_cost, measure

PUBLISHED = ASSETS / "published"
CLIP_L, CLIP_H, CLIP_G, T5_XXL, VAE = 123_060_480, 340_387_840, 694_659_840, 4_762_310_656, 83_653_863


def test_operations_and_memory_of_a_layer_by_hand():
    x, weight = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta", requires_grad=True)
    cost = measure(lambda: (x @ weight).relu(), backward=True)
    assert cost.forward_flops == 2 * 3 * 5 * 7
    assert cost.backward_flops == 2 * 3 * 5 * 7  # of the weight; x needs none
    # relu's output (kept) and its gradient, 3 x 7 each; the weight's gradient 5 x 7; the sum and its gradient
    assert cost.peak_bytes == 4 * (21 + 21 + 35 + 1 + 1)
    forward = measure(lambda: (x @ weight).relu(), backward=False)
    assert (forward.backward_flops, forward.peak_bytes) == (0, 4 * (21 + 21))


def test_autocast_keeps_products_in_its_type_and_normalisation_in_float32():
    x, weight = torch.empty(3, 8, device="meta"), torch.empty(8, 8, device="meta", requires_grad=True)
    norm = torch.nn.LayerNorm(8, device="meta").requires_grad_(False)
    linear = torch.nn.functional.linear

    def compute() -> torch.Tensor:
        first = linear(x, weight)
        assert first.dtype == torch.bfloat16
        second = norm(first)
        assert second.dtype == torch.float32
        return linear(second, weight)

    cost = measure(compute, backward=False, autocast=torch.bfloat16)
    # Kept to the end: the weight's cast, once. Alive with the result: 2 x 3 x 8 of the first product, its float32 cast,
    # the normalised rows with their two statistics, these cast, and the second product.
    assert cost.peak_bytes >= 2 * 64 + 4 * 24 + 2 * 24 + 2 * 24
    assert cost.forward_flops == 2 * 2 * 3 * 8 * 8
    plain = measure(lambda: linear(x, weight), backward=False)
    cast = measure(lambda: linear(x, weight), backward=False, autocast=torch.bfloat16)
    assert (plain.peak_bytes, cast.peak_bytes) == (4 * 24, 2 * (24 + 24 + 64))


def test_memory_grows_by_a_part_for_each_sample():
    model = backbones.outline("scenes", train="full")
    for parameter in model.trainable_parameters():
        parameter.grad = torch.empty_like(parameter)
    one, two, many = (denoiser_cost(model, rows, backward=True) for rows in (1, 2, 9))
    assert peak_of([one, two], 9) == pytest.approx(many.peak_bytes, rel=0.01)
    assert peak_of([Cost(0, 0, 10), Cost(0, 0, 14)], 4) == 10 + 3 * 4


def test_attention_costs_what_a_fused_kernel_costs():
    query = torch.empty(2, 3, 100, 8, device="meta", requires_grad=True)
    cost = measure(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query), backward=True)
    product = 2 * 2 * 3 * 100 * 100 * 8
    assert (cost.forward_flops, cost.backward_flops) == (2 * product, 5 * product)
    assert cost.peak_bytes < 2 * 3 * 100 * 100 * 4, "no matrix of scores is kept"


@pytest.mark.parametrize(
    ("name", "denoiser", "others"),
    [
        ("sd15", 859_520_964, {"text_encoder": CLIP_L, "vae": VAE}),
        ("sd21", 865_910_724, {"text_encoder": CLIP_H, "vae": VAE}),
        ("sdxl", 2_567_463_684, {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "vae": VAE}),
        ("sd35-medium", 2_243_171_520, {"text_encoder_3": T5_XXL}),
        ("sd35-large", 8_056_627_520, {"text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL}),
        ("flux-dev", 11_901_408_320, {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL}),
    ],
)
def test_published_models_have_their_published_size(name: str, denoiser: int, others: dict[str, int]):
    backbones.check(str(PUBLISHED / name))
    model = backbones.outline(str(PUBLISHED / name), dtype="bfloat16", lora_rank=1)
    counts = {key: sum(p.numel() for p in part.parameters()) for key, part in model.pipeline.components.items()
              if isinstance(part, torch.nn.Module)}  # fmt: skip
    trained = sum(parameter.numel() for parameter in model.trainable_parameters())
    assert counts[model.denoiser_name] - trained == denoiser
    assert {key: counts[key] for key in others} == others
    side = {"sd15": 512, "sd21": 768}.get(name, 1024)
    assert model.resolution == side
    assert all(parameter.is_meta for parameter in model.denoiser.parameters())
    assert model.schedule(10).num_steps == 10


@pytest.mark.parametrize("name", ["scenes", "scenes-flow"])
def test_operations_of_the_outline_are_those_of_the_real_model(name: str):
    real, outlined = backbones.load(name, lora_rank=2), backbones.outline(name, lora_rank=2)
    condition = {key: value.expand(2, *value.shape[1:]) for key, value in real.encode(["a red circle"]).items()}
    shapes = {key: tuple(value.shape[1:]) for key, value in condition.items()}
    assert outlined.condition_shape() == shapes
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        real.predict(torch.randn(2, *real.latent_shape), torch.full((2,), 500.0), condition)
    assert denoiser_cost(outlined, 2, backward=False).forward_flops == counter.get_total_flops()


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_memory_of_the_outline_is_that_of_the_real_computation(gradient_checkpointing: bool):
    options = {"lora_rank": 2, "gradient_checkpointing": gradient_checkpointing}
    real, outlined = backbones.load("scenes", **options), backbones.outline("scenes", **options)
    condition = {key: value.expand(8, *value.shape[1:]) for key, value in real.encode(["a red circle"]).items()}
    latents, timestep = torch.randn(8, *real.latent_shape), torch.full((8,), 500.0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        real.predict(latents, timestep, condition).sum().backward()
    alive = peak = 0
    profiler: Any = profiled.profiler
    for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert denoiser_cost(outlined, 8, backward=True).peak_bytes == pytest.approx(peak, rel=0.1)


def test_the_share_of_steps_is_known_for_every_selector():
    needed = {
        "random_fraction": {"fraction": 0.3},
        "static_range": {"start": 2, "end": 7},
        "threshold": {"uncertainty_low": 0.02, "uncertainty_high": 0.1},
        OWN: {"name": "my_module:my_selector"},
    }
    shares = {}
    for name in choices_of(Config.model_fields["selector"].annotation):
        shares[name] = fraction_trained(Config.of({"selector": {"name": name} | needed.get(name, {})}))
    assert shares["adascope"] + shares["complement"] == 1
    assert shares["threshold"] == shares[OWN] == 1, "what is not known is taken for every step"
    assert (shares["random_fraction"], shares["static_range"], shares["window"]) == (0.3, 0.25, 0.1)
    assert fraction_trained(Config.load(None, ["selector.name=late_start"])) == 0.8
    assert fraction_trained(Config.load(None, ["algorithm.backfill=full"])) == 1
    assert fraction_trained(Config.load(None, ["algorithm.backfill=sparse"])) == 1 / 20
    awm = ["algorithm.name=awm", "algorithm.num_draws=5", "selector.name=every_step"]
    assert fraction_trained(Config.load(None, awm)) == 0.25, "AWM's noise levels, whatever the selector"
    assert fraction_trained(Config.load(None, [*awm, "sampler.num_steps=5"])) == 1
    nft = ["algorithm.name=diffusion_nft", "selector.name=static_range", "selector.start=2", "selector.end=7"]
    assert fraction_trained(Config.load(None, nft)) == 0.25, "every kept step"
    assert fraction_trained(Config.load(None, [*nft, "algorithm.num_draws=2"])) == 0.1
    assert fraction_trained(Config.load(None, [*nft, "algorithm.num_draws=9"])) == 0.25


def test_what_noised_training_compares_with_is_counted():
    """Outputs with the prompt alone, under guidance too: the policy's, its average's and the reference's."""
    settings = ["sampler.guidance_scale=3.0", "sampler.num_steps=10", "selector.name=static_range", "selector.start=2"]
    nft = [*settings, "selector.end=6", "algorithm.name=diffusion_nft"]
    both, alone = plan(Config.load(None, nft)), plan(Config.load(None, [*nft, "algorithm.kl_weight=0"]))
    row, rows = both.forward_flops, 4 * both.images
    assert both.flops["moving average"] == both.flops["reference policy"] == rows * row
    assert both.flops["update"] == pytest.approx(rows * both.training_flops)
    assert alone.flops["update"] == both.flops["update"]
    assert "reference policy" not in alone.flops
    assert both.flops["rollout"] == 10 * both.images * 2 * row
    average = plan(Config.load(None, [*nft[:-1], "algorithm.name=awm"])).weight_bytes
    without = plan(Config.load(None, [*nft[:-1], "algorithm.name=awm", "algorithm.ema_kl_weight=0"])).weight_bytes
    assert average - without == 4 * both.trained


def test_what_learns_from_a_set_samples_for_the_selector_alone():
    settings = ["sampler.guidance_scale=3.0", "sampler.num_steps=10", "train.prompts_per_iteration=6"]
    settings += ["algorithm.name=diffusion_dpo", "algorithm.preferences=anywhere"]
    result = plan(Config.load(None, [*settings, "sensing.every=3"]))
    assert result.images == 12
    assert result.flops["rollout"] == pytest.approx(2 * 10 * 2 * result.forward_flops), (
        "a picture a prompt, every third"
    )
    assert result.flops["reference policy"] == pytest.approx(12 * result.forward_flops), "one level, without guidance"
    assert "decoding" not in result.flops
    kto = plan(Config.load(None, [*settings, "algorithm.name=diffusion_kto", "selector.name=every_step"]))
    assert (kto.images, "rollout" in kto.flops) == (6, False)
    backward = result.flops["update"] / 12 - result.forward_flops
    assert kto.flops["update"] == pytest.approx(6 * (2 * kto.forward_flops + backward)), "k costs a forward"


def test_the_parts_of_a_plan_add_up():
    settings = ["sampler.guidance_scale=3.0", "sampler.num_steps=10", "selector.name=static_range", "selector.start=2"]
    config = Config.load(None, [*settings, "selector.end=6", "train.microbatch=3"])
    result = plan(config)
    images = config.train.prompts_per_iteration * config.train.samples_per_prompt
    assert result.fraction == 0.4
    assert result.flops["rollout"] == images * 10 * 2 * result.forward_flops
    backward = denoiser_cost(backbones.outline("scenes"), 1, backward=True).backward_flops
    assert result.flops["update"] == pytest.approx(images * 4 * 2 * (result.forward_flops + backward))
    sizes = sorted(result.update_bytes)
    assert 3 in sizes
    assert [result.update_bytes[size] for size in sizes] == sorted(result.update_bytes.values())
    table = result.table(tflops=0.001)
    assert "update" in table
    assert "microbatch 3  <- as configured" in table
    assert "at 0.001 TFLOP/s" in table
    more = plan(Config.load(None, [*settings, "selector.end=6", "algorithm.kl_weight=0.1", "model.train=full"]))
    assert more.flops["reference policy"] == pytest.approx(images * 4 * 2 * more.forward_flops)
    assert more.weight_bytes > result.weight_bytes
    assert more.trained == more.parameters["unet"] == result.parameters["unet"]


def test_one_pass_and_a_folded_adapter_take_what_they_keep():
    settings = ["selector.name=window", "train.rollout_batch=2", "acceleration.fold_adapter=off"]
    replay = plan(Config.load(None, settings))
    one_pass = plan(Config.load(None, [*settings, "train.update=one_pass"]))
    assert one_pass.held_bytes - replay.held_bytes == 4 * replay.images * replay.trained
    assert one_pass.update_bytes[8] - replay.update_bytes[8] == 4 * (replay.images + 8) * replay.trained
    folded = plan(Config.load(None, [*settings[:2], "acceleration.fold_adapter=on"]))
    layers = {name for name in backbones.load("scenes").adapter_tensors() if "lora_A" in name}
    assert folded.rollout_bytes - replay.rollout_bytes >= 4 * 32 * 32 * len(layers)
    assert folded.update_bytes == replay.update_bytes
    autocast = ["train.mixed_precision=bf16", "acceleration.fold_adapter="]
    left_alone, unfolded = (
        plan(Config.load(None, [*settings[:2], autocast[0], autocast[1] + c])) for c in ("on", "off")
    )
    assert left_alone.rollout_bytes == unfolded.rollout_bytes, "autocast would round the adapter away"


@pytest.mark.parametrize(("guidance_scale", "microbatch"), [(1.0, 64), (3.0, 32)])
def test_the_microbatch_of_the_plan_is_the_engines(guidance_scale: float, microbatch: int):
    config = Config.load(None, ["train.rollout_batch=4", f"sampler.guidance_scale={guidance_scale}"])
    assert plan(config).microbatch == microbatch
    settings, sampler = Updates(rollout_batch=4), Sampler(guidance_scale=guidance_scale)
    model: Any = SimpleNamespace(trainable_parameters=list)
    nothing: Any = None
    engine = Engine(model, nothing, ddpo(), EveryStep(), nothing, nothing, settings, sampler=sampler)
    assert engine.microbatch == microbatch


class FakeGauge:
    """A device whose clock and memory are told beforehand; the work is done all the same."""

    device = "cpu"

    def __init__(self, free: float, peak: float, seconds: list[float]) -> None:
        self.free, self.peak, self.told, self.worked = free, peak, seconds, 0

    def free_bytes(self) -> float:
        return self.free

    def reset(self) -> None:
        self.worked = 0

    def peak_bytes(self) -> float:
        assert self.worked, "the peak is of the step"
        return self.peak

    def seconds(self, work: Callable[[], None]) -> float:
        work()
        self.worked += 1
        return self.told.pop(0)


@pytest.mark.parametrize("more", [[], ["model.train=full", "model.ema_decay=0.9", "train.mixed_precision=bf16"]])
def test_a_measured_step_stands_beside_the_plan(more: list[str]):
    settings = ["train.microbatch=2", "train.rollout_batch=4", "sampler.guidance_scale=2.0", "selector.name=every_step"]
    config = Config.load(None, [*settings, "algorithm.kl_weight=0.1", "sampler.num_steps=5", *more])
    planned = plan(config)
    # A training step of 2 pairs takes 0.6 s, an inference step of 4 pictures 0.4 s, decoding a picture 0.05 s.
    gauge = FakeGauge(1e12, planned.update_bytes[2] / 1.25, [0.6, 0.4, 0.05])
    result = measured_step(config, planned, gauge)
    pairs = planned.images * 5
    assert result.deviation == pytest.approx(0.25)
    assert result.seconds["rollout"] == pytest.approx(pairs * 0.1)
    assert result.seconds["reference policy"] == pytest.approx(pairs * 0.1)
    assert result.seconds["update"] == pytest.approx(pairs * 0.3)
    assert result.seconds["decoding"] == pytest.approx(planned.images * 0.05)
    assert result.flops_per_s == pytest.approx(planned.flops["update"] / pairs * 2 / 0.6)
    table = result.table()
    assert "at microbatch 2 (planned" in table
    assert "+25%)" in table
    assert f"  update             {result.seconds['update'] / sum(result.seconds.values()):.0%}, 48 s" in table


def test_a_step_that_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch):
    config = Config.load(None, ["train.device=cpu"])
    planned = plan(config)
    with pytest.raises(ValueError, match=r"it takes .* GiB, and 1\.0 MiB are free"):
        measured_step(config, planned, FakeGauge(2**20, 0, []))
    quantised = Config.load(None, ["model.quantize=nf4"])
    with pytest.raises(ValueError, match="quantised weights are not made from random ones"):
        measured_step(quantised, planned, FakeGauge(1e12, 0, []))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measured_table(config, planned) == "not measured        torch sees no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert measured_table(config, planned).endswith('train.device = "cpu"')
    assert measured_table(quantised, planned).endswith("quantised weights are not made from random ones")


def test_offloaded_text_encoders_of_an_outline_take_no_memory():
    model = backbones.outline("scenes", offload_text_encoders=True, device="cpu", dtype="bfloat16")
    assert {parameter.device.type for parameter in model.denoiser.parameters()} == {"cpu"}
    assert {p.dtype for p in model.denoiser.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(p.is_meta for p in model.pipeline.components["text_encoder"].parameters())
    assert torch.get_default_dtype() == torch.float32


def test_each_selector_has_a_fraction():
    for name, fraction in {"adascope": 0.53, "every_step": 1.0, "window": 0.1, "fast_window": 0.1}.items():
        assert fraction_trained(Config.load(None, [f"selector.name={name}"])) == fraction
    assert fraction_trained(Config.load(None, ["selector.name=random_fraction", "selector.fraction=0.3"])) == 0.3


def test_quantised_and_offloaded_weights_take_less():
    model = backbones.outline("scenes", dtype="bfloat16", lora_rank=4)

    def taken(*overrides: str) -> float:
        return weight_bytes(model, Config.load(None, ["model.dtype=bfloat16", *overrides]))

    encoder = model.pipeline.components["text_encoder"]
    size = sum(value.nbytes for value in [*encoder.parameters(), *encoder.buffers()])
    assert taken() - taken("model.offload_text_encoders=true") == size
    linear = [layer for layer in model.denoiser.modules() if isinstance(layer, torch.nn.Linear)]
    adapters = sum(parameter.numel() for parameter in model.trainable_parameters())
    plain = sum(layer.weight.numel() for layer in linear) - adapters
    assert taken() - taken("model.quantize=int8") == plain
    assert taken() - taken("model.quantize=nf4") == plain * (2 - 4.5 / 8)
    assert taken() - taken("model.ema_decay=0") == 4 * adapters


def test_moments_of_eight_bits_take_a_quarter_where_a_tensor_is_large():
    model = backbones.outline("scenes", train="full")
    sizes = [parameter.numel() for parameter in model.trainable_parameters()]
    large = sum(size for size in sizes if size >= 4096)
    plain, small = (weight_bytes(model, Config.load(None, more)) for more in ([], ["train.optimizer=adamw_8bit"]))
    assert plain - small == large * (8 - 2 - 2 * 4 / 256)
    assert 0 < large < sum(sizes)


def test_a_plan_reads_no_weights(tmp_path: Path):
    folder = tmp_path / "scenes"
    shutil.copytree(ASSETS / "scenes", folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    assert json.loads((folder / "model_index.json").read_text())
    assert plan(Config.load(None, [f"model.name={folder}"])).flops == plan(Config()).flops


def test_the_described_repositories_are_those_that_are_listed():
    described = (PUBLISHED / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in PUBLISHED.iterdir() if path.is_dir()} == set(backbones.PUBLISHED.values())
    for repository, folder in backbones.PUBLISHED.items():
        other = f"`{folder}` was published as {repository}, which was taken down"
        assert f"| `{folder}` | {repository} |" in described or other in described


def test_a_described_repository_is_planned_without_a_network(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a network was asked")

    monkeypatch.setattr("adascope_fast.backbones.sources.hf_hub_download", refuse)
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    result = plan(Config.load(None, [f"model.name={name}", "model.dtype=bfloat16"]))
    assert result.parameters["unet"] == 859_520_964
    note = f"counted by the description of {name} in this package; no network was asked"
    assert result.notes == (note,)
    assert note in result.table()
    with pytest.raises(AssertionError, match="a network was asked"):
        plan(Config.load(None, [f"model.name={name}", "model.revision=fp16"]))


def test_text_encoders_that_are_away_count_while_prompts_are_encoded():
    near, away = (plan(Config.load(None, [f"model.offload_text_encoders={flag}"])) for flag in ("false", "true"))
    assert near.encode_bytes == near.weight_bytes
    assert away.encode_bytes == near.weight_bytes > away.weight_bytes
    assert "encoding" in away.table()
    assert "encoding" not in near.table()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35-medium", "flux-dev"])
def test_published_models_are_planned(name: str):
    result = plan(Config.load(None, [f"model.name={PUBLISHED / name}", "model.dtype=bfloat16"]))
    known = {"sd15": 0.8, "sdxl": 6.77}  # TFLOP a forward; SD1.5's was also counted operator by operator elsewhere
    if name in known:
        assert result.forward_flops / 1e12 == pytest.approx(known[name], rel=0.01)
    assert result.flops["update"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("more", [[], ["model.gradient_checkpointing=true"], ["train.mixed_precision=bf16"]])
def test_memory_of_sd15_is_planned_within_a_tenth(more: list[str]):
    settings = [f"model.name={PUBLISHED / 'sd15'}", "model.dtype=bfloat16", "train.microbatch=4", *more]
    config = Config.load(None, settings)
    assert abs(measured_step(config, plan(config)).deviation) <= 0.1


def test_branches_are_judged_by_forwards_and_decodings_or_by_a_model_of_their_own():
    """Of 10 steps those from 2 on are branched: of 4 candidates each, the last is an image and needs no guess."""
    common = ["model.name=scenes", "sampler.num_steps=10", "sampler.guidance_scale=3.0", "selector.name=every_step"]
    plain = plan(Config.load(None, [*common, "algorithm.name=d3po"]))
    judged = plan(Config.load(None, [*common, "algorithm.name=spo"]))
    decoding = plain.flops["decoding"] / plain.images
    want = 4 * plain.images * (7 * plain.step_flops + 8 * decoding)
    assert judged.flops["candidates"] == pytest.approx(want)
    latents = 4 * plain.images * 2 * 8 * torch.Size(backbones.outline("scenes").latent_shape).numel()
    assert judged.held_bytes - plain.held_bytes == pytest.approx(latents)
    apart = plan(Config.load(None, [*common, "algorithm.name=spo", "algorithm.preference_model=folder"]))
    assert "candidates" not in apart.flops
