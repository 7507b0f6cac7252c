"""The pipelines that a `DDPOTrainer` trains, with TRL's interface; SDXL besides, which TRL never had.

A subclass may override any method; the trainer then takes its slower way through them, and `explain()` says so.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from adascope_fast.compat.trl.step import DDPOSchedulerOutput, scheduler_step

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass
class DDPOPipelineOutput:
    """Images, the latents before the first step and after each, and the log-probability [b] of each step."""

    images: Tensor
    latents: list[Tensor]
    log_probs: list[Tensor]


class DDPOStableDiffusionPipeline:
    """What a trainer needs of a pipeline; one of your own has all of these."""

    def __call__(self, *args: Any, **kwargs: Any) -> DDPOPipelineOutput:
        """Sample images."""
        raise NotImplementedError

    def scheduler_step(self, *args: Any, **kwargs: Any) -> DDPOSchedulerOutput:
        """One step with its log-probability."""
        raise NotImplementedError

    @property
    def unet(self) -> Any:
        """The denoiser."""
        raise NotImplementedError

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the text encoder."""
        raise NotImplementedError

    @property
    def scheduler(self) -> Any:
        """A DDIM scheduler."""
        raise NotImplementedError

    @property
    def text_encoder(self) -> Any:
        """The text encoder."""
        raise NotImplementedError

    @property
    def autocast(self) -> Any:
        """A function that gives the context of a training forward; None: the accelerator's."""
        raise NotImplementedError

    def set_progress_bar_config(self, *args: Any, **kwargs: Any) -> None:
        """How the bar of a rollout looks."""
        raise NotImplementedError

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write all weights."""
        raise NotImplementedError

    def get_trainable_layers(self, *args: Any, **kwargs: Any) -> Any:
        """What is trained: a module, or a list of parameters."""
        raise NotImplementedError

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write what is trained."""
        raise NotImplementedError

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Read what is trained."""
        raise NotImplementedError


class _DiffusersPipeline(DDPOStableDiffusionPipeline):
    """A diffusers pipeline in TRL's interface; `sd_pipeline` is the pipeline itself."""

    kind: ClassVar[Any]

    def __init__(
        self, pretrained_model_name: str, *, pretrained_model_revision: str = "main", use_lora: bool = True
    ) -> None:
        self.sd_pipeline: Any = self.kind.from_pretrained(
            pretrained_model_name, revision=pretrained_model_revision, use_safetensors=True
        )
        self.use_lora = use_lora
        self.pretrained_model, self.pretrained_revision = pretrained_model_name, pretrained_model_revision
        self._load_lora()
        self.sd_pipeline.scheduler = DDIMScheduler.from_config(self.sd_pipeline.scheduler.config)
        if "safety_checker" in self.sd_pipeline.components:
            self.sd_pipeline.safety_checker = None
        for name, module in self.sd_pipeline.components.items():
            if isinstance(module, nn.Module) and name != "unet":
                module.requires_grad_(False)
        self.sd_pipeline.unet.requires_grad_(not self.use_lora)

    def _load_lora(self) -> None:
        """A LoRA beside the weights is what is trained on; TRL trains a second one and leaves this one out."""
        place = self.pretrained_model
        if os.path.isdir(place) and not (Path(place) / LORA_FILE).is_file():
            return
        try:
            self.sd_pipeline.load_lora_weights(place, weight_name=LORA_FILE, revision=self.pretrained_revision)
        except OSError:
            return
        self.use_lora = True

    def scheduler_step(self, *args: Any, **kwargs: Any) -> DDPOSchedulerOutput:
        """See `step.scheduler_step`; the scheduler is the pipeline's."""
        return scheduler_step(self.sd_pipeline.scheduler, *args, **kwargs)

    def rgb_with_grad(self, *args: Any, **kwargs: Any) -> DDPOPipelineOutput:
        """Not here: images with a gradient are AlignProp's."""
        raise NotImplementedError(
            "rgb_with_grad gives AlignProp images to differentiate, and this is DDPO; use TRL 0.23.1's AlignPropTrainer"
        )

    @property
    def unet(self) -> Any:
        """The UNet."""
        return self.sd_pipeline.unet

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        return self.sd_pipeline.vae

    @property
    def tokenizer(self) -> Any:
        """The first tokenizer."""
        return self.sd_pipeline.tokenizer

    @property
    def scheduler(self) -> Any:
        """A DDIMScheduler, made of the one that was loaded."""
        return self.sd_pipeline.scheduler

    @property
    def text_encoder(self) -> Any:
        """The first text encoder."""
        return self.sd_pipeline.text_encoder

    @property
    def autocast(self) -> Any:
        """As in TRL: none for LoRA, the accelerator's otherwise."""
        return contextlib.nullcontext if self.use_lora else None

    def set_progress_bar_config(self, *args: Any, **kwargs: Any) -> None:
        """See diffusers."""
        self.sd_pipeline.set_progress_bar_config(*args, **kwargs)

    def get_trainable_layers(self) -> Any:
        """The UNet, with a LoRA of rank 4 on its attention, or the loaded one, or all of its weights to train."""
        unet = self.sd_pipeline.unet
        if not self.use_lora:
            return unet.requires_grad_(True)
        if getattr(unet, "peft_config", None):
            for name, parameter in unet.named_parameters():
                parameter.requires_grad_(".lora_" in name)
        else:
            targets = ["to_k", "to_q", "to_v", "to_out.0"]
            unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return unet

    def save_pretrained(self, output_dir: Any) -> None:
        """The pipeline as diffusers loads it; a LoRA lies beside it in a file of its own, not in the UNet's."""
        folder = Path(output_dir)
        if self.use_lora and getattr(self.unet, "peft_config", None):
            self._save_lora(self.unet, folder)
        with self._plain_unet():
            self.sd_pipeline.save_pretrained(folder, safe_serialization=True)

    @contextmanager
    def _plain_unet(self) -> Iterator[None]:
        """Within it the pipeline's UNet is the base model's, with no trace of an adapter in its names."""
        unet = self.sd_pipeline.unet
        if not getattr(unet, "peft_config", None):
            yield
            return
        weights = {
            name.replace(".base_layer.", "."): value
            for name, value in unet.state_dict().items()
            if ".lora_" not in name
        }
        with torch.device("meta"):
            plain = type(unet).from_config(unet.config)
        plain.load_state_dict(weights, assign=True)
        self.sd_pipeline.unet = plain
        try:
            yield
        finally:
            self.sd_pipeline.unet = unet

    def save_checkpoint(self, models: list[Any], weights: list[Any], output_dir: Any) -> None:
        """What is trained, as diffusers loads it: a LoRA, or the folder `unet`."""
        (model,) = _one(models)
        if self.use_lora:
            self._save_lora(model, Path(output_dir))
        else:
            model.save_pretrained(Path(output_dir) / "unet", safe_serialization=True)

    def load_checkpoint(self, models: list[Any], input_dir: Any) -> None:
        """What `save_checkpoint` wrote, into the weights that are trained."""
        (model,) = _one(models)
        if not self.use_lora:
            loaded = type(model).from_pretrained(input_dir, subfolder="unet", use_safetensors=True)
            model.load_state_dict(loaded.state_dict())
            return
        found, _ = self.sd_pipeline.lora_state_dict(input_dir, weight_name=LORA_FILE)
        own = {name.removeprefix("unet."): value for name, value in found.items() if name.startswith("unet.")}
        set_peft_model_state_dict(model, convert_unet_state_dict_to_peft(own), adapter_name=_adapter(model))

    def _save_lora(self, model: Any, folder: Path) -> None:
        name = _adapter(model)
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model, adapter_name=name))
        settings = model.peft_config[name].to_dict()
        kept = {key: settings[key] for key in ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")}
        self.sd_pipeline.save_lora_weights(
            save_directory=folder,
            unet_lora_layers={key: value.detach().cpu().contiguous() for key, value in layers.items()},
            unet_lora_adapter_metadata=kept | {"target_modules": sorted(settings["target_modules"])},
        )


class DefaultDDPOStableDiffusionPipeline(_DiffusersPipeline):
    """Stable Diffusion 1.x and 2.x."""

    kind = StableDiffusionPipeline

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback: Callable[[int, int, Tensor], None] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
    ) -> DDPOPipelineOutput:
        """Sample as the diffusers pipeline of these arguments does, with noise `eta`; keep latents, log-probabilities.

        `return_dict` changes nothing, as in TRL.
        """
        pipe, scale = self.sd_pipeline, guidance_scale
        height, width = _sides(pipe, height, width)
        pipe.check_inputs(prompt, height, width, callback_steps, negative_prompt, prompt_embeds, negative_prompt_embeds)
        with torch.no_grad():
            told, untold = pipe.encode_prompt(
                prompt, pipe._execution_device, num_images_per_prompt, scale > 1, negative_prompt,
                prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
                lora_scale=(cross_attention_kwargs or {}).get("scale"),
            )  # fmt: skip
            return _denoised(
                pipe, torch.cat([untold, told]) if scale > 1 else told, {}, height, width, num_inference_steps, scale,
                eta, generator, latents, output_type, callback, callback_steps, cross_attention_kwargs,
                guidance_rescale,
            )  # fmt: skip


class DefaultDDPOStableDiffusionXLPipeline(_DiffusersPipeline):
    """Stable Diffusion XL without a refiner."""

    kind = StableDiffusionXLPipeline

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback: Callable[[int, int, Tensor], None] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
    ) -> DDPOPipelineOutput:
        """As the SD pipeline; images are uncropped and of the size that they are drawn in."""
        pipe, scale = self.sd_pipeline, guidance_scale
        height, width = _sides(pipe, height, width)
        with torch.no_grad():
            told, untold, pooled, unpooled = pipe.encode_prompt(
                prompt, device=pipe._execution_device, num_images_per_prompt=num_images_per_prompt,
                do_classifier_free_guidance=scale > 1, negative_prompt=negative_prompt, prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds,
                negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            )  # fmt: skip
            embeds = torch.cat([untold, told]) if scale > 1 else told
            size_crop_target = torch.tensor([height, width, 0, 0, height, width], device=told.device)
            added = {
                "text_embeds": torch.cat([unpooled, pooled]) if scale > 1 else pooled,
                "time_ids": size_crop_target.expand(len(embeds), 6),
            }
            return _denoised(
                pipe, embeds, added, height, width, num_inference_steps, scale, eta, generator, latents, output_type,
                callback, callback_steps, cross_attention_kwargs, guidance_rescale,
            )  # fmt: skip


def _denoised(
    pipe: Any,
    embeds: Tensor,
    added: dict[str, Tensor],
    height: int,
    width: int,
    num_steps: int,
    guidance_scale: float,
    eta: float,
    generator: Any,
    latents: Tensor | None,
    output_type: str | None,
    callback: Callable[[int, int, Tensor], None] | None,
    callback_steps: int,
    cross_attention_kwargs: dict[str, Any] | None,
    guidance_rescale: float,
) -> DDPOPipelineOutput:
    """The steps and the image; with guidance the first half of `embeds` is the negative prompts'."""
    device, is_guided = embeds.device, guidance_scale > 1
    pipe.scheduler.set_timesteps(num_steps, device=device)
    count, channels = len(embeds) // (2 if is_guided else 1), pipe.unet.config.in_channels
    states: list[Tensor] = [
        pipe.prepare_latents(count, channels, height, width, embeds.dtype, device, generator, latents)
    ]
    log_probs: list[Tensor] = []
    with pipe.progress_bar(total=num_steps) as bar:
        for number, timestep in enumerate(pipe.scheduler.timesteps):
            output = pipe.unet(
                torch.cat([states[-1]] * 2) if is_guided else states[-1],
                timestep,
                encoder_hidden_states=embeds,
                cross_attention_kwargs=cross_attention_kwargs,
                added_cond_kwargs=added or None,
                return_dict=False,
            )[0]
            if is_guided:
                without, with_prompt = output.chunk(2)
                output = without + guidance_scale * (with_prompt - without)
                if guidance_rescale > 0:
                    output = rescale_noise_cfg(output, with_prompt, guidance_rescale=guidance_rescale)
            # The generator draws the first latents alone, as in TRL.
            step = scheduler_step(pipe.scheduler, output, timestep, states[-1], eta)
            states.append(step.latents)
            log_probs.append(step.log_probs)
            bar.update()
            if callback is not None and number % callback_steps == 0:
                callback(number, int(timestep), states[-1])
    image = states[-1]
    if output_type != "latent":
        image = pipe.vae.decode(_unscaled(pipe, image).to(pipe.vae.dtype), return_dict=False)[0]
    image = pipe.image_processor.postprocess(image, output_type=output_type)
    pipe.maybe_free_model_hooks()
    return DDPOPipelineOutput(image, states, log_probs)


def _unscaled(pipe: Any, latents: Tensor) -> Tensor:
    config = pipe.vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return latents / config.scaling_factor
    mean, std = (latents.new_tensor(value).view(1, -1, 1, 1) for value in (mean, std))
    return latents * std / config.scaling_factor + mean


def _sides(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return height or side, width or side


def _adapter(model: Any) -> str:
    return next(iter(model.peft_config))


def _one(models: list[Any]) -> list[Any]:
    if len(models) != 1:
        raise ValueError(f"a checkpoint is of one model, the denoiser, got {len(models)}; pass it alone")
    return models
