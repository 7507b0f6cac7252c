"""One rollout step of a sampler and its log-probability, the clean latents it guesses, and their correlation moments.

Axes: `n` rows of `d` elements; `coef` [n, 3] is (a, b, std) of x_next ~ N(a * sample + b * output, std^2 I).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from adascope_fast.reference.correlation import correlation_update
from adascope_fast.reference.rows import as_rows
from adascope_fast.reference.transition import Kind, guide, transition_log_prob


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
