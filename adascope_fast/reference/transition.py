"""Log-probability of one step of a sampler, and guidance.

Axes: `n` rows of `d` elements; `coef` [n, 3] is (a, b, std) of x_next ~ N(a * sample + b * output, std^2 I).
"""

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from adascope_fast.reference.rows import as_rows, compute_dtype, row_mean

Kind = Literal["gaussian", "squared_error"]

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def transition_log_prob(
    sample: Float[Tensor, "n *latent"],
    output: Float[Tensor, "n *latent"],
    prev_sample: Float[Tensor, "n *latent"],
    coef: Float[Tensor, "n 3"],
    *,
    kind: Kind = "gaussian",
) -> Float[Tensor, " n"]:
    """Mean over d of log N(prev_sample; a * sample + b * output, std^2), in float32; NaN where std = 0.

    The mean, not the sum, follows ddpo-pytorch: clip ranges such as 1e-4 are only meaningful for it.

    Args:
        sample: x_t; no gradient flows to it.
        output: model output at x_t, after guidance; the gradient flows here.
        prev_sample: the x_{t-1} that the rollout drew, as stored; no gradient flows to it.
        coef: (sample weight a, output weight b, std) of each row's step.
        kind: "squared_error" gives -mean (prev_sample - a * sample - b * output)^2 instead, whatever std is.
    """
    check_choice("kind", kind, Kind)
    sample, output, prev_sample, coef = as_rows(
        coef, sample=sample.detach(), output=output, prev_sample=prev_sample.detach()
    )
    weight_sample, weight_output, std = coef.split(1, dim=1)
    residual = torch.addcmul(prev_sample, sample, weight_sample, value=-1)
    residual = residual.addcmul_(output, weight_output, value=-1)  # [n, d]
    mean_square, std = row_mean(residual.square()), std.squeeze(1)
    if kind == "squared_error":
        return -mean_square
    return -0.5 * mean_square / std.square() - std.log() - HALF_LOG_TWO_PI


def guided_transition_log_prob(
    sample: Float[Tensor, "n *latent"],
    output_cond: Float[Tensor, "n *latent"],
    output_uncond: Float[Tensor, "n *latent"] | None,
    guidance_scale: float,
    prev_sample: Float[Tensor, "n *latent"],
    coef: Float[Tensor, "n 3"],
    *,
    kind: Kind = "gaussian",
) -> Float[Tensor, " n"]:
    """`transition_log_prob` of the guided output, uncond + guidance_scale * (cond - uncond).

    The gradient flows to both outputs, as in ddpo-pytorch; detach `output_uncond` for flow_grpo's convention.

    Args:
        sample, prev_sample, coef, kind: as in `transition_log_prob`.
        output_cond: model output with the prompt.
        output_uncond: model output without it; None means no guidance.
        guidance_scale: 1 gives the conditional output, up to rounding.
    """
    output = guide(output_cond, output_uncond, guidance_scale)
    return transition_log_prob(sample, output, prev_sample, coef, kind=kind)


def guide(output_cond: Tensor, output_uncond: Tensor | None, guidance_scale: float) -> Tensor:
    """uncond + guidance_scale * (cond - uncond), in the dtype of computation; `output_cond` itself without guidance."""
    if output_uncond is None:
        return output_cond
    if output_cond.shape != output_uncond.shape:
        raise ValueError(
            f"output_uncond must have output's shape {list(output_cond.shape)}, not {list(output_uncond.shape)}"
        )
    dtype = compute_dtype(output_cond, output_uncond)
    output_cond, output_uncond = output_cond.to(dtype), output_uncond.to(dtype)
    return torch.add(output_uncond, output_cond - output_uncond, alpha=guidance_scale)


def check_choice(name: str, value: str, choices: Any) -> None:
    """A ValueError unless the value is one of the literal type's."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, not {value!r}")
