"""The operations that `run.py` times: their inputs, what is called, the traffic, and the exact answer.

Axes: `n` rows of latents of one shape, `d` elements each. A provider is a namespace with the functions of `reference`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from adascope_fast import reference

GUIDANCE = 5.0
CLIP = {"clip_range": 1e-4}
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Operation:
    """One row of the table, for each shape, number of rows, type and provider.

    Args:
        name: of the kernel and of its twin in `reference`; `torch.compile` is given that twin, or `compiled_name`.
        timed: what of it, in words.
        call: the timed call; its results start with the rows, so that the first few can be checked.
        exact: the same results from float64 inputs; it is given what `call` returned, for what depends on rounding.
        num_latents: latents read and written by the kernels, as kernels/README.md counts them.
        test_names: parts of the names of the tests without which no figure is reported.
    """

    name: str
    timed: str
    call: Callable[[Any, SimpleNamespace], Outputs]
    exact: Callable[[SimpleNamespace, Outputs], Outputs]
    num_latents: int
    test_names: tuple[str, ...]
    compiled_name: str = ""
    compiled_call: Callable[[Any, SimpleNamespace], Outputs] | None = None


def inputs(n: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> SimpleNamespace:
    """Random inputs of every operation, made on the CPU in small pieces so that they do not depend on the device."""
    generator = torch.Generator(device=device).manual_seed(n)

    def latents() -> Tensor:
        return torch.randn(n, *shape, generator=generator, device=device, dtype=dtype)

    data = SimpleNamespace(sample=latents(), output=latents(), output_uncond=latents(), noise=latents())
    data.coef = torch.tensor([1.01, -0.2, 0.3], device=device) + 0.01 * torch.rand(
        n, 3, generator=generator, device=device
    )
    data.prev_sample, data.old_log_prob = reference.transition_step(data.sample, data.output, data.noise, data.coef)
    data.old_log_prob = data.old_log_prob + 2e-5 * torch.randn(n, generator=generator, device=device)
    data.advantage = torch.randn(n, generator=generator, device=device)
    return data


def first_rows(data: SimpleNamespace, count: int) -> SimpleNamespace:
    """The first rows, in float64."""
    return SimpleNamespace(**{name: value[:count].double() for name, value in vars(data).items()})


def _step(provider: Any, data: SimpleNamespace) -> Outputs:
    return provider.transition_step(
        data.sample, data.output, data.noise, data.coef, output_uncond=data.output_uncond, guidance_scale=GUIDANCE
    )


def _exact_step(data: SimpleNamespace, outputs: Outputs) -> Outputs:
    """The log-probability of what was stored, which is rounded."""
    stored = outputs[0].double()
    arguments = (data.sample, data.output, data.output_uncond, GUIDANCE, stored, data.coef)
    return _step(reference, data)[0], reference.guided_transition_log_prob(*arguments)


@torch.no_grad()
def _log_prob(provider: Any, data: SimpleNamespace) -> Outputs:
    return (provider.transition_log_prob(data.sample, data.output, data.prev_sample, data.coef),)


def _policy_loss(provider: Any, data: SimpleNamespace) -> Outputs:
    output = data.output.detach().requires_grad_()
    rows = (data.prev_sample, data.coef, data.old_log_prob, data.advantage)
    loss, _ = provider.transition_policy_loss(data.sample, output, *rows, **CLIP)
    return loss.detach(), *torch.autograd.grad(loss.sum(), output)


def _policy_grad(provider: Any, data: SimpleNamespace) -> Outputs:
    rows = (data.prev_sample, data.coef, data.old_log_prob, data.advantage)
    loss, _, grad, _ = provider.transition_policy_grad(data.sample, data.output, *rows, **CLIP)
    return loss, grad


def _kl(provider: Any, data: SimpleNamespace) -> Outputs:
    output = data.output.detach().requires_grad_()
    kl = provider.gaussian_kl(output, data.sample, data.coef)
    return kl.detach(), *torch.autograd.grad(kl.sum(), output)


def _correlation(provider: Any, data: SimpleNamespace) -> Outputs:
    return (provider.correlation(data.sample, data.prev_sample),)


def _exactly(call: Callable[[Any, SimpleNamespace], Outputs]) -> Callable[[SimpleNamespace, Outputs], Outputs]:
    return lambda data, _: call(reference, data)


OPERATIONS = [
    Operation("transition_step", "guided", _step, _exact_step, 5, ("transition", "step")),
    Operation("transition_log_prob", "forward", _log_prob, _exactly(_log_prob), 3, ("transition", "log_prob")),
    Operation(
        "transition_policy_loss",
        "forward and backward",
        _policy_loss,
        _exactly(_policy_loss),
        7,
        ("policy", "training_step"),
    ),
    Operation(
        "transition_policy_grad",
        "loss with its gradient",
        _policy_grad,
        _exactly(_policy_grad),
        7,
        ("policy", "training_step"),
        compiled_name="transition_policy_loss",  # torch.compile cannot hold the gradient inside
        compiled_call=_policy_loss,
    ),
    Operation("gaussian_kl", "forward and backward", _kl, _exactly(_kl), 5, ("kl",)),
    Operation("correlation", "at once", _correlation, _exactly(_correlation), 2, ("correlation",)),
]
