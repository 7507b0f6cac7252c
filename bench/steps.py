"""The step functions of other trainers, theirs and ours: time of one with its gradient, as a ratio of medians.

    .venv/bin/python bench/steps.py --out bench/results/steps_cpu.json

Theirs are the formulas of ddpo-pytorch and flow_grpo in plain PyTorch, gathers on the CPU and searches of the scheduler
included. On a GPU the device is waited for after each call.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from adascope_fast.compat.ddpo_pytorch import ddim_step_with_logprob
from adascope_fast.compat.flow_grpo import sde_step_with_logprob

SHAPES = {"8 x 4 x 64 x 64": (8, 4, 64, 64), "8 x 16 x 64 x 64": (8, 16, 64, 64)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, theirs, ours in (("ddpo-pytorch, DDIM", *_ddim(device)), ("flow_grpo, Flow-SDE", *_flow(device))):
        for label, shape in SHAPES.items():
            medians = _medians([theirs, ours], shape, device, arguments.rounds)
            rows.append({"step": name, "shape": label, "theirs_us": medians[0], "ours_us": medians[1]})
            print(
                f"{name}, {label}: {medians[0]:.0f} -> {medians[1]:.0f} us, {medians[0] / medians[1]:.2f} times as fast"
            )
    told = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(told, indent=1) + "\n")


def _medians(
    steps: list[Callable[..., Tensor]], shape: tuple[int, ...], device: torch.device, rounds: int
) -> list[float]:
    """Microseconds of each, in turn, so that what else the machine does meets both."""
    found: list[list[float]] = [[] for _ in steps]
    inputs = [torch.randn(shape, device=device) for _ in range(3)]
    for number in range(rounds + 5):
        for step, times in zip(steps, found, strict=True):
            output = inputs[1].clone().requires_grad_()
            start = time.perf_counter()
            step(inputs[0], output, inputs[2]).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 5:
                times.append(1e6 * (time.perf_counter() - start))
    return [statistics.median(times) for times in found]


def _ddim(device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    scheduler: Any = DDIMScheduler(clip_sample=False, steps_offset=1)
    scheduler.set_timesteps(50)
    at = torch.full((8,), 501, device=device)

    def theirs(sample: Tensor, output: Tensor, prev: Tensor) -> Tensor:
        before = (at - 20).clamp(0, 999)
        now, following = (
            scheduler.alphas_cumprod.gather(0, one.cpu()).view(-1, 1, 1, 1).to(device) for one in (at, before)
        )
        variance = (1 - following) / (1 - now) * (1 - now / following)
        std = variance**0.5
        x0 = (sample - (1 - now) ** 0.5 * output) / now**0.5
        mean = following**0.5 * x0 + (1 - following - std**2) ** 0.5 * output
        return _gaussian(prev, mean, std)

    return theirs, lambda x, m, y: ddim_step_with_logprob(scheduler, m, at, x, eta=1.0, prev_sample=y)[1]


def _flow(device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10, device=device)
    at = scheduler.timesteps[3].expand(8)

    def theirs(sample: Tensor, output: Tensor, prev: Tensor) -> Tensor:
        index = [scheduler.index_for_timestep(one) for one in at]
        sigma, following = (
            scheduler.sigmas[places].to(device).view(-1, 1, 1, 1) for places in (index, [one + 1 for one in index])
        )
        dt = following - sigma
        noise = (sigma / (1 - torch.where(sigma == 1, scheduler.sigmas[1].item(), sigma))).sqrt() * 0.7
        mean = sample * (1 + noise**2 / (2 * sigma) * dt) + output * (1 + noise**2 * (1 - sigma) / (2 * sigma)) * dt
        return _gaussian(prev, mean, noise * (-dt).sqrt())

    return theirs, lambda x, m, y: sde_step_with_logprob(scheduler, m, at, x, 0.7, prev_sample=y)[1]


def _gaussian(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (-((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)).mean((1, 2, 3))


if __name__ == "__main__":
    main()
