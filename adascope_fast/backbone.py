"""What a text-to-image model is to the engine: encode, predict, decode, and the parameters that learn."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adascope_fast.distributed.sharded import all_whole, copy_into, own, weights_changed
from adascope_fast.schedules import Schedule

Condition = dict[str, Tensor]
"""What the denoiser is told about a prompt: tensors whose first axis runs over prompts or samples."""

Reward = Callable[[Tensor, list[str]], Tensor]
"""(images [b, 3, h, w] in [0, 1], prompts) -> scores [b]; higher is better, always."""


def take(condition: Condition, index: Tensor) -> Condition:
    """The rows of a condition at `index`."""
    return {name: value[index] for name, value in condition.items()}


def in_double(tensor: Tensor) -> Tensor:
    """The tensor in float64: where it is, or on the CPU where its device has none, as Apple's mps."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


class Backbone(Protocol):
    """A frozen pipeline with a trainable adapter. Outputs have the denoiser's type, or a wider one."""

    name: str
    latent_shape: tuple[int, int, int]
    denoiser: nn.Module

    @property
    def resolution(self) -> int:
        """Side of the pictures in pixels."""
        ...

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Conditioning of each prompt, one row a prompt; the empty prompt is the unconditional one."""
        ...

    def predict(
        self, sample: Float[Tensor, "n *latent"], timestep: Float[Tensor, " n"], condition: Condition
    ) -> Float[Tensor, "n *latent"]:
        """Model output at x_t, before guidance; every row has its own timestep."""
        ...

    def decode(self, latents: Float[Tensor, "n *latent"]) -> Float[Tensor, "n 3 h w"]:
        """Pictures in [0, 1], all NaN for each row whose latent, or whose decoder's output, is not finite anywhere.

        The other rows are what they would be without it, and the device is not waited for.
        """
        ...

    def encode_images(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n *latent"]:
        """Latents of pictures in [0, 1] of side `resolution`, without noise: what `decode` takes back; float32."""
        ...

    def schedule(
        self,
        num_steps: int,
        *,
        kind: str = "auto",
        eta: float | None = None,
        noise_level: float | None = None,
        shift: float | None = None,
    ) -> Schedule:
        """The table of the sampler `kind` with its noise; "auto": DDIM for diffusion models, Flow-SDE for flow models.

        `shift` gives a flow its sigmas in place of the scheduler's, see `Schedule.from_diffusers`. ValueError for a
        kind that this model has not, and for noise or a shift that the kind has not.
        """
        ...

    def deterministic_schedule(self, num_steps: int, *, shift: float | None = None) -> Schedule:
        """The table of this model's own sampler without noise, as plain diffusers runs it but for a `shift`."""
        ...

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, float32, in a fixed order."""
        ...

    def reference_policy(self) -> AbstractContextManager[None]:
        """Within it, `predict` is the base model's."""
        ...

    def save_adapter(self, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
        """Write the adapter in diffusers' LoRA format: `pipe.load_lora_weights(folder)` reads it.

        Args:
            tensors: what `adapter_tensors` gave; None: it is asked now.
        """
        ...

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The adapter's weights by name, exactly."""
        ...

    def load_adapter_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `adapter_tensors` gave."""
        ...


class Ema:
    """Exponential moving average of trained weights, in float32: smoother than the weights of any one iteration.

    As in diffusers' EMAModel the decay of update n is at most (1 + n) / (10 + n), so a short run is averaged too.

    Args:
        decay: the highest decay.
        growth: the decay of update n is `growth` * (n - `delay`) between 0 and `decay`; None: as in diffusers.
        delay: updates before it grows.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], decay: float, *, growth: float | None = None, delay: int = 0
    ) -> None:
        self.decay, self.growth, self.delay = decay, growth, delay
        self._parameters, self._num_updates = list(parameters), 0
        self._average = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self, num_updates: int = 1) -> None:
        """Move towards the weights as they are now; `num_updates` is what n grows by until the next call."""
        n = self._num_updates
        decay = (1 + n) / (10 + n) if self.growth is None else self.growth * max(0, n - self.delay)
        weights = [own(parameter.data) for parameter in self._parameters]
        torch._foreach_lerp_([own(average) for average in self._average], weights, 1 - min(self.decay, decay))
        self._num_updates += num_updates

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and their averages."""
        for parameter, average in zip(self._parameters, self._average, strict=True):
            weight, mean = own(parameter.data), own(average)
            trained = weight.clone()
            weight.copy_(mean)
            mean.copy_(trained)
        weights_changed()

    def tensors(self) -> dict[str, Tensor]:
        """The averages, by number, and how often they were moved."""
        count = torch.tensor(self._num_updates)
        return all_whole({str(number): value for number, value in enumerate(self._average)}) | {"num_updates": count}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        self._num_updates = int(tensors["num_updates"])
        for number, average in enumerate(self._average):
            copy_into(average, tensors[str(number)])
