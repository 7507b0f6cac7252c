"""What a text-to-image model is to the engine: encode, predict, decode, and the parameters that learn."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from jaxtyping import Float
from torch import Tensor, nn

from adascope_fast.schedules import Schedule

Condition = dict[str, Tensor]
"""What the denoiser is told about a prompt: tensors whose first axis runs over prompts or samples."""


def take(condition: Condition, index: Tensor) -> Condition:
    """The rows of a condition at `index`."""
    return {name: value[index] for name, value in condition.items()}


class Backbone(Protocol):
    """A frozen pipeline with a trainable adapter. Outputs are float32, whatever the weights are stored in."""

    name: str
    latent_shape: tuple[int, int, int]
    denoiser: nn.Module

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Conditioning of each prompt, one row a prompt; the empty prompt is the unconditional one."""
        ...

    def predict(
        self, sample: Float[Tensor, "n *latent"], timestep: Float[Tensor, " n"], condition: Condition
    ) -> Float[Tensor, "n *latent"]:
        """Model output at x_t, before guidance; every row has its own timestep."""
        ...

    def decode(self, latents: Float[Tensor, "n *latent"]) -> Float[Tensor, "n 3 h w"]:
        """Pictures in [0, 1]."""
        ...

    def schedule(self, num_steps: int, *, eta: float, noise_level: float) -> Schedule:
        """The table of this model's stochastic sampler: DDIM with `eta`, or Flow-SDE with `noise_level`."""
        ...

    def deterministic_schedule(self, num_steps: int) -> Schedule:
        """The table of this model's own sampler without noise, as plain diffusers runs it."""
        ...

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, float32, in a fixed order."""
        ...

    def reference_policy(self) -> AbstractContextManager[None]:
        """Within it, `predict` is the base model's."""
        ...

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in diffusers' LoRA format: `pipe.load_lora_weights(folder)` reads it."""
        ...

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The adapter's weights by name, exactly."""
        ...

    def load_adapter_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `adapter_tensors` gave."""
        ...
