"""Stable Diffusion 1.x and 2.x: a UNet on latents, one text encoder, DDIM; epsilon or v as the scheduler says."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from adascope_fast.backbone import Condition
from adascope_fast.backbones.base import PipelineBackbone
from adascope_fast.schedules import Schedule
from adascope_fast.schedules.samplers import BETA_SCHEDULERS

CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
VAES = ("AutoencoderKL", "AutoencoderTiny")
UNET_PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": VAES,
    "scheduler": tuple(sorted(BETA_SCHEDULERS)),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": CLIP_TOKENIZERS,
}


class DenoisingUNet(PipelineBackbone):
    """What SD and SDXL share: a UNet, and a scheduler with betas."""

    denoiser_name = "unet"
    like = "StableDiffusion"
    # examples/text_to_image/train_text_to_image_lora.py and its SDXL twin.
    default_targets = ("to_q", "to_k", "to_v", "to_out.0")

    @classmethod
    def refuse(cls, config: dict[str, Any]) -> None:
        """Models that also see a picture (inpainting, editing) or are distilled for guidance have other inputs."""
        channels, outputs = config.get("in_channels", 4), config.get("out_channels", 4)
        if channels != outputs:
            raise ValueError(
                f"a text-to-image UNet has as many input as output channels, got {channels} and {outputs} "
                f"(inpainting or editing); use a text-to-image model"
            )
        if config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                f"a model distilled for guidance (time_cond_proj_dim = {config['time_cond_proj_dim']}) takes too few "
                f"steps for RL on each of them; use the model that it was distilled from"
            )

    def schedule(
        self,
        num_steps: int,
        *,
        kind: str = "auto",
        eta: float | None = None,
        noise_level: float | None = None,
        shift: float | None = None,
    ) -> Schedule:
        """DDIM with eta (1 by default), or DDPM."""
        chosen = None if kind == "auto" else kind
        noise: dict[str, Any] = {"eta": eta, "noise_level": noise_level, "shift": shift}
        return Schedule.from_diffusers(self.pipeline.scheduler, num_steps, kind=chosen, **noise).to(self.device)

    def deterministic_schedule(self, num_steps: int, *, shift: float | None = None) -> Schedule:
        """The scheduler's own steps for DDIM and Euler; DDIM at eta 0 for multi-step solvers such as PNDM and DPM."""
        scheduler = self.pipeline.scheduler
        options: dict[str, Any] = {"eta": 0.0}
        if "EulerDiscreteScheduler" in {base.__name__ for base in type(scheduler).__mro__}:
            options = {"kind": "euler"}
        return Schedule.from_diffusers(scheduler, num_steps, **options, shift=shift).to(self.device)


class StableDiffusion(DenoisingUNet):
    """`StableDiffusionPipeline`; the embedded `scenes` is one in small."""

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = UNET_PARTS

    def condition_shape(self) -> dict[str, tuple[int, ...]]:
        return {"text": (self._num_clip_tokens(), self.denoiser.config.cross_attention_dim)}

    def text_widths(self) -> dict[str, int]:
        return {"text": self._encoder_settings(1).hidden_size}

    def tokenizer_limits(self) -> dict[str, int]:
        return {"tokenizer": self.pipeline.tokenizer.model_max_length}

    def _encode(self, prompts: list[str]) -> Condition:
        text, _ = self.pipeline.encode_prompt(prompts, self.device, 1, False)
        return {"text": text}

    def _predict(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return self.denoiser(sample, timestep, encoder_hidden_states=condition["text"], return_dict=False)[0]
