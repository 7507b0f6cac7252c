"""Training without a replay: the kept steps are differentiated while the rollout passes through them.

Axes: `b` samples, `t` steps, `m` samples of one denoiser call.

At the first update after a rollout the ratio is 1, so the loss gradient is a weighted sum over samples of the gradient
of their log-probability, and only the weight, the advantage, has to wait for the reward. The replay's forward pass is
saved. In return the steps must be known beforehand, and an iteration makes one update. LeanGRPO calls this reweighting.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from adascope_fast import ops
from adascope_fast.backbones.folding import Folding
from adascope_fast.engine.per_sample import PerSampleGradients
from adascope_fast.rollout import Denoising, Moved, predict


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
        sample: Float[Tensor, "m *latent"],
        noise: Float[Tensor, "m *latent"],
        prompt_index: Int64[Tensor, " m"],
    ) -> Moved:
        """One step of the samples with these numbers: the kept ones with gradient, the others without."""
        kept, numbers = self.keep[samples, step], samples.to(sample.device, non_blocking=True)
        if not kept.any():
            return self._plain(step, samples, sample, noise, prompt_index)
        if kept.all():
            return self._learn(step, numbers, sample, noise, prompt_index)
        parts = []
        for flag in (True, False):
            index = (kept == flag).nonzero()[:, 0].to(sample.device, non_blocking=True)
            part = numbers[index], sample[index], noise[index], prompt_index[index]
            parts.append((index, (self._learn if flag else self._plain)(step, *part)))
        order = torch.cat([index for index, _ in parts]).argsort()
        return Moved(*(torch.cat(values)[order] for values in zip(*(moved for _, moved in parts), strict=True)))

    def guess(self, step: Tensor, sample: Tensor, prompt_index: Tensor) -> Tensor:
        """Without gradient: steps of a tail are not trained."""
        if self.folding is not None:
            self.folding.on()
        return self.denoising.guess(step, sample, prompt_index)

    def _plain(self, *step: Any) -> Moved:
        if self.folding is not None:
            self.folding.on()
        return self.denoising(*step)

    def _learn(self, step: int, samples: Tensor, sample: Tensor, noise: Tensor, prompt_index: Tensor) -> Moved:
        if self.folding is not None:
            self.folding.off()
        size = self.microbatch
        parts = [
            self._differentiate(step, *part)
            for part in zip(*(x.split(size) for x in (samples, sample, noise, prompt_index)), strict=True)
        ]
        return Moved(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _differentiate(self, step: int, samples: Tensor, sample: Tensor, noise: Tensor, prompt_index: Tensor) -> Moved:
        it = self.denoising
        timestep, coef = it.row(step, len(sample))
        with torch.enable_grad(), self.gradients.leaves(len(sample)) as leaves:
            where = sample, timestep, prompt_index
            output, without = predict(
                it.backbone, it.encoded, *where, it.guidance_scale, train_guidance=self.train_guidance
            )
            moved = it.move(step, sample, noise, output.detach(), None if without is None else without.detach())
            log_prob = ops.guided_transition_log_prob(
                sample, output, without, it.guidance_scale, moved.prev_sample, coef, kind=it.kind
            )
            gradients = torch.autograd.grad((log_prob * self.weight[samples, step]).sum(), leaves)
        self.gradients.add(samples, gradients)
        return moved
