"""Training without a replay: the kept steps are differentiated while the rollout passes through them.

Axes: `b` samples, `t` steps, `m` samples of one denoiser call.

At the first update after a rollout the ratio is 1, so the loss gradient is a weighted sum over samples of the gradient
of their log-probability, and only the weight, the advantage, has to wait for the reward. The replay's forward pass is
saved. In return the steps must be known beforehand, and an iteration makes one update. LeanGRPO calls this reweighting.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from adascope_fast import ops
from adascope_fast.backbones.folding import Folding
from adascope_fast.engine.per_sample import PerSampleGradients
from adascope_fast.engine.policy import in_one
from adascope_fast.rollout import Denoising, Tables, predict_in_one, split


@dataclass
class OnePass:
    """An `advance` for `rollout` that adds up weight * d log_prob / d parameters of each sample's kept steps.

    `keep` is on the CPU: which rows to differentiate is the host's decision. `weight` is on the device.
    """

    denoising: Denoising
    keep: Bool[Tensor, "b t"]
    weight: Float[Tensor, "b t"]
    gradients: PerSampleGradients
    microbatch: int
    folding: Folding | None = None
    train_guidance: str = "both"

    def __call__(
        self,
        step: int,
        samples: Int64[Tensor, " m"],
        at: slice | Int64[Tensor, " m"],
        tables: Tables,
        prompt_index: Int64[Tensor, " b"],
    ) -> None:
        """One step of the samples with these numbers: the kept ones with gradient, the others without."""
        kept = self.keep[samples, step]
        if kept.all():
            self._learn(step, at, tables, prompt_index)
        elif not kept.any():
            self._plain(step, samples, at, tables, prompt_index)
        else:
            some, others = (samples[kept == flag].to(prompt_index.device, non_blocking=True) for flag in (True, False))
            self._learn(step, some, tables, prompt_index)
            self._plain(step, samples, others, tables, prompt_index)

    def guess(self, step: Tensor, sample: Tensor, prompt_index: Tensor) -> Tensor:
        """Without gradient: steps of a tail are not trained."""
        if self.folding is not None:
            self.folding.on()
        return self.denoising.guess(step, sample, prompt_index)

    def _plain(self, *step: Any) -> None:
        if self.folding is not None:
            self.folding.on()
        self.denoising(*step)

    def _learn(self, step: int, at: slice | Tensor, tables: Tables, prompt_index: Tensor) -> None:
        if self.folding is not None:
            self.folding.off()
        size = self.microbatch
        parts: Sequence[slice | Tensor]
        if isinstance(at, slice):
            parts = [slice(start, min(start + size, at.stop)) for start in range(at.start, at.stop, size)]
        else:
            parts = at.split(size)
        for part in parts:
            self._differentiate(step, part, tables, prompt_index)

    def _differentiate(self, step: int, at: slice | Tensor, tables: Tables, prompt_index: Tensor) -> None:
        """The step, and the gradient of its log-probability, which the step itself has told already."""
        it, sample = self.denoising, tables.sample(at, step)
        timestep, coef = it.row(step, len(sample))
        whole, rows = (at, None) if isinstance(at, slice) else (slice(None), at)
        with torch.enable_grad(), self.gradients.leaves(len(sample)) as leaves:
            outputs, apart = predict_in_one(
                it.backbone,
                it.encoded,
                sample,
                timestep,
                prompt_index[at],
                it.guidance_scale,
                train_guidance=self.train_guidance,
            )
            output, without = split(outputs.detach(), apart, len(sample))
            it.move(step, at, tables, output, without)
            found = ops.transition_log_prob_grad(
                tables.latents[whole, step],
                output,
                tables.latents[whole, step + 1],
                coef,
                self.weight[at, step],
                output_uncond=without,
                guidance_scale=it.guidance_scale,
                kind=it.kind,
                rows=rows,
                needs_uncond=apart is None,
            )
            gradient = in_one([one for one in found if one is not None])
            gradients = torch.autograd.grad(outputs, leaves, gradient)
        self.gradients.add(at, gradients)
