"""How much of a GPU's matrix rate an iteration used: the FLOPs of the denoiser over the time, as a share of the peak.

The FLOPs are the model's: those of sampling and of the update, forward and backward, without what gradient
checkpointing computes again, and without text encoders, decoder, reward and reference. The time is the iteration's,
waiting and all, and the peak that of dense 16-bit products by the vendor's data sheet, whatever the model's type.
"""

import re
from collections.abc import MutableMapping
from typing import Any

import torch

from adascope_fast import backbones
from adascope_fast.algorithms.settings import DiffusionDpo, DiffusionKto, Noised
from adascope_fast.config import Config
from adascope_fast.training.monitoring.flops import denoiser_cost

PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
}
"""Of dense bfloat16 products accumulated in float32, by a part of the device's name; the first that is in it."""


def peak_flops(device_name: str) -> float | None:
    """The most FLOP/s of matrix products; None for a device that is not listed."""
    found = (peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name))
    peak = next(found, None)
    return None if peak is None else peak * 1e12


class Efficiency:
    """Adds `mfu` (model FLOPs utilisation) to what an iteration tells of each rank.

    Args:
        peak: FLOP/s of a rank's device; None: it is not known, and nothing is added.
        forward, trained: FLOPs of an image's step in a rollout, and of a denoiser row that is trained.
    """

    def __init__(self, peak: float | None, *, forward: float = 0.0, trained: float = 0.0) -> None:
        self._peak, self._forward, self._trained = peak, forward, trained
        self.why_not = ""
        """Why there is no share, where somebody might expect one."""

    @classmethod
    def of(cls, config: Config, device: torch.device, *, is_given: bool) -> "Efficiency":
        """That of a run; on a CPU there is none.

        Args:
            is_given: the model was passed in Python, so that it has no files to count by.
        """
        if device.type != "cuda":
            return cls(None)
        name = torch.cuda.get_device_name(device)
        peak, found = peak_flops(name), cls(None)
        if peak is None:
            found.why_not = f"no mfu is told, since the matrix rate of {name} is not listed"
        elif is_given:
            found.why_not = "no mfu is told of a pipeline that was passed in Python"
        else:
            return cls(peak, **flops(config))
        return found

    def add(self, record: MutableMapping[str, Any]) -> None:
        """Put `mfu` beside each rank's seconds."""
        if self._peak is None:
            return
        for rank in record["ranks"]:
            seconds = sum(rank["seconds"].values())
            done = rank["forwards_sampled"] * self._forward + rank["rows_trained"] * self._trained
            rank["mfu"] = round(done / (seconds * self._peak), 4) if seconds else 0.0


def flops(config: Config) -> dict[str, float]:
    """`forward` and `trained` of an `Efficiency`, counted by the model's JSON files."""
    options: dict[str, Any] = config.model.options() | {"offload_text_encoders": False, "gradient_checkpointing": False}
    backbone = backbones.outline(config.model.name, **options)
    forward = denoiser_cost(backbone, 1, backward=False).forward_flops
    backward = denoiser_cost(backbone, 1, backward=True).backward_flops
    guided = 1 if config.sampler.guidance_scale == 1 else 2
    is_bare = isinstance(config.algorithm, DiffusionDpo | DiffusionKto | Noised)  # trains the conditional output alone
    chosen = config.sampler.train_guidance or getattr(config.algorithm, "train_guidance", "both")
    forwards = 1 if is_bare else guided
    backwards = forwards if chosen == "both" else 1
    again = config.train.update != "one_pass"  # else the rollout's forward serves the update
    return {"forward": guided * forward, "trained": again * forwards * forward + backwards * backward}
