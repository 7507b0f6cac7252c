"""One door per operation, with the signatures of `reference`: Triton kernels for CUDA tensors, `reference` elsewhere.

`ADASCOPE_FAST_KERNELS` chooses for the process:

    auto       kernels for CUDA tensors, the reference for CPU tensors; any other use of the reference warns once
    triton     kernels or an error; with TRITON_INTERPRET=1 (set before Python starts) they serve CPU tensors too
    reference  the reference everywhere

Nothing falls back silently: `explain()` says what serves each operation and why, `strict()` makes a fallback an error.
Importing this module imports no Triton and touches no GPU; a kernel module is imported when it is first needed.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from adascope_fast import reference
from adascope_fast.reference import Step as Step
from adascope_fast.reference import correlation_from_state as correlation_from_state
from adascope_fast.reference import guide as guide

CHOICES = ("auto", "triton", "reference")
CONVERTED = {"coef", "x0_coef", "old_log_prob", "advantage", "weight", "kl_weight", "scale", "state"}
"""Arguments of a few numbers a row, which are computed with in the type that the latents are."""

P = ParamSpec("P")
R = TypeVar("R")

_has_triton = find_spec("triton") is not None
_is_strict = False
_doors: list[str] = []
_kernels: dict[str, Callable[..., Any]] = {}
_fallbacks: dict[tuple[str, str], str] = {}


def explain(device: str | None = None) -> dict[str, str]:
    """Which implementation serves each operation on a device, and why; then the fallbacks seen in this process.

    Args:
        device: "cuda", "cpu", ...; None means CUDA if this machine has it, else the CPU.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    lines = {name: ": ".join(_decide(device, is_double=False)) for name in _doors}
    lines["correlation_from_state"] = "reference: six numbers a row leave a kernel nothing to do"
    lines.update(
        {f"{name} on {device}": f"fell back to reference: {why}" for (name, device), why in _fallbacks.items()}
    )
    return lines


def strict(enabled: bool = True) -> AbstractContextManager[None]:
    """Make a fallback an error from this call on; used in a `with` statement, until its block ends."""
    global _is_strict
    before, _is_strict = _is_strict, enabled
    return _restore_strict(before)


def is_strict() -> bool:
    """Whether a fallback is an error now."""
    return _is_strict


@contextmanager
def _restore_strict(before: bool) -> Iterator[None]:
    global _is_strict
    try:
        yield
    finally:
        _is_strict = before


def _decide(device: str, *, is_double: bool) -> tuple[str, str]:
    """("triton" | "reference" | "refused", reason) for tensors on a type of device."""
    choice = os.environ.get("ADASCOPE_FAST_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"ADASCOPE_FAST_KERNELS must be one of {', '.join(CHOICES)}, not {choice!r}")
    if choice == "reference":
        return "reference", "ADASCOPE_FAST_KERNELS=reference"
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not _has_triton:
        obstacle = "triton is not installed (it exists for Linux alone)"
    elif device == "cpu" and not is_interpreted:
        obstacle = "the kernels need a GPU; TRITON_INTERPRET=1 runs them on the CPU, slowly, for tests"
    elif device not in ("cpu", "cuda"):
        obstacle = f"no kernels for {device} tensors"
    elif is_double:
        obstacle = "the kernels compute in float32 and latents are float64"
    elif device == "cpu" and choice == "auto":
        obstacle = "interpreted kernels are for tests; ADASCOPE_FAST_KERNELS=triton asks for them"
    else:
        return "triton", f"{device} tensors, ADASCOPE_FAST_KERNELS={choice}"
    is_fallback = choice == "triton" or device != "cpu"
    return ("refused" if is_fallback and (_is_strict or choice == "triton") else "reference"), obstacle


def _door(twin: Callable[P, R], module: str) -> Callable[P, R]:
    """The operation of `reference` named as `twin`, served by `adascope_fast.kernels.<module>` where that can serve."""
    name = twin.__name__
    _doors.append(name)
    parameters = tuple(signature(twin).parameters)

    def named(*args: Any, **kwargs: Any) -> list[tuple[str, Tensor]]:
        given = (*zip(parameters, args, strict=False), *kwargs.items())
        return [(key, value) for key, value in given if isinstance(value, Tensor)]

    @wraps(twin)
    def door(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        place = tensors[0].device if tensors else torch.device("cpu")
        is_double = False
        for value in tensors:
            if value.device != place:
                places = ", ".join(f"{key} on {value.device}" for key, value in named(*args, **kwargs))
                raise ValueError(f"the tensors of {name} must be on one device, got {places}; move them")
            if value.dtype == torch.float64:
                is_double = any(x.dtype == torch.float64 and key not in CONVERTED for key, x in named(*args, **kwargs))
        device = place.type
        verdict, reason = _decide(device, is_double=is_double)
        if verdict == "triton":
            if name not in _kernels:
                _kernels[name] = getattr(import_module(f"adascope_fast.kernels.{module}"), name)
            return _kernels[name](*args, **kwargs)
        if verdict == "refused":
            raise RuntimeError(
                f"no kernel can serve {name}: {reason}; set ADASCOPE_FAST_KERNELS=reference for the plain PyTorch path"
            )
        if device != "cpu" and reason != "ADASCOPE_FAST_KERNELS=reference" and (name, device) not in _fallbacks:
            _fallbacks[name, device] = reason
            warnings.warn(f"{name} falls back to plain PyTorch: {reason}", RuntimeWarning, stacklevel=2)
        return twin(*args, **kwargs)

    return door


transition_log_prob = _door(reference.transition_log_prob, "transition")
guided_transition_log_prob = _door(reference.guided_transition_log_prob, "transition")
transition_log_prob_grad = _door(reference.transition_log_prob_grad, "transition")
transition_step = _door(reference.transition_step, "step")
transition_step_with_x0 = _door(reference.transition_step_with_x0, "step")
clipped_policy_loss = _door(reference.clipped_policy_loss, "policy_loss")
dpok_policy_loss = _door(reference.dpok_policy_loss, "policy_loss")
transition_policy_loss = _door(reference.transition_policy_loss, "training_step")
transition_policy_grad = _door(reference.transition_policy_grad, "training_gradient")
gaussian_kl = _door(reference.gaussian_kl, "gaussian_kl")
correlation = _door(reference.correlation, "correlation")
correlations = _door(reference.correlations, "correlation")
correlation_update = _door(reference.correlation_update, "correlation")
