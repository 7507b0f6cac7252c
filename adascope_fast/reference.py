"""The mathematics in plain PyTorch: what every kernel must equal, and the path that serves the CPU.

Axes: `n` packed (sample, step) pairs; latents come as [n, ...] and a row is read as one vector of `d` elements.
`coef` [n, 3] is (sample weight, output weight, std) of each row's step: x_next ~ N(a * sample + b * output, std^2 I).

How it differs from ddpo-pytorch and flow_grpo: no scheduler and no step index, only `coef`; float32 inside whatever
dtype the latents have (float64 if one of them is float64, for tests); `prev_sample` is rounded to its storage dtype
before its log-probability is taken, so the first update after a rollout sees a ratio of exactly 1; a row's result does
not depend on the rows beside it. A NaN stays a NaN.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from adascope_fast.reference_correlation import correlation as correlation
from adascope_fast.reference_correlation import correlation_from_state as correlation_from_state
from adascope_fast.reference_correlation import correlation_lags as correlation_lags
from adascope_fast.reference_correlation import correlation_lags_update as correlation_lags_update
from adascope_fast.reference_correlation import correlation_update as correlation_update
from adascope_fast.reference_rows import as_rows, compute_dtype, row_mean

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def transition_log_prob(
    sample: Float[Tensor, "n *latent"],
    output: Float[Tensor, "n *latent"],
    prev_sample: Float[Tensor, "n *latent"],
    coef: Float[Tensor, "n 3"],
) -> Float[Tensor, " n"]:
    """Mean over d of log N(prev_sample; a * sample + b * output, std^2), in float32; NaN where std = 0.

    The mean, not the sum, follows ddpo-pytorch: clip ranges such as 1e-4 are only meaningful for it.

    Args:
        sample: x_t; no gradient flows to it.
        output: model output at x_t, after guidance; the gradient flows here.
        prev_sample: the x_{t-1} that the rollout drew, as stored; no gradient flows to it.
        coef: (sample weight a, output weight b, std) of each row's step.
    """
    sample, output, prev_sample, coef = as_rows(
        coef, sample=sample.detach(), output=output, prev_sample=prev_sample.detach()
    )
    weight_sample, weight_output, std = coef.split(1, dim=1)
    residual = torch.addcmul(prev_sample, sample, weight_sample, value=-1)
    residual = residual.addcmul_(output, weight_output, value=-1)  # [n, d]
    std = std.squeeze(1)
    return -0.5 * row_mean(residual.square()) / std.square() - std.log() - HALF_LOG_TWO_PI


def guided_transition_log_prob(
    sample: Float[Tensor, "n *latent"],
    output_cond: Float[Tensor, "n *latent"],
    output_uncond: Float[Tensor, "n *latent"] | None,
    guidance_scale: float,
    prev_sample: Float[Tensor, "n *latent"],
    coef: Float[Tensor, "n 3"],
) -> Float[Tensor, " n"]:
    """`transition_log_prob` of the guided output, uncond + guidance_scale * (cond - uncond).

    The gradient flows to both outputs, as in ddpo-pytorch; detach `output_uncond` for flow_grpo's convention.

    Args:
        sample, prev_sample, coef: as in `transition_log_prob`.
        output_cond: model output with the prompt.
        output_uncond: model output without it; None means no guidance.
        guidance_scale: 1 gives the conditional output, up to rounding.
    """
    return transition_log_prob(sample, _guide(output_cond, output_uncond, guidance_scale), prev_sample, coef)


@torch.no_grad()
def transition_step(
    sample: Float[Tensor, "n *latent"],
    output: Float[Tensor, "n *latent"],
    noise: Float[Tensor, "n *latent"],
    coef: Float[Tensor, "n 3"],
    *,
    output_uncond: Float[Tensor, "n *latent"] | None = None,
    guidance_scale: float = 1.0,
) -> tuple[Float[Tensor, "n *latent"], Float[Tensor, " n"]]:
    """One rollout step: prev_sample, in the dtype of `sample`, and the log-probability of prev_sample as stored.

    Carries no gradient. A deterministic step (std = 0) is allowed; its log-probability is NaN.

    Args:
        sample: x_t.
        output: model output at x_t; the conditional one if `output_uncond` is given.
        noise: standard normal, shaped as `sample`.
        coef: as in `transition_log_prob`.
        output_uncond: model output without the prompt; None means no guidance.
        guidance_scale: unused without `output_uncond`.
    """
    output = _guide(output, output_uncond, guidance_scale)
    sample_row, output_row, noise_row, coef_row = as_rows(coef, sample=sample, output=output, noise=noise)
    weight_sample, weight_output, std = coef_row.split(1, dim=1)
    prev_sample = (sample_row * weight_sample).addcmul_(output_row, weight_output).addcmul_(noise_row, std)
    prev_sample = prev_sample.to(sample.dtype).view(sample.shape)
    return prev_sample, transition_log_prob(sample, output, prev_sample, coef)


def clipped_policy_loss(
    log_prob: Float[Tensor, " n"],
    old_log_prob: Float[Tensor, " n"],
    advantage: Float[Tensor, " n"],
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """max(-A r, -A clip(r)) with r = exp(log_prob - old_log_prob), unreduced; and r, without gradient.

    Args:
        log_prob: of the policy being trained; the gradient flows here.
        old_log_prob: of the policy that drew the rollout.
        advantage: A, already clipped if it is to be.
        clip_range, clip_range_high: r is clipped to [1 - clip_range, 1 + clip_range_high]; None means clip_range.
    """
    dtype = torch.promote_types(log_prob.dtype, torch.float32)
    log_prob, advantage = log_prob.to(dtype), advantage.detach().to(dtype)
    old_log_prob = old_log_prob.detach().to(dtype)
    if not log_prob.shape == old_log_prob.shape == advantage.shape:
        raise ValueError(
            "log_prob, old_log_prob and advantage must have one shape, not "
            f"{tuple(log_prob.shape)}, {tuple(old_log_prob.shape)} and {tuple(advantage.shape)}"
        )
    low, high = _clip_bounds(clip_range, clip_range_high)
    ratio = (log_prob - old_log_prob).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))
    return loss, ratio.detach()


def transition_policy_loss(
    sample: Float[Tensor, "n *latent"],
    output: Float[Tensor, "n *latent"],
    prev_sample: Float[Tensor, "n *latent"],
    coef: Float[Tensor, "n 3"],
    old_log_prob: Float[Tensor, " n"],
    advantage: Float[Tensor, " n"],
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    output_uncond: Float[Tensor, "n *latent"] | None = None,
    guidance_scale: float = 1.0,
    ref_output: Float[Tensor, "n *latent"] | None = None,
    kl_weight: float = 0.0,
) -> tuple[Float[Tensor, " n"], dict[str, Tensor]]:
    """The training step of one row: clipped_policy_loss + kl_weight * gaussian_kl, unreduced; and its statistics.

    The statistics carry no gradient: `log_prob`, `ratio`, `approx_kl` (half the squared log-ratio), `clipfrac` (1 where
    the ratio is outside the clip range) and `kl` (0 without `ref_output`), each [n]; `num_nonfinite`, how many rows
    have a log-probability or a ratio that is not finite.

    Args:
        sample, prev_sample, coef: as in `transition_log_prob`.
        output, output_uncond, guidance_scale: as in `transition_step`.
        old_log_prob, advantage, clip_range, clip_range_high: as in `clipped_policy_loss`.
        ref_output: the reference policy's output, after guidance; no gradient flows to it.
        kl_weight: beta; with 0 the KL is only measured.
    """
    if ref_output is None and kl_weight != 0:
        raise ValueError(
            f"kl_weight = {kl_weight} needs ref_output, the reference policy's output; pass it or set kl_weight = 0"
        )
    output = _guide(output, output_uncond, guidance_scale)
    log_prob = transition_log_prob(sample, output, prev_sample, coef)
    clip = {"clip_range": clip_range, "clip_range_high": clip_range_high}
    loss, ratio = clipped_policy_loss(log_prob, old_log_prob, advantage, **clip)
    low, high = _clip_bounds(**clip)
    kl = torch.zeros_like(ratio) if ref_output is None else gaussian_kl(output, ref_output, coef)
    if kl_weight != 0:
        loss = loss + kl_weight * kl
    log_prob, kl = log_prob.detach(), kl.detach()
    return loss, {
        "log_prob": log_prob,
        "ratio": ratio,
        "approx_kl": 0.5 * (log_prob - old_log_prob.detach()).square(),
        "clipfrac": ((ratio < low) | (ratio > high)).to(ratio.dtype),
        "kl": kl,
        "num_nonfinite": (~(log_prob.isfinite() & ratio.isfinite())).sum(),
    }


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


def _guide(output_cond: Tensor, output_uncond: Tensor | None, guidance_scale: float) -> Tensor:
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


def _clip_bounds(clip_range: float, clip_range_high: float | None) -> tuple[float, float]:
    return 1.0 - clip_range, 1.0 + (clip_range if clip_range_high is None else clip_range_high)
