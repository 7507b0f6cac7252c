"""Which implementation computes attention, through diffusers' own switches; never another one silently.

sdpa      PyTorch's scaled_dot_product_attention, which picks among its own flash, memory-efficient and cuDNN kernels
xformers  xformers' memory_efficient_attention, for UNets and SD3 by attention processors, for FLUX by the dispatcher
flash     the flash-attn package, through diffusers' dispatcher, which only FLUX' attention goes through
"""

import importlib.util
import warnings
from typing import Any

import torch

from adascope_fast import ops


def use_attention(denoiser: Any, choice: str) -> str:
    """Switch `denoiser` to `choice` where that can serve, else to sdpa with a warning; what serves, and why.

    Raises:
        ValueError: it cannot serve, and `ops.strict()` is on.
    """
    if choice == "sdpa":
        return "sdpa: PyTorch picks its kernel for each call"
    obstacle = _obstacle(denoiser, choice)
    if obstacle:
        message = f"model.attention = {choice!r} cannot serve: {obstacle}"
        if ops.is_strict():
            raise ValueError(f'{message}; set model.attention = "sdpa"')
        warnings.warn(f"{message}; sdpa serves instead", RuntimeWarning, stacklevel=2)
        return f"sdpa: {obstacle}"
    if _has_dispatcher(denoiser):
        denoiser.set_attention_backend(choice)
    else:
        denoiser.enable_xformers_memory_efficient_attention()
    return f"{choice}: asked for"


def _has_dispatcher(denoiser: Any) -> bool:
    return any(hasattr(processor, "_attention_backend") for processor in denoiser.attn_processors.values())


def _obstacle(denoiser: Any, choice: str) -> str:
    package = {"xformers": "xformers", "flash": "flash_attn"}[choice]
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    if not torch.cuda.is_available():
        return "it needs a CUDA GPU, and torch sees none"
    if choice == "flash" and not _has_dispatcher(denoiser):
        return (
            f"diffusers dispatches no attention of {type(denoiser).__name__} to flash-attn "
            f"(sdpa uses PyTorch's own flash kernel for float16 and bfloat16)"
        )
    return ""
