"""One step of a sampler, its log-probability and its KL: the part of `reference` that reads latents.

Axes: `n` rows of `d` elements; `coef` [n, 3] is (a, b, std) of x_next ~ N(a * sample + b * output, std^2 I).
"""

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from adascope_fast.reference_correlation import correlation_update
from adascope_fast.reference_rows import as_rows, compute_dtype, row_mean

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


@torch.no_grad()
def transition_step(
    sample: Float[Tensor, "n *latent"],
    output: Float[Tensor, "n *latent"],
    noise: Float[Tensor, "n *latent"],
    coef: Float[Tensor, "n 3"],
    *,
    output_uncond: Float[Tensor, "n *latent"] | None = None,
    guidance_scale: float = 1.0,
    kind: Kind = "gaussian",
) -> tuple[Float[Tensor, "n *latent"], Float[Tensor, " n"]]:
    """One rollout step: prev_sample, in the dtype of `sample`, and the log-probability of prev_sample as stored.

    Carries no gradient. A deterministic step (std = 0) is allowed; its "gaussian" log-probability is NaN.

    Args:
        sample: x_t.
        output: model output at x_t; the conditional one if `output_uncond` is given.
        noise: standard normal, shaped as `sample`.
        coef, kind: as in `transition_log_prob`.
        output_uncond: model output without the prompt; None means no guidance.
        guidance_scale: unused without `output_uncond`.
    """
    output = guide(output, output_uncond, guidance_scale)
    sample_row, output_row, noise_row, coef_row = as_rows(coef, sample=sample, output=output, noise=noise)
    weight_sample, weight_output, std = coef_row.split(1, dim=1)
    prev_sample = (sample_row * weight_sample).addcmul_(output_row, weight_output).addcmul_(noise_row, std)
    prev_sample = prev_sample.to(sample.dtype).view(sample.shape)
    return prev_sample, transition_log_prob(sample, output, prev_sample, coef, kind=kind)


@torch.no_grad()
def transition_step_with_x0(
    sample: Float[Tensor, "n *latent"],
    output: Float[Tensor, "n *latent"],
    noise: Float[Tensor, "n *latent"],
    coef: Float[Tensor, "n 3"],
    x0_coef: Float[Tensor, "n 2"],
    *,
    prev_x0: Float[Tensor, "n *latent"] | None = None,
    output_uncond: Float[Tensor, "n *latent"] | None = None,
    guidance_scale: float = 1.0,
    kind: Kind = "gaussian",
) -> tuple[Float[Tensor, "n *latent"], Float[Tensor, " n"], Float[Tensor, "n *latent"], Float[Tensor, "n 6"] | None]:
    """`transition_step`'s two results, x0 as predicted in this step, and its correlation moments with `prev_x0`.

    x0 = c0 * sample + c1 * output, in the dtype of `sample`. The moments are those of x = x0 as stored and y = prev_x0,
    laid out as the state of `correlation_update`; None without `prev_x0`.

    Args:
        sample, output, noise, coef, output_uncond, guidance_scale, kind: as in `transition_step`.
        x0_coef: (c0, c1) of each row's step.
        prev_x0: the x0 that the step before predicted.
    """
    guidance = {"output_uncond": output_uncond, "guidance_scale": guidance_scale}
    prev_sample, log_prob = transition_step(sample, output, noise, coef, **guidance, kind=kind)
    sample_row, output_row = as_rows(None, sample=sample, output=guide(output, **guidance))
    if x0_coef.shape != (len(sample), 2):
        raise ValueError(f"x0_coef must be [{len(sample)}, 2], one (c0, c1) for each row, not {list(x0_coef.shape)}")
    weight_sample, weight_output = x0_coef.to(sample_row.dtype).split(1, dim=1)
    x0 = (sample_row * weight_sample).addcmul_(output_row, weight_output).to(sample.dtype).view(sample.shape)
    moments = None if prev_x0 is None else correlation_update(coef.new_zeros(len(sample), 6), x0, prev_x0)
    return prev_sample, log_prob, x0, moments


def gaussian_kl(
    output: Float[Tensor, "n *latent"],
    ref_output: Float[Tensor, "n *latent"],
    coef: Float[Tensor, "n 3"],
) -> Float[Tensor, " n"]:
    """Mean over d of KL(policy || reference) of one step, b^2 (output - ref_output)^2 / (2 std^2).

    The true divergence: flow_grpo's code leaves out a factor -dt.

    Args:
        output: the policy's output, after guidance; the gradient flows here.
        ref_output: the reference policy's output at the same x_t; no gradient flows to it.
        coef: as in `transition_log_prob`.
    """
    output, ref_output, coef = as_rows(coef, output=output, ref_output=ref_output.detach())
    _, weight_output, std = coef.unbind(1)
    return 0.5 * (weight_output / std).square() * row_mean((output - ref_output).square())


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
