"""The training step of a row: guidance, log-probability, ratio, clipped loss, KL; and its gradient in the outputs.

Axes: `n` rows of `d` elements; `coef` [n, 3] is (a, b, std) of x_next ~ N(a * sample + b * output, std^2 I).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from adascope_fast.reference.gaussian_kl import gaussian_kl
from adascope_fast.reference.policy_loss import Clip, clip_bounds, clipped_policy_loss, dpok_policy_loss
from adascope_fast.reference.transition import Kind, check_choice, guide, transition_log_prob


def transition_policy_loss(
    sample: Float[Tensor, "n *latent"],
    output: Float[Tensor, "n *latent"],
    prev_sample: Float[Tensor, "n *latent"],
    coef: Float[Tensor, "n 3"],
    old_log_prob: Float[Tensor, " n"] | None,
    advantage: Float[Tensor, " n"],
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    output_uncond: Float[Tensor, "n *latent"] | None = None,
    guidance_scale: float = 1.0,
    ref_output: Float[Tensor, "n *latent"] | None = None,
    kl_weight: float | Float[Tensor, " n"] = 0.0,
    clip: Clip = "ppo",
    kind: Kind = "gaussian",
) -> tuple[Float[Tensor, " n"], dict[str, Tensor]]:
    """The training step of one row: clipped_policy_loss + kl_weight * gaussian_kl, unreduced; and its statistics.

    The statistics carry no gradient and are [n] each: `log_prob`, `ratio`, `approx_kl` (half the squared log-ratio),
    `clipfrac` (1 where the ratio is outside the clip range), `kl` (0 without `ref_output`) and `nonfinite` (1 where the
    log-probability or the ratio is not finite).

    Args:
        sample, prev_sample, coef, kind: as in `transition_log_prob`.
        output, output_uncond, guidance_scale: as in `transition_step`.
        advantage, clip_range, clip_range_high: as in `clipped_policy_loss`.
        old_log_prob: of the policy that drew the rollout; None where that is this one, so that the ratio is 1 exactly.
        ref_output: the reference policy's output, after guidance; no gradient flows to it.
        kl_weight: beta, one for all rows or one for each; with 0 the KL is only measured. Other KLs of the field are
            the true one times a number a row: DPOK's mean (output - ref_output)^2 has 2 std^2 / b^2, flow_grpo's -dt.
        clip: "dpok" takes `dpok_policy_loss` in place of `clipped_policy_loss`.
    """
    check_choice("clip", clip, Clip)
    if ref_output is None and (isinstance(kl_weight, Tensor) or kl_weight != 0):
        raise ValueError(
            f"kl_weight = {kl_weight} needs ref_output, the reference policy's output; pass it or set kl_weight = 0"
        )
    output = guide(output, output_uncond, guidance_scale)
    log_prob = transition_log_prob(sample, output, prev_sample, coef, kind=kind)
    old_log_prob = log_prob.detach() if old_log_prob is None else old_log_prob
    clipped_loss = dpok_policy_loss if clip == "dpok" else clipped_policy_loss
    bounds = {"clip_range": clip_range, "clip_range_high": clip_range_high}
    loss, ratio = clipped_loss(log_prob, old_log_prob, advantage, **bounds)
    low, high = clip_bounds(**bounds)
    kl = torch.zeros_like(ratio) if ref_output is None else gaussian_kl(output, ref_output, coef)
    if isinstance(kl_weight, Tensor):
        loss = loss + _row_weight("kl_weight", kl_weight, len(loss)).to(loss.dtype) * kl
    elif kl_weight != 0:
        loss = loss + kl_weight * kl
    log_prob, kl = log_prob.detach(), kl.detach()
    return loss, {
        "log_prob": log_prob,
        "ratio": ratio,
        "approx_kl": 0.5 * (log_prob - old_log_prob.detach()).square(),
        "clipfrac": ((ratio < low) | (ratio > high)).to(ratio.dtype),
        "kl": kl,
        "nonfinite": (~(log_prob.isfinite() & ratio.isfinite())).to(ratio.dtype),
    }


def transition_policy_grad(
    sample: Float[Tensor, "n *latent"],
    output: Float[Tensor, "n *latent"],
    prev_sample: Float[Tensor, "n *latent"],
    coef: Float[Tensor, "n 3"],
    old_log_prob: Float[Tensor, " n"] | None,
    advantage: Float[Tensor, " n"],
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    output_uncond: Float[Tensor, "n *latent"] | None = None,
    guidance_scale: float = 1.0,
    ref_output: Float[Tensor, "n *latent"] | None = None,
    kl_weight: float | Float[Tensor, " n"] = 0.0,
    clip: Clip = "ppo",
    kind: Kind = "gaussian",
    scale: float | Float[Tensor, " n"] = 1.0,
) -> tuple[Float[Tensor, " n"], dict[str, Tensor], Float[Tensor, "n *latent"], Float[Tensor, "n *latent"] | None]:
    """`transition_policy_loss`'s two results, and the gradient of (scale * loss).sum() in both outputs.

    For a caller who hands the gradient to the model (`output.backward(grad_output)`) and so needs no graph around the
    loss. Carries no gradient itself. The second gradient is None without `output_uncond`.

    Args:
        scale: one number, or one a row; 1 / (number of rows of the update) gives the gradient of its mean.
        everything else: as in `transition_policy_loss`.
    """
    outputs = [x.detach().requires_grad_() for x in (output, output_uncond) if x is not None]
    with torch.enable_grad():
        loss, stats = transition_policy_loss(
            sample, outputs[0], prev_sample, coef, old_log_prob, advantage, clip_range=clip_range,
            clip_range_high=clip_range_high, output_uncond=outputs[1] if len(outputs) == 2 else None,
            guidance_scale=guidance_scale, ref_output=ref_output, kl_weight=kl_weight, clip=clip, kind=kind,
        )  # fmt: skip
        weight = _row_weight("scale", scale, len(loss)) if isinstance(scale, Tensor) else scale
        grad_output, *rest = torch.autograd.grad((weight * loss).sum(), outputs)
    return loss.detach(), stats, grad_output, rest[0] if rest else None


def _row_weight(name: str, weight: Tensor, n: int) -> Tensor:
    """The weight without gradient; a ValueError unless it is [n]."""
    if weight.shape != (n,):
        raise ValueError(f"{name} must be a number or [{n}], one for each row, not {list(weight.shape)}")
    return weight.detach()
