"""Settings of every test: one thread, no model hub. And a denoiser small enough to differentiate by hand."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from adascope_fast.backbone import Condition
from adascope_fast.schedules import Schedule
from adascope_fast.schedules import samplers as schedules

torch.set_num_threads(1)
# A shell starts its background jobs with SIGINT ignored, which tests of an interruption would wait for for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A busy machine is no failure: examples have no time limit.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def _state_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The key that runs are signed with is none of the user's."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


class ToyBackbone:
    """A two-layer denoiser of 2 x 3 x 3 latents; a prompt is told by its letters. Counts the rows it predicts."""

    name = "toy"
    latent_shape = (2, 3, 3)

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            layers = nn.Sequential(nn.Linear(18 + 1 + 3, 11), nn.Tanh(), nn.Linear(11, 18))
        self.denoiser = self.layers = layers.to(dtype)
        self.dtype, self.num_rows = dtype, 0

    def encode(self, prompts: Sequence[str]) -> Condition:
        letters = [[len(prompt), prompt.count("a"), prompt.count("e")] for prompt in prompts]
        return {"text": torch.tensor(letters, dtype=self.dtype) / 10}

    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        self.num_rows += len(sample)
        seen = torch.cat([sample.flatten(1).to(self.dtype), timestep[:, None] / 1000, condition["text"]], 1)
        return self.layers(seen).view(sample.shape)

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :1].float().sigmoid().expand(-1, 3, -1, -1)

    def schedule(
        self,
        num_steps: int,
        *,
        kind: str = "auto",
        eta: float | None = None,
        noise_level: float | None = None,
        shift: float | None = None,
    ) -> Schedule:
        sigmas = torch.linspace(1, 0, num_steps + 1)
        if shift is not None:
            sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        if kind == "flow_sde":
            return schedules.flow_sde(sigmas, noise_level=0.7 if noise_level is None else noise_level)
        if kind == "flow_cps":
            return schedules.flow_cps(sigmas, eta=0.7 if eta is None else eta)
        return schedules.dance_sde(sigmas, eta=0.3 if eta is None else eta)

    def deterministic_schedule(self, num_steps: int, *, shift: float | None = None) -> Schedule:
        return schedules.flow_ode(torch.linspace(1, 0, num_steps + 1))

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.layers.parameters())

    @contextmanager
    def reference_policy(self) -> Iterator[None]:
        yield

    def save_adapter(self, folder: Path) -> None:
        raise NotImplementedError

    def adapter_tensors(self) -> dict[str, Tensor]:
        return self.layers.state_dict()

    def load_adapter_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.layers.load_state_dict(tensors)


@pytest.fixture
def make_toy() -> Callable[..., ToyBackbone]:
    """Builds equal toy backbones, in float32 or another type."""
    return ToyBackbone


@pytest.fixture(scope="session")
def save_tiny() -> Callable[..., Any]:
    """Writes an untrained tiny autoencoder, 8 times 8 pixels a latent, to a folder, and returns it."""
    return _save_tiny


def _save_tiny(folder: Path, channels: int = 8, **settings: float) -> Any:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (4, 4, 4, 4), "decoder_block_out_channels": (4, 4, 4, 4)}
    blocks = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    model = AutoencoderTiny(latent_channels=channels, **widths, **blocks, **settings)  # type: ignore[arg-type]
    model.save_pretrained(folder)
    return model.eval()
