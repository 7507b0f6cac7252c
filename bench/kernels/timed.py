"""The operations that `run.py` times: their inputs, what is called, and the exact answer.

Axes: `n` rows of latents of one shape, `d` elements each. A provider is a namespace with the functions of `reference`.
What they move is said in `kernels/operations.py`. The order is that of the goals: a rollout's step and a training step
with its gradient come first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from adascope_fast import reference
from adascope_fast.kernels import operations

GUIDANCE, NOISE_LEVEL, NUM_STACKED = 5.0, 0.7, 4
CLIP = {"clip_range": 1e-4}
MIX = "float32+bfloat16"
DTYPES = {
    MIX: (torch.float32, torch.bfloat16),  # of latents, and of model outputs: what the engine uses
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float32": (torch.float32, torch.float32),
}
LAYOUTS = {  # of latents, and of model outputs
    "contiguous": (torch.contiguous_format, torch.contiguous_format),
    "channels_last": (torch.channels_last, torch.channels_last),
    "mixed": (torch.contiguous_format, torch.channels_last),
}
Outputs = tuple[Tensor, ...]
Call = Callable[[Any, SimpleNamespace], Outputs]


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One row of the table, for each shape, number of rows, types, layout and provider.

    Args:
        name: the key in `kernels/operations.py`, whose function is the kernel's and has its twin in `reference`.
        timed: what of it, in words.
        call: the timed call; its results start with the rows, so that the first few can be checked.
        exact: the same results from float64 inputs; it is given what `call` returned, for what depends on rounding.
        test_names: parts of the names of the tests without which no figure is reported.
        graph_call, graph_function: what stands in for `call` and the function where autograd has to make the gradient.
        is_guided, with_gradient, k: which of the traffic in `kernels/operations.py` it is.
    """

    name: str
    timed: str
    call: Call
    exact: Callable[[SimpleNamespace, Outputs], Outputs]
    test_names: tuple[str, ...]
    graph_call: Call | None = None
    graph_function: str = ""
    is_guided: bool = False
    with_gradient: bool = False
    k: int = 1

    @property
    def function(self) -> str:
        """What a provider that makes gradients by autograd has to have."""
        return self.graph_function or operations.OPERATIONS[self.name].name

    def bytes_moved(self, dtype: str) -> int:
        """Bytes that the kernels read and write for one element of a row."""
        latent, output = (one.itemsize for one in DTYPES[dtype])
        how = {"is_guided": self.is_guided, "with_gradient": self.with_gradient, "k": self.k}
        return operations.OPERATIONS[self.name].bytes_moved(latent=latent, output=output, **how)


def inputs(n: int, shape: tuple[int, ...], dtype: str, layout: str, device: str) -> SimpleNamespace:
    """Random inputs of every operation, and steps of Flow-GRPO's sampler: `coef` of those of `schedule`.

    `schedule` [n, 3] is (t, next t, noise level), from which flow_grpo derives what `coef` holds (2505.05470).
    """
    generator = torch.Generator(device=device).manual_seed(n)

    def draw(which: int, num_rows: int = n) -> Tensor:
        drawn = torch.randn(num_rows, *shape, generator=generator, device=device, dtype=DTYPES[dtype][which])
        return drawn.contiguous(memory_format=LAYOUTS[layout][which])

    data = SimpleNamespace(output=draw(1), output_uncond=draw(1), ref_output=draw(1))
    data.sample, data.noise, data.prev_x0 = draw(0), draw(0), draw(0)
    data.prev_x0 += data.sample
    data.stack = draw(0, n * NUM_STACKED).unflatten(0, (n, NUM_STACKED))
    data.stack += data.sample.unsqueeze(1)
    t = 0.1 + 0.8 * torch.rand(n, generator=generator, device=device)
    dt = -0.1 * t
    coef = [1 + NOISE_LEVEL**2 * dt / (2 * (1 - t)), dt * (1 + NOISE_LEVEL**2 / 2)]
    data.coef = torch.stack([*coef, NOISE_LEVEL * (t / (1 - t) * -dt).sqrt()], dim=1)
    data.schedule = torch.stack([t, t + dt, torch.full_like(t, NOISE_LEVEL)], dim=1)
    data.x0_coef = torch.stack([torch.ones_like(t), -t], dim=1)
    data.prev_sample, data.log_prob = reference.transition_step(data.sample, data.output, data.noise, data.coef)
    data.prev_sample = data.prev_sample.contiguous(memory_format=LAYOUTS[layout][0])
    data.old_log_prob = data.log_prob + 2e-5 * torch.randn(n, generator=generator, device=device)
    data.advantage = torch.randn(n, generator=generator, device=device)
    return data


def first_rows(data: SimpleNamespace, count: int) -> SimpleNamespace:
    """The first rows, in float64."""
    return SimpleNamespace(**{name: value[:count].double() for name, value in vars(data).items()})


def _guidance(data: SimpleNamespace) -> dict[str, Any]:
    return {"output_uncond": data.output_uncond, "guidance_scale": GUIDANCE}


def _step(provider: Any, data: SimpleNamespace) -> Outputs:
    return provider.transition_step(data.sample, data.output, data.noise, data.coef, **_guidance(data))


def _exact_step(data: SimpleNamespace, outputs: Outputs) -> Outputs:
    """The log-probability of what was stored, which is rounded."""
    stored = outputs[0].double()
    arguments = (data.sample, data.output, data.output_uncond, GUIDANCE, stored, data.coef)
    return _step(reference, data)[0], reference.guided_transition_log_prob(*arguments)


def _step_with_x0(provider: Any, data: SimpleNamespace) -> Outputs:
    return provider.transition_step_with_x0(
        data.sample, data.output, data.noise, data.coef, data.x0_coef, prev_x0=data.prev_x0, **_guidance(data)
    )


def _exact_step_with_x0(data: SimpleNamespace, outputs: Outputs) -> Outputs:
    """Log-probability and correlations of what was stored."""
    prev_sample, _, x0, *_ = (one.double() for one in outputs)
    exact = reference.correlation(x0, data.prev_x0), reference.correlation(data.sample, prev_sample)
    return *_exact_step(data, outputs), _step_with_x0(reference, data)[2], *exact


@torch.no_grad()
def _log_prob(provider: Any, data: SimpleNamespace) -> Outputs:
    return (provider.transition_log_prob(data.sample, data.output, data.prev_sample, data.coef),)


def _log_prob_grad(provider: Any, data: SimpleNamespace) -> Outputs:
    rows = (data.sample, data.output, data.prev_sample, data.coef, data.advantage)
    return (provider.transition_log_prob_grad(*rows)[0],)


def _log_prob_by_autograd(provider: Any, data: SimpleNamespace) -> Outputs:
    output = data.output.detach().requires_grad_()
    log_prob = provider.transition_log_prob(data.sample, output, data.prev_sample, data.coef)
    return torch.autograd.grad(log_prob, output, data.advantage)


def _policy(data: SimpleNamespace, *, is_on_policy: bool) -> tuple[Tensor | None, ...]:
    return data.prev_sample, data.coef, None if is_on_policy else data.old_log_prob, data.advantage


def _policy_loss(provider: Any, data: SimpleNamespace, *, is_on_policy: bool = False) -> Outputs:
    output = data.output.detach().requires_grad_()
    loss, _ = provider.transition_policy_loss(data.sample, output, *_policy(data, is_on_policy=is_on_policy), **CLIP)
    return loss.detach(), *torch.autograd.grad(loss.sum(), output)


def _policy_grad(provider: Any, data: SimpleNamespace, *, is_on_policy: bool = False) -> Outputs:
    rows = _policy(data, is_on_policy=is_on_policy)
    loss, _, grad, _ = provider.transition_policy_grad(data.sample, data.output, *rows, **CLIP)
    return loss, grad


def _kl(provider: Any, data: SimpleNamespace) -> Outputs:
    output = data.output.detach().requires_grad_()
    kl = provider.gaussian_kl(output, data.ref_output, data.coef)
    return kl.detach(), *torch.autograd.grad(kl.sum(), output)


def _correlation(provider: Any, data: SimpleNamespace) -> Outputs:
    return (provider.correlation(data.sample, data.prev_sample),)


def _correlations(provider: Any, data: SimpleNamespace) -> Outputs:
    return (provider.correlations(data.stack, data.prev_sample),)


def _exactly(call: Call) -> Callable[[SimpleNamespace, Outputs], Outputs]:
    return lambda data, _: call(reference, data)


TIMED = [
    Timed(
        name="transition_step_with_x0",
        timed="guided, with prev_x0",
        call=_step_with_x0,
        exact=_exact_step_with_x0,
        test_names=("transition", "step"),
        is_guided=True,
    ),
    Timed(
        name="transition_policy_grad",
        timed="loss with its gradient",
        call=_policy_grad,
        exact=_exactly(_policy_grad),
        test_names=("policy", "training_step"),
        graph_call=_policy_loss,
        graph_function="transition_policy_loss",
        with_gradient=True,
    ),
    Timed(
        name="transition_policy_grad_on_policy",
        timed="loss with its gradient",
        call=partial(_policy_grad, is_on_policy=True),
        exact=_exactly(partial(_policy_grad, is_on_policy=True)),
        test_names=("policy", "training_step"),
        graph_call=partial(_policy_loss, is_on_policy=True),
        graph_function="transition_policy_loss",
    ),
    Timed(
        name="transition_step",
        timed="guided",
        call=_step,
        exact=_exact_step,
        test_names=("transition", "step"),
        is_guided=True,
    ),
    Timed(
        name="transition_policy_loss",
        timed="forward and backward",
        call=_policy_loss,
        exact=_exactly(_policy_loss),
        test_names=("policy", "training_step"),
        with_gradient=True,
    ),
    Timed(
        name="transition_log_prob",
        timed="forward",
        call=_log_prob,
        exact=_exactly(_log_prob),
        test_names=("transition", "log_prob"),
    ),
    Timed(
        name="transition_log_prob_grad",
        timed="gradient",
        call=_log_prob_grad,
        exact=_exactly(_log_prob_grad),
        test_names=("transition", "log_prob"),
        graph_call=_log_prob_by_autograd,
        graph_function="transition_log_prob",
    ),
    Timed(
        name="correlation",
        timed="at once",
        call=_correlation,
        exact=_exactly(_correlation),
        test_names=("correlation",),
    ),
    Timed(
        name="correlations",
        timed=f"{NUM_STACKED} with one",
        call=_correlations,
        exact=_exactly(_correlations),
        test_names=("correlation",),
        k=NUM_STACKED,
    ),
    Timed(
        name="gaussian_kl",
        timed="forward and backward",
        call=_kl,
        exact=_exactly(_kl),
        test_names=("kl",),
        with_gradient=True,
    ),
]
NOT_TIMED = {
    "guided_transition_log_prob": "transition_log_prob with one more model output",
    "clipped_policy_loss": "a few numbers a row",
    "dpok_policy_loss": "a few numbers a row",
    "correlation_update": "correlation with another finish",
}
