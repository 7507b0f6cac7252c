"""One pipeline of diffusers, made faster in place: nothing is patched but this instance, and `unwrap` undoes it.

fast = adascope_fast.wrap(pipeline)
images, latents, log_probs = fast.with_logprob(["a cat"] * 4, eta=1.0, output_type="pt")
print(fast.explain())
"""

from collections.abc import Callable
from copy import copy
from typing import Any, Self

import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from adascope_fast import ops
from adascope_fast.compat import ddpo_pytorch, flow_grpo
from adascope_fast.compat.steps import Generator, as_timesteps, ddim_tables, mean_of, rows_at, with_nan
from adascope_fast.engine.acceleration import Acceleration, accelerate
from adascope_fast.reference.rows import per_row

FAMILIES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")


def wrap(pipeline: Any, acceleration: Acceleration | None = None) -> "Wrapped":
    """The pipeline with fused steps, and its denoiser prepared for its device.

    Args:
        pipeline: of Stable Diffusion 1.x, 2.x, XL or 3.x, or FLUX, on its device.
        acceleration: as `[acceleration]` of a configuration; None: what pays on the device.

    Raises:
        ValueError: a pipeline of another kind, or one that is wrapped already.
    """
    return Wrapped(pipeline, acceleration or Acceleration())


class Wrapped:
    """A pipeline that is called as before; all its other attributes are the pipeline's own."""

    def __init__(self, pipeline: Any, acceleration: Acceleration) -> None:
        name = type(pipeline).__name__
        if isinstance(pipeline, Wrapped) or getattr(pipeline, "_adascope_wrapped", False):
            raise ValueError("a pipeline is wrapped once, got one that is; call unwrap first")
        if name not in FAMILIES:
            raise ValueError(f"a pipeline must be one of {', '.join(FAMILIES)}, got {name}; use one of these families")
        self._pipeline, self._scheduler = pipeline, pipeline.scheduler
        self._denoiser: nn.Module = getattr(pipeline, "unet", None) or pipeline.transformer
        self._before = _Before(self._denoiser, pipeline.vae)
        pipeline._adascope_wrapped = True
        self._told = {"step": self._replace_step()}
        try:
            self._told |= accelerate(self._denoiser, acceleration, pipeline.device, decoder=pipeline.vae)
        except ValueError:
            self.unwrap()
            raise
        for key in ("fused_optimizer", "fold_adapter", "cuda_graphs"):  # of a training
            del self._told[key]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The pipeline's own call."""
        return self._pipeline(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_pipeline"], name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.unwrap()

    def with_logprob(self, *arguments: Any, **options: Any) -> tuple[Any, list[Tensor], list[Tensor]]:
        """(images, latents of all states, log-probabilities of all steps).

        Args:
            arguments, options: of the pipeline's call, with `eta` of a diffusion model, `noise_level` and `sde_type` of
                a flow.
        """
        pipeline, own = self._pipeline, self._scheduler
        if type(pipeline).__name__ == "StableDiffusionXLPipeline":
            raise ValueError(
                "with_logprob is of SD, SD3 and FLUX, got SDXL, whose scheduler is no DDIM; train it with Trainer"
            )
        fast, pipeline.scheduler = pipeline.scheduler, own
        try:
            if hasattr(pipeline, "unet"):
                images, _, latents, log_probs = ddpo_pytorch.pipeline_with_logprob(pipeline, *arguments, **options)
                return images, latents, log_probs
            images, latents, *_, log_probs = flow_grpo.pipeline_with_logprob(pipeline, *arguments, **options)
            return images, latents, log_probs
        finally:
            pipeline.scheduler = fast

    def explain(self) -> dict[str, str]:
        """What was replaced and what was not, and why, by name."""
        served = ops.explain(self._pipeline.device.type)["transition_step"]
        return self._told | {"kernel of a step with noise": served}

    def unwrap(self) -> Any:
        """The pipeline as it was."""
        self._pipeline.scheduler = self._scheduler
        self._before.restore()
        if hasattr(self._pipeline, "_adascope_wrapped"):
            del self._pipeline._adascope_wrapped
        return self._pipeline

    def _replace_step(self) -> str:
        scheduler = self._scheduler
        name = type(scheduler).__name__
        makers: dict[str, Callable[[Any], Any]] = {
            "DDIMScheduler": _ddim_step,
            "FlowMatchEulerDiscreteScheduler": _flow_step,
        }
        if name not in makers:
            return f"{name}'s own: only {' and '.join(makers)} take a step that is a row of a table"
        if name == "DDIMScheduler" and (scheduler.config.clip_sample or scheduler.config.thresholding):
            return "DDIMScheduler's own: it clips its guess of the image, which no row of a table can say"
        if name != "DDIMScheduler" and getattr(scheduler.config, "stochastic_sampling", False):
            return f"{name}'s own: it samples with noise of its own kind"
        fast = copy(scheduler)
        fast.step = makers[name](fast)
        self._pipeline.scheduler = fast
        return f"one pass over the latents in place of {name}'s"


class _Before:
    """What `accelerate` changes of modules, to be put back."""

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        self._precision = torch.get_float32_matmul_precision()
        self._is_last = [_is_channels_last(module) for module in modules]
        self._compiled = [(part, part._compiled_call_impl) for module in modules for part in module.modules()]

    def restore(self) -> None:
        """Put it back; the precision of matrix products is torch's, and put back too."""
        torch.set_float32_matmul_precision(self._precision)
        for part, compiled in self._compiled:
            part._compiled_call_impl = compiled
        for module, is_last in zip(self._modules, self._is_last, strict=True):
            layout = torch.channels_last if is_last else torch.contiguous_format
            for parameter in module.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=layout)


def _is_channels_last(module: nn.Module) -> bool:
    found = [
        parameter
        for parameter in module.parameters()
        if parameter.ndim == 4 and not parameter.is_contiguous(memory_format=torch.contiguous_format)
    ]
    return bool(found)


def _ddim_step(fast: Any) -> Callable[..., Any]:
    """DDIM's step as diffusers has it, its end at the scheduler's final alpha included."""

    def step(
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        coef, x0_coef = ddim_tables(fast, float(eta), sample.device, ends_as_diffusers=True)
        at = as_timesteps(timestep, sample).long()
        prev_sample = _next(sample, model_output, coef[at], eta > 0, generator, variance_noise)
        if not return_dict:
            return (prev_sample,)
        of_x, of_output = (per_row(column, sample) for column in x0_coef[at].unbind(1))
        guess = (of_x * sample.float() + of_output * model_output.float()).to(sample.dtype)
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=guess)

    return step


def _flow_step(fast: Any) -> Callable[..., Any]:
    """The Euler step of a flow as diffusers has it."""

    def step(
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *arguments: Any,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        if per_token_timesteps is not None:
            return type(fast).step(
                fast, model_output, timestep, sample, per_token_timesteps=per_token_timesteps, return_dict=return_dict
            )
        sigmas = fast.sigmas.to(sample.device, torch.float32)
        at = rows_at(fast.timesteps.to(sample.device), as_timesteps(timestep, sample))
        change = with_nan(sigmas.diff()[:, None])[at, 0]
        coef = torch.stack([torch.ones_like(change), change, torch.zeros_like(change)], 1)
        prev_sample = mean_of(sample, model_output, coef).to(model_output.dtype)
        if not return_dict:
            return (prev_sample,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=prev_sample)  # type: ignore[arg-type]

    return step


def _next(
    sample: Tensor, output: Tensor, coef: Tensor, has_noise: bool, generator: Generator, noise: Tensor | None
) -> Tensor:
    if not has_noise:
        return mean_of(sample, output, coef).to(sample.dtype)
    if noise is None:
        noise = randn_tensor(output.shape, generator=generator, device=output.device, dtype=output.dtype)
    assert noise is not None
    return ops.transition_step(sample, output, noise, coef)[0]
