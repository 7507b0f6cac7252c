"""Log-probability of one step of a sampler, and guidance.

Axes: `n` rows of `d` elements; `coef` [n, 3] is (a, b, std) of x_next ~ N(a * sample + b * output, std^2 I).
"""

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from adascope_fast.reference.rows import arranged, compute_dtype, per_row, picked, row_mean

Kind = Literal["gaussian", "squared_error"]

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def transition_log_prob(
    sample: Float[Tensor, "n *latent"],
    output: Float[Tensor, "n *latent"],
    prev_sample: Float[Tensor, "n *latent"],
    coef: Float[Tensor, "n 3"],
    *,
    kind: Kind = "gaussian",
    rows: Int64[Tensor, " n"] | None = None,
) -> Float[Tensor, " n"]:
    """Mean over d of log N(prev_sample; a * sample + b * output, std^2), in float32; NaN where std = 0.

    The mean, not the sum, follows ddpo-pytorch: clip ranges such as 1e-4 are only meaningful for it.

    Args:
        sample: x_t; no gradient flows to it.
        output: model output at x_t, after guidance; the gradient flows here.
        prev_sample: the x_{t-1} that the rollout drew, as stored; no gradient flows to it.
        coef: (sample weight a, output weight b, std) of each row's step.
        kind: "squared_error" gives -mean (prev_sample - a * sample - b * output)^2 instead, whatever std is.
        rows: those of `sample` and `prev_sample` that are meant, which may then be tables of any length; None: all.
            Numbers beyond a table are an error here; the kernels do not look, as that would wait for the GPU.
    """
    residual, coef = residual_of(picked(sample, rows), output, picked(prev_sample, rows), coef)
    return log_prob_of(row_mean(residual.square()), coef, kind)


def residual_of(sample: Tensor, output: Tensor, prev_sample: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    """prev_sample - mean, [n, *latent], and `coef` in its dtype."""
    sample, output, prev_sample, coef = arranged(
        coef, sample=sample.detach(), output=output, prev_sample=prev_sample.detach()
    )
    weight_sample, weight_output, _ = (per_row(column, sample) for column in coef.unbind(1))
    residual = torch.addcmul(prev_sample, sample, weight_sample, value=-1)
    return residual.addcmul_(output, weight_output, value=-1), coef


def log_prob_of(mean_square: Float[Tensor, " n"], coef: Float[Tensor, "n 3"], kind: Kind) -> Float[Tensor, " n"]:
    """The log-probability of rows from the mean of their squared residuals."""
    check_choice("kind", kind, Kind)
    if kind == "squared_error":
        return -mean_square
    std = coef[:, 2]
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
    rows: Int64[Tensor, " n"] | None = None,
) -> Float[Tensor, " n"]:
    """`transition_log_prob` of the guided output, uncond + guidance_scale * (cond - uncond).

    The gradient flows to both outputs, as in ddpo-pytorch; detach `output_uncond` for flow_grpo's convention.

    Args:
        sample, prev_sample, coef, kind, rows: as in `transition_log_prob`.
        output_cond: model output with the prompt.
        output_uncond: model output without it; None means no guidance.
        guidance_scale: 1 gives the conditional output, up to rounding.
    """
    output = guide(output_cond, output_uncond, guidance_scale)
    return transition_log_prob(sample, output, prev_sample, coef, kind=kind, rows=rows)


def transition_log_prob_grad(
    sample: Float[Tensor, "n *latent"],
    output: Float[Tensor, "n *latent"],
    prev_sample: Float[Tensor, "n *latent"],
    coef: Float[Tensor, "n 3"],
    weight: Float[Tensor, " n"],
    *,
    output_uncond: Float[Tensor, "n *latent"] | None = None,
    guidance_scale: float = 1.0,
    kind: Kind = "gaussian",
    rows: Int64[Tensor, " n"] | None = None,
    needs_uncond: bool = True,
) -> tuple[Float[Tensor, "n *latent"], Float[Tensor, "n *latent"] | None]:
    """The gradient of (weight * log_prob).sum() in output and `output_uncond`, in their types: linear in the residual.

    For a caller who has the log-probability already, as the rollout has. The second is None where it is not needed.

    Args:
        weight: of each row.
        needs_uncond: False leaves out the gradient of `output_uncond`.
        everything else: as in `guided_transition_log_prob`.
    """
    if weight.shape != output.shape[:1] or weight.device != output.device:
        raise ValueError(
            f"weight must be [{len(output)}] on {output.device}, not {list(weight.shape)} on {weight.device}"
        )
    check_choice("kind", kind, Kind)
    with torch.no_grad():
        guided = guide(output, output_uncond, guidance_scale)
        residual, coef = residual_of(picked(sample, rows), guided, picked(prev_sample, rows), coef)
        _, b, std = coef.unbind(1)
        slope = weight.to(coef.dtype) * (b / std.square() if kind == "gaussian" else 2 * b) / residual.shape[1:].numel()
        grad = residual.mul_(per_row(slope, residual))
        if output_uncond is None:
            return grad.to(output.dtype), None
        rest = ((1 - guidance_scale) * grad).to(output_uncond.dtype) if needs_uncond else None
        return (guidance_scale * grad).to(output.dtype), rest


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
