"""What a configuration will cost, before a weight is read: parameters, operations, memory, and where the time goes.

Everything is counted on the meta device, from the model's JSON files. Operations are exact for the denoiser and the
decoder, and 2 x parameters x tokens for text encoders. Memory is what tensors take; a GPU's context, its allocator's
rounding and library workspaces come on top. Rewards and evaluations are not counted, nor what `torch.compile` saves.
`planning.measured` measures a step beside it, `planning.verdict` says what fits into a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from adascope_fast import backbones
from adascope_fast.adascope.settings import AdaScope
from adascope_fast.algorithms.settings import DiffusionDpo, DiffusionKto, Noised, Spo
from adascope_fast.backbones import PipelineBackbone
from adascope_fast.backbones.folding import Folding
from adascope_fast.config import Config
from adascope_fast.engine.acceleration import AUTOCAST
from adascope_fast.engine.optimizer import LEAST_8BIT
from adascope_fast.training.monitoring.flops import Cost, denoiser_cost, measure

MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """The cost of a run. Memory is in bytes, each peak with all that is held; `flops` are of one iteration, by part."""

    title: str
    images: int
    parameters: dict[str, int]
    trained: int
    forward_flops: float
    """Of one row: a picture at a step, without guidance."""
    step_flops: float
    """Of a picture at a step, with guidance."""
    training_flops: float
    """Of the same, forward and backward."""
    flops: dict[str, float]
    fraction: float
    weight_bytes: float
    held_bytes: float
    """The weights with all that goes with them, and the trajectory."""
    rollout_bytes: float
    decode_bytes: float
    encode_bytes: float
    """While prompts are encoded, at the beginning: the weights, and text encoders that are away afterwards."""
    update_bytes: dict[int, float]
    microbatch: int
    notes: tuple[str, ...] = ()
    """What to know of the configuration, a line each."""

    @property
    def peak_bytes(self) -> float:
        """The most of the parts of a training, as configured."""
        return max(self.encode_bytes, self.rollout_bytes, self.decode_bytes, self.update_bytes[self.microbatch])

    def table(self, tflops: float | None = None) -> str:
        """Lines for people; `tflops` is what the GPU sustains, for seconds."""
        total = sum(self.flops.values())
        counts = ", ".join(f"{name} {_short(count)}" for name, count in self.parameters.items())
        lines = [
            self.title,
            f"parameters          {counts}; trained {_short(self.trained)}",
            f"one forward         {_amount(self.forward_flops)}FLOP (one picture, one step, no guidance)",
            f"one iteration       {_amount(total)}FLOP, {self.fraction:.0%} of the steps trained; expected split:",
        ]
        for name, flops in self.flops.items():
            seconds = f", {flops / tflops / 1e12:.1f} s" if tflops else ""
            lines.append(f"  {name:17} {flops / total:4.0%}, {_amount(flops)}FLOP{seconds}")
        if tflops:
            lines.append(f"  in all            {total / tflops / 1e12:.1f} s at {tflops:g} TFLOP/s")
        lines.append(f"memory, weights     {in_bytes(self.weight_bytes)} with gradients and optimiser")
        if self.encode_bytes > self.weight_bytes:
            lines.append(f"        encoding    {in_bytes(self.encode_bytes)} with the text encoders")
        lines.append(f"        rollout     {in_bytes(self.rollout_bytes)}")
        lines.append(f"        decoding    {in_bytes(self.decode_bytes)}")
        for size, peak in self.update_bytes.items():
            chosen = "  <- as configured" if size == self.microbatch else ""
            lines.append(f"        update      {in_bytes(peak)} at microbatch {size}{chosen}")
        return "\n".join([*lines, *(f"note                {note}" for note in self.notes)])


def plan(config: Config) -> Plan:
    """The plan of a configuration. ValueError where the model's JSON files cannot be had."""
    return Planner().plan(config)


class Planner:
    """Plans of configurations that have a model in common, of which everything is counted once."""

    def __init__(self) -> None:
        self._counted: dict[str, Counted] = {}

    def plan(self, config: Config) -> Plan:
        """As `plan`."""
        return _plan(config, self._counts(config))

    def weight_bytes(self, config: Config) -> float:
        """The least that it takes, without counting a forward."""
        return weight_bytes(self._counts(config).backbone, config)

    def _counts(self, config: Config) -> "Counted":
        has_reference = bool(getattr(config.algorithm, "needs_reference", False))
        autocast = AUTOCAST[config.train.mixed_precision]
        # Neither changes what is counted: quantised weights are not made, and text encoders are always near.
        options: dict[str, Any] = config.model.options() | {"offload_text_encoders": False, "quantize": "none"}
        key = f"{config.model.name!r} {options} {has_reference} {autocast}"
        if key not in self._counted:
            backbone = backbones.outline(config.model.name, **options, keep_reference=has_reference)
            self._counted[key] = Counted(backbone, autocast)
        return self._counted[key]


class Counted:
    """A model's outline, and what is counted of it once it is asked for; costs are of 1 and of 2 rows."""

    def __init__(self, backbone: PipelineBackbone, autocast: torch.dtype | None) -> None:
        self.backbone, self._autocast = backbone, autocast
        for parameter in backbone.trainable_parameters():
            parameter.grad = torch.empty_like(parameter)  # gradients live from one microbatch to the next

    @cached_property
    def inference(self) -> list[Cost]:
        """Of the denoiser's forward."""
        return self._costs(backward=False)

    @cached_property
    def training(self) -> list[Cost]:
        """Of the denoiser's forward and backward."""
        return self._costs(backward=True)

    @cached_property
    def decode(self) -> Cost:
        """Of decoding an image."""
        latents = torch.empty(1, *self.backbone.latent_shape, device="meta")
        return measure(lambda: self.backbone.decode(latents), backward=False)

    def _costs(self, *, backward: bool) -> list[Cost]:
        return [denoiser_cost(self.backbone, rows, backward=backward, autocast=self._autocast) for rows in (1, 2)]


def _plan(config: Config, counted: Counted) -> Plan:
    train, steps, backbone = config.train, config.sampler.num_steps, counted.backbone
    has_reference = bool(getattr(config.algorithm, "needs_reference", False))
    has_average = bool(getattr(config.algorithm, "has_average", False))
    prompts = train.prompts_per_iteration
    images_of_a_record = getattr(config.algorithm, "images_of_a_record", None)
    is_offline = images_of_a_record is not None
    images = prompts * (images_of_a_record or train.samples_per_prompt)
    sampled = prompts * _share_sensed(config) if is_offline else images
    guided = 1 if config.sampler.guidance_scale == 1 else 2
    fraction = fraction_trained(config)
    inference, training, decode = counted.inference, counted.training, counted.decode
    decoded = min(images, train.rollout_batch, backbone.num_decoded_at_once())
    inference_flops, backward_flops = inference[0].forward_flops, training[0].backward_flops
    once = guided * inference_flops
    pairs = fraction * images * steps
    # Those that noise images anew train the conditional output alone.
    trained_rows = 1 if is_offline or isinstance(config.algorithm, Noised) else guided
    forward, backward = trained_rows * inference_flops, trained_rows * backward_flops
    forwards = 2 if isinstance(config.algorithm, DiffusionKto) else 1  # k is known before the loss
    flops = {
        "rollout": sampled * steps * once,
        "update": pairs * (backward if train.update == "one_pass" else forwards * forward + backward),
        "reference policy": pairs * forward if has_reference else 0.0,
        "moving average": pairs * forward if has_average else 0.0,
        "decoding": 0.0 if is_offline else images * decode.forward_flops,
        "text": (prompts + 1) * _text_flops(backbone),
    }
    branched = 0  # steps, at most: a selector that knows its own beforehand has no others branched
    if isinstance(config.algorithm, Spo):
        branched = steps - config.algorithm.first_step(steps)
        judged = images * config.algorithm.num_candidates * (config.algorithm.preference_model == "reward")
        flops["candidates"] = judged * ((branched - 1) * once + branched * decode.forward_flops)
    weights = weight_bytes(backbone, config)
    latents = 4.0 * images * (2 * steps + 1 + 2 * branched) * torch.Size(backbone.latent_shape).numel()
    trained = sum(parameter.numel() for parameter in backbone.trainable_parameters())
    is_one_pass = train.update == "one_pass"
    held = weights + latents + 4.0 * images * trained * is_one_pass  # its gradients are kept sample by sample
    microbatch = train.usual_microbatch(config.sampler.guidance_scale)

    def update_peak(size: int) -> float:
        return held + peak_of(training, trained_rows * size) + 4.0 * size * trained * is_one_pass

    return Plan(
        title=f"{config.model.name}: {type(backbone).__name__}, {backbone.resolution} pixels, "
        f"{images} pictures x {steps} steps, guidance {config.sampler.guidance_scale:g}",
        images=images,
        parameters=_parameters(backbone),
        trained=trained,
        forward_flops=inference_flops,
        step_flops=once,
        training_flops=forward + backward,
        flops={name: value for name, value in flops.items() if value},
        fraction=fraction,
        weight_bytes=weights,
        held_bytes=held,
        rollout_bytes=held + peak_of(inference, guided * min(train.rollout_batch, images)) + _folded(backbone, config),
        decode_bytes=held + decoded * decode.peak_bytes,
        encode_bytes=weights + (_encoder_bytes(backbone) if config.model.offload_text_encoders else 0.0),
        update_bytes={size: update_peak(size) for size in sorted({*MICROBATCHES, microbatch})},
        microbatch=microbatch,
        notes=tuple(_notes(config, backbone)),
    )


def _notes(config: Config, backbone: PipelineBackbone) -> Iterator[str]:
    if backbones.is_described(config.model.name, revision=config.model.revision, base=config.model.base):
        yield f"counted by the description of {config.model.name} in this package; no network was asked"
    scale = config.sampler.guidance_scale
    if scale != 1 and "embedded_guidance" in backbone.own_options:
        yield (
            f"sampler.guidance_scale = {scale:g} is a second forward at every step, beside the guidance that the model "
            f"takes as an input at no cost (model.embedded_guidance); sampler.guidance_scale=1.0 halves the forwards"
        )


def fraction_trained(config: Config) -> float:
    """Share of the (image, step) pairs that a plan takes to be trained: the selector's, as the algorithm credits it.

    A selector of your own counts as every step. AWM and DiffusionNFT train `num_draws` noise levels of each image, and
    so does what learns from a set, whatever the selector keeps.
    """
    algorithm, steps = config.algorithm, config.sampler.num_steps
    if isinstance(algorithm, DiffusionDpo | DiffusionKto):
        return min(1.0, algorithm.num_draws / steps)
    backfill = getattr(algorithm, "backfill", "interval")
    if backfill != "interval":
        return 1.0 if backfill == "full" else 1 / steps
    share = getattr(config.selector, "share", None)
    most = getattr(algorithm, "num_draws", None) or steps
    return min(1.0, most / steps, 1.0 if share is None else share(steps))


def _share_sensed(config: Config) -> float:
    """Rollouts that are made for AdaScope to see, for each record of an iteration that learns from a set."""
    if config.sensing is None or not isinstance(config.selector, AdaScope) or not config.selector.is_sensed:
        return 0.0
    return 1 / config.sensing.every


def peak_of(costs: list[Cost], rows: int) -> float:
    """Peak bytes with `rows` samples, from those with 1 and 2: a part that is the same for any, a part for each."""
    one, two = (cost.peak_bytes for cost in costs)
    return one + (rows - 1) * (two - one)


def _modules(backbone: PipelineBackbone) -> dict[str, nn.Module]:
    parts: dict[str, Any] = backbone.pipeline.components
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def _parameters(backbone: PipelineBackbone) -> dict[str, int]:
    """Of every component; an adapter is not the denoiser's."""
    counts = {}
    for name, module in _modules(backbone).items():
        counts[name] = sum(value.numel() for key, value in module.named_parameters() if ".lora_" not in key)
    return counts


def weight_bytes(backbone: PipelineBackbone, config: Config) -> float:
    """Frozen weights as stored, trained ones with gradient, two moments and what else the configuration keeps."""
    total = sum(map(_stored_bytes, _modules(backbone).values()))
    if config.model.offload_text_encoders:
        total -= _encoder_bytes(backbone)
    trained = sum(parameter.numel() for parameter in backbone.trainable_parameters())
    copies = (
        1
        + bool(config.model.average_decay)
        + bool(getattr(config.algorithm, "has_average", False))
        + (config.model.train == "full" and bool(getattr(config.algorithm, "needs_reference", False)))
    )
    if config.model.quantize != "none":
        total -= _saved_by_quantisation(backbone, config.model.quantize)
    return total + 4.0 * copies * trained + _moment_bytes(backbone, config)


def _moment_bytes(backbone: PipelineBackbone, config: Config) -> float:
    """Of AdamW's two moments: float32, or 8 bits with the scale of each 256 in tensors that bitsandbytes gives them."""
    sizes = [parameter.numel() for parameter in backbone.trainable_parameters()]
    is_8bit = config.train.optimizer == "adamw_8bit"
    return float(sum(size * 2 * (1 + 4 / 256 if is_8bit and size >= LEAST_8BIT else 4) for size in sizes))


def _encoder_bytes(backbone: PipelineBackbone) -> float:
    return sum(_stored_bytes(part) for name, part in _modules(backbone).items() if name.startswith("text_encoder"))


def _stored_bytes(module: nn.Module) -> float:
    return float(sum(value.numel() * value.element_size() for value in [*module.parameters(), *module.buffers()]))


def _saved_by_quantisation(backbone: PipelineBackbone, quantize: str) -> float:
    """Bytes that bitsandbytes spares on linear layers: 4.5 bits a weight with the scales of 64, or 8 bits."""
    bytes_each = {"nf4": 0.5625, "int8": 1.0}[quantize]
    layers = [
        layer
        for name, layer in backbone.denoiser.named_modules()
        if isinstance(layer, nn.Linear) and ".lora_" not in name
    ]
    return sum(layer.weight.numel() * (layer.weight.element_size() - bytes_each) for layer in layers)


def _folded(backbone: PipelineBackbone, config: Config) -> float:
    """Bytes of the float32 weights that the rollout has with the adapter in them, beside those without."""
    if not config.acceleration.folds or config.train.mixed_precision != "no":
        return 0.0
    return float(Folding(backbone.denoiser).num_bytes)


def _text_flops(backbone: PipelineBackbone) -> float:
    """Of encoding one prompt."""
    tokens = backbone.condition_shape()["text"][0]
    total = 0.0
    for name, module in _modules(backbone).items():
        if name.startswith("text_encoder"):
            embedded = sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Embedding))
            total += 2.0 * tokens * (sum(value.numel() for value in module.parameters()) - embedded)
    return total


def _amount(flops: float) -> str:
    for unit, factor in (("P", 1e15), ("T", 1e12)):
        if flops >= 0.1 * factor:
            return f"{flops / factor:.3g} {unit}"
    return f"{flops / 1e9:.3g} G"


def in_bytes(count: float) -> str:
    """For people."""
    return f"{count / GIB:.2f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.1f} MiB"


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
