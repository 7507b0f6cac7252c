"""The model under training as a loss sees it: outputs that it may differentiate, and those that it compares with.

A loss differentiates leaves that stand for the outputs; the engine hands the gradients on to the model, so that a fused
operation can give them without a graph around the loss.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from adascope_fast import ops
from adascope_fast.backbone import Backbone, take
from adascope_fast.rollout import EncodedPrompts, predict_in_one, split
from adascope_fast.schedules import Schedule


class ModelPolicy:
    """See `algorithms.Policy`.

    Args:
        autocast: context in which the denoiser runs.
    """

    def __init__(
        self,
        backbone: Backbone,
        schedule: Schedule,
        encoded: EncodedPrompts,
        *,
        guidance_scale: float,
        train_guidance: str,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.backbone, self.schedule, self.encoded = backbone, schedule, encoded
        self.guidance_scale, self.train_guidance, self._autocast = guidance_scale, train_guidance, autocast
        self._taken: list[tuple[Tensor, Tensor]] = []

    def outputs(
        self, sample: Float[Tensor, "n *latent"], timestep: Float[Tensor, " n"], prompt_index: Int64[Tensor, " n"]
    ) -> tuple[Tensor, Tensor | None]:
        """(conditional, unconditional) output."""
        outputs, without = self._predict(sample, timestep, prompt_index, train_guidance=self.train_guidance)
        return split(self._take(outputs), without, len(sample))

    def output(
        self, sample: Float[Tensor, "n *latent"], timestep: Float[Tensor, " n"], prompt_index: Int64[Tensor, " n"]
    ) -> Tensor:
        """The conditional output alone."""
        with self._autocast():
            return self._take(self._conditional(sample, timestep, prompt_index))

    @torch.no_grad()
    def reference(
        self,
        sample: Float[Tensor, "n *latent"],
        timestep: Float[Tensor, " n"],
        prompt_index: Int64[Tensor, " n"],
        *,
        is_guided: bool = True,
    ) -> Tensor:
        """The reference policy's output, without gradient."""
        with self.backbone.reference_policy():
            if not is_guided:
                return self.frozen(sample, timestep, prompt_index)
            outputs = self._predict(sample, timestep, prompt_index)
            return ops.guide(*split(*outputs, len(sample)), self.guidance_scale)

    @torch.no_grad()
    def frozen(
        self, sample: Float[Tensor, "n *latent"], timestep: Float[Tensor, " n"], prompt_index: Int64[Tensor, " n"]
    ) -> Tensor:
        """The conditional output with the weights as they are, without gradient."""
        with self._autocast():
            return self._conditional(sample, timestep, prompt_index)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n *latent"]) -> Tensor:
        """Pictures of latents, without gradient."""
        return self.backbone.decode(latents)

    def condition(self) -> dict[str, Tensor]:
        """The encoded prompts, a row for each distinct one."""
        return self.encoded.condition

    def tensors(self) -> list[Tensor]:
        """What its outputs are made of besides weights and what they are asked for: schedule and prompts."""
        tables = [value for value in vars(self.schedule).values() if isinstance(value, Tensor)]
        return [*tables, *self.encoded.condition.values(), *self.encoded.negative.values()]

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return self.backbone.trainable_parameters()

    def clear(self) -> None:
        """Forget the outputs that were taken."""
        self._taken = []

    def leaves(self) -> list[Tensor]:
        """What stands for the denoiser's outputs that were taken since `clear`, in their order."""
        return [leaf for _, leaf in self._taken]

    def backward(self, gradients: Sequence[Tensor]) -> None:
        """Hand the gradients in the outputs on to the model: of each leaf, or of its halves one after the other."""
        left, whole = list(gradients), []
        for _, leaf in self._taken:
            parts = [left.pop(0)]
            if len(parts[0]) < len(leaf):
                parts.append(left.pop(0))
            whole.append(in_one(parts))
        torch.autograd.backward([output for output, _ in self._taken], whole)

    def _take(self, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        self._taken.append((output, leaf))
        return leaf

    def _conditional(self, sample: Tensor, timestep: Tensor, prompt_index: Tensor) -> Tensor:
        return self.backbone.predict(sample, timestep, take(self.encoded.condition, prompt_index))

    def _predict(
        self, sample: Tensor, timestep: Tensor, prompt_index: Tensor, *, train_guidance: str = "both"
    ) -> tuple[Tensor, Tensor | None]:
        where = sample, timestep, prompt_index
        with self._autocast():
            return predict_in_one(
                self.backbone, self.encoded, *where, self.guidance_scale, train_guidance=train_guidance
            )


def in_one(parts: Sequence[Tensor]) -> Tensor:
    """Gradients of an output's parts as the one tensor that they are pieces of; copied only if they are of none."""
    if len(parts) == 1:
        return parts[0]
    base = parts[0]._base
    if base is not None and all(part._base is base for part in parts) and len(base) == sum(map(len, parts)):
        return base
    return torch.cat(list(parts))
