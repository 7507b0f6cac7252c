"""A plan beside a measured step: random weights of the planned shapes, one forward and one training step, on the GPU.

The weights stand for the real ones in time and memory. What is measured is eager; `torch.compile` takes less of both.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from adascope_fast import backbones
from adascope_fast.backbones import PipelineBackbone
from adascope_fast.config import Config
from adascope_fast.engine.acceleration import autocast_of
from adascope_fast.planning.plan import Plan, in_bytes


class Gauge(Protocol):
    """What is read off the device."""

    device: str

    def free_bytes(self) -> float:
        """Memory that a new process could have."""
        ...

    def reset(self) -> None:
        """Forget the peak."""
        ...

    def peak_bytes(self) -> float:
        """The most memory that tensors took since `reset`."""
        ...

    def seconds(self, work: Callable[[], None]) -> float:
        """Of the work, until the device has done it."""
        ...


class CudaGauge:
    """The current GPU."""

    device = "cuda"

    def free_bytes(self) -> float:
        return float(torch.cuda.mem_get_info()[0])

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> float:
        return float(torch.cuda.max_memory_allocated())

    def seconds(self, work: Callable[[], None]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start


@dataclass(frozen=True)
class Measurement:
    """A plan's peak beside the measured one, in bytes, and seconds of an iteration's parts."""

    microbatch: int
    planned_bytes: float
    peak_bytes: float
    seconds: dict[str, float]
    flops_per_s: float
    """Of the training step."""

    @property
    def deviation(self) -> float:
        """How far the plan is off, as a share of what was measured."""
        return self.planned_bytes / self.peak_bytes - 1

    def table(self) -> str:
        """Lines for people, to follow the plan's."""
        total = sum(self.seconds.values())
        lines = [
            f"measured, a step    {in_bytes(self.peak_bytes)} at microbatch {self.microbatch} (planned "
            f"{in_bytes(self.planned_bytes)}, {self.deviation:+.0%}), {self.flops_per_s / 1e12:.3g} TFLOP/s",
            f"one iteration       {total:.3g} s by that step:",
        ]
        lines += [f"  {name:17} {value / total:4.0%}, {value:.3g} s" for name, value in self.seconds.items()]
        return "\n".join(lines)


def measured_step(config: Config, plan: Plan, gauge: Gauge | None = None) -> Measurement:
    """Run one training step of `config` with random weights, and say what the iteration takes by it.

    Raises:
        ValueError: it cannot be run here, with the reason.
    """
    gauge = gauge or CudaGauge()
    if config.model.quantize != "none":
        raise ValueError("quantised weights are not made from random ones")
    planned = plan.update_bytes[plan.microbatch]
    if planned > gauge.free_bytes():
        raise ValueError(f"it takes {in_bytes(planned)}, and {in_bytes(gauge.free_bytes())} are free")
    gauge.reset()
    backbone = backbones.outline(
        config.model.name,
        **config.model.options(),
        keep_reference=bool(getattr(config.algorithm, "needs_reference", False)),
        device=gauge.device,
    )
    step = _Step(config, backbone, gauge.device)
    # What an update finds in memory besides the model: the trajectory, the average, a reference.
    trained = sum(parameter.numel() for parameter in backbone.trainable_parameters())
    beside = torch.empty(int(plan.held_bytes - plan.weight_bytes) // 4, device=gauge.device)
    average = torch.empty(trained * bool(config.model.average_decay), device=gauge.device)
    step.train(plan.microbatch)  # also makes the optimiser's state and the libraries' workspaces
    gauge.reset()
    train_s = gauge.seconds(lambda: step.train(plan.microbatch))
    peak = gauge.peak_bytes()
    del beside, average
    rows = min(config.train.rollout_batch, plan.images)
    step.infer(rows)
    infer_s = gauge.seconds(lambda: step.infer(rows))
    step.decode(1)
    return _measurement(plan, peak, train_s, infer_s / rows, gauge.seconds(lambda: step.decode(1)))


def measured_table(config: Config, plan: Plan) -> str:
    """The table of `measured_step`, or why there is none."""
    reason = ""
    if not torch.cuda.is_available():
        reason = "torch sees no GPU"
    elif config.train.device == "cpu":
        reason = 'train.device = "cpu"'
    else:
        try:
            return measured_step(config, plan).table()
        except (ValueError, torch.OutOfMemoryError) as error:
            reason = str(error)
    return f"not measured        {reason}"


def _measurement(plan: Plan, peak: float, train_s: float, infer_s: float, decode_s: float) -> Measurement:
    """From the seconds of a training step, and of one picture's inference and decoding, to those of an iteration."""
    seconds_per_flop = infer_s / plan.step_flops
    step_flops = plan.microbatch * plan.training_flops
    known = {
        "update": plan.flops["update"] / plan.training_flops * train_s / plan.microbatch,
        "decoding": plan.images * decode_s,
    }
    seconds = {name: known.get(name, flops * seconds_per_flop) for name, flops in plan.flops.items()}
    return Measurement(plan.microbatch, plan.update_bytes[plan.microbatch], peak, seconds, step_flops / train_s)


class _Step:
    """The denoiser's part of an update and of a rollout, on random inputs."""

    def __init__(self, config: Config, backbone: PipelineBackbone, device: str) -> None:
        from adascope_fast.training.building import optimizer_of, suited  # a plan that measures nothing needs none

        self.backbone, self._device = backbone, device
        self._copies = 1 if config.sampler.guidance_scale == 1 else 2
        self._autocast = autocast_of(config.train.mixed_precision, device)
        self._optimizer = optimizer_of(suited(config, torch.device(device)), backbone.trainable_parameters())

    def train(self, images: int) -> None:
        """Forward, backward, update."""
        self._predict(images * self._copies).square().mean().backward()
        self._optimizer.step()

    @torch.no_grad()
    def infer(self, images: int) -> None:
        """A denoising step."""
        self._predict(images * self._copies)

    def decode(self, images: int) -> None:
        """Latents to pictures."""
        self.backbone.decode(torch.randn(images, *self.backbone.latent_shape, device=self._device))

    def _predict(self, rows: int) -> torch.Tensor:
        sample = torch.randn(rows, *self.backbone.latent_shape, device=self._device)
        condition = {
            name: torch.randn(rows, *shape, device=self._device).to(self.backbone.dtype)
            for name, shape in self.backbone.condition_shape().items()
        }
        with self._autocast():
            return self.backbone.predict(sample, torch.full((rows,), 500.0, device=self._device), condition)
