"""A diffusers pipeline with a LoRA adapter on its denoiser: what all families share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from adascope_fast.schedules import Schedule
from adascope_fast.trajectory import Condition

ADAPTER = "adascope"
SAMPLING_MAX_BATCH = 64


class LoraBackbone:
    """Base of the families: everything but how the denoiser is called and how prompts are encoded.

    The base weights are frozen in `dtype`; the adapter is float32. LoRA starts at zero, so training begins at the base.
    """

    denoiser_name = "unet"

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        name: str,
        *,
        rank: int,
        alpha: int | None = None,
        targets: list[str] | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.name = name
        self.pipeline: Any = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        self.denoiser: Any = pipeline.components[self.denoiser_name]
        self.vae: Any = pipeline.components["vae"]
        self.lora = LoraConfig(
            r=rank,
            lora_alpha=alpha or rank,
            target_modules=targets or self.default_targets(),
            init_lora_weights=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._add_adapter()
        for parameter in self.trainable_parameters():
            parameter.data = parameter.data.float()
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
            self.denoiser.train()  # diffusers recomputes only in training mode; these models have no dropout
        size, channels = self.denoiser.config.sample_size, self.denoiser.config.in_channels
        self.latent_shape = (channels, size, size)

    @staticmethod
    def default_targets() -> list[str]:
        """The attention projections, diffusers' usual choice."""
        return ["to_q", "to_k", "to_v", "to_out.0"]

    def _add_adapter(self) -> None:
        try:
            self.denoiser.add_adapter(self.lora, ADAPTER)
        except ValueError as error:
            raise ValueError(
                f"model.lora_targets must name layers of the {self.denoiser_name}, "
                f"got {sorted(self.lora.target_modules or [])}: {error}"
            ) from None

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.dtype

    def to(self, device: torch.device) -> None:
        """Move the whole pipeline."""
        self.pipeline.to(device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [n, 3, h, w] in [0, 1], float32."""
        config = self.vae.config
        scaled = latents.to(self.dtype) / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        parts = [self.vae.decode(part, return_dict=False)[0] for part in scaled.split(SAMPLING_MAX_BATCH)]
        return (torch.cat(parts).float() / 2 + 0.5).clamp(0, 1)

    def encode(self, prompts: Sequence[str]) -> Condition:
        raise NotImplementedError

    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        raise NotImplementedError

    def schedule(self, num_steps: int, *, eta: float, noise_level: float) -> Schedule:
        raise NotImplementedError

    def deterministic_schedule(self, num_steps: int) -> Schedule:
        raise NotImplementedError

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]

    @contextmanager
    def reference_policy(self) -> Iterator[None]:
        """Within it, `predict` is the base model's."""
        self.denoiser.disable_adapters()
        try:
            yield
        finally:
            self.denoiser.enable_adapters()

    def adapter_tensors(self) -> dict[str, Tensor]:
        return get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER)

    def load_adapter_tensors(self, tensors: dict[str, Tensor]) -> None:
        result = set_peft_model_state_dict(self.denoiser, tensors, adapter_name=ADAPTER)
        if result.unexpected_keys:
            raise ValueError(
                f"the adapter does not fit this model: unexpected {result.unexpected_keys[:2]}; "
                f"use the model.lora_rank and model.lora_targets that it was trained with"
            )

    def save_adapter(self, folder: Path) -> None:
        layers = {name: value.detach().cpu().contiguous() for name, value in self.adapter_tensors().items()}
        self.pipeline.save_lora_weights(
            folder,
            **{
                f"{self.denoiser_name}_lora_layers": layers,
                f"{self.denoiser_name}_lora_adapter_metadata": _plain(self.lora.to_dict()),
            },
        )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The LoRA settings without sets and enums, which JSON cannot hold."""
    kept = {key: values[key] for key in ("r", "lora_alpha", "target_modules", "lora_dropout", "use_dora", "use_rslora")}
    return kept | {"target_modules": sorted(kept["target_modules"])}
