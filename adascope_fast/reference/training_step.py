"""The training step of a row: guidance, log-probability, ratio, clipped loss, KL; and its gradient in the outputs.

Axes: `n` rows of `d` elements; `coef` [n, 3] is (a, b, std) of x_next ~ N(a * sample + b * output, std^2 I).
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from adascope_fast.reference.policy_loss import (
    Clip,
    clip_bounds,
    clipped_policy_loss,
    dpok_policy_loss,
    is_clipped,
)
from adascope_fast.reference.rows import arranged, picked, row_mean
from adascope_fast.reference.transition import Kind, check_choice, guide, log_prob_of, residual_of


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
    rows: Int64[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, " n"], dict[str, Tensor]]:
    """The training step of one row: clipped_policy_loss + kl_weight * gaussian_kl, unreduced; and its statistics.

    The statistics carry no gradient and are [n] each: `log_prob`, `ratio`, `approx_kl` (half the squared log-ratio),
    `clipfrac` (1 where the ratio is outside the clip range), `kl` (0 without `ref_output`), `nonfinite` (1 where the
    log-probability or the ratio is not finite) and `output_gradient` (norm of the gradient of the row's loss in the
    outputs that are differentiated).

    Args:
        sample, prev_sample, coef, kind, rows: as in `transition_log_prob`.
        output, output_uncond, guidance_scale: as in `transition_step`.
        advantage, clip_range, clip_range_high: as in `clipped_policy_loss`.
        old_log_prob: of the policy that drew the rollout; None where that is this one, so that the ratio is 1 exactly
            (NaN where the log-probability is not finite), and dloss / dlog_prob is -advantage.
        ref_output: the reference policy's output, after guidance; no gradient flows to it.
        kl_weight: beta, one for all rows or one for each; with 0 the KL is only measured. Other KLs of the field are
            the true one times a number a row: DPOK's mean (output - ref_output)^2 has 2 std^2 / b^2, flow_grpo's -dt.
        clip: "dpok" takes `dpok_policy_loss` in place of `clipped_policy_loss`.
    """
    check_choice("clip", clip, Clip)
    bounds = {"clip_range": clip_range, "clip_range_high": clip_range_high}
    low, high = clip_bounds(**bounds)
    if ref_output is None and (isinstance(kl_weight, Tensor) or kl_weight != 0):
        raise ValueError(
            f"kl_weight = {kl_weight} needs ref_output, the reference policy's output; pass it or set kl_weight = 0"
        )
    d = output.shape[1:].numel()
    share = _share(output_uncond, guidance_scale)
    output = guide(output, output_uncond, guidance_scale)
    residual, coef = residual_of(picked(sample, rows), output, picked(prev_sample, rows), coef)
    mean_square = row_mean(residual.square())
    log_prob = log_prob_of(mean_square, coef, kind)
    advantage = advantage.detach().to(log_prob.dtype)
    if old_log_prob is None:
        old = log_prob.detach()
        _check_vectors(log_prob, advantage=advantage)
        loss = -advantage * (1 + (log_prob - old))
        ratio, slope = 1 + (log_prob.detach() - old), -advantage
    else:
        old = old_log_prob.detach().to(log_prob.dtype)
        _check_vectors(log_prob, old_log_prob=old, advantage=advantage)
        loss, ratio = (dpok_policy_loss if clip == "dpok" else clipped_policy_loss)(log_prob, old, advantage, **bounds)
        slope = torch.where(is_clipped(ratio, advantage, low, high, clip), 0.0, -advantage * ratio)
    _, weight_output, std = coef.unbind(1)
    of_residual = slope * (weight_output / std.square() if kind == "gaussian" else 2 * weight_output) / d
    gradient = torch.where(slope == 0, 0.0, of_residual.square() * mean_square.detach() * d)
    kl = torch.zeros_like(ratio)
    if ref_output is not None:
        output, ref_output = arranged(None, output=output, ref_output=ref_output.detach())
        shift, of_kl = output - ref_output, (weight_output / std).square() / d
        shift_square = row_mean(shift.square())
        kl = 0.5 * of_kl * d * shift_square
        if isinstance(kl_weight, Tensor) or kl_weight != 0:
            weight = _row_weight("kl_weight", kl_weight, loss)
            loss = loss + weight * kl
            of_shift = weight * of_kl
            product = row_mean(residual.detach() * shift.detach())
            gradient = gradient + of_shift * (2 * of_residual * product + of_shift * shift_square.detach()) * d
    log_prob = log_prob.detach()
    return loss, {
        "log_prob": log_prob,
        "ratio": ratio,
        "approx_kl": 0.5 * (log_prob - old).square(),
        "clipfrac": ((ratio < low) | (ratio > high)).to(ratio.dtype),
        "kl": kl.detach(),
        "nonfinite": (~(log_prob.isfinite() & ratio.isfinite())).to(ratio.dtype),
        "output_gradient": (gradient.clamp(min=0) * share).sqrt(),
    }


def _share(output_uncond: Tensor | None, guidance_scale: float) -> float:
    """Squared norm of the outputs' gradients over that of the guided output's."""
    if output_uncond is None:
        return 1.0
    return guidance_scale**2 + ((1 - guidance_scale) ** 2 if output_uncond.requires_grad else 0.0)


def _check_vectors(log_prob: Tensor, **vectors: Tensor) -> None:
    for name, x in vectors.items():
        if x.shape != log_prob.shape or x.device != log_prob.device:
            raise ValueError(
                f"{name} must be [{len(log_prob)}] on {log_prob.device}, one for each row, "
                f"not {list(x.shape)} on {x.device}"
            )


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
    rows: Int64[Tensor, " n"] | None = None,
    needs_uncond: bool = True,
) -> tuple[Float[Tensor, " n"], dict[str, Tensor], Float[Tensor, "n *latent"], Float[Tensor, "n *latent"] | None]:
    """`transition_policy_loss`'s two results, and the gradient of (scale * loss).sum() in both outputs.

    For a caller who hands the gradient to the model (`output.backward(grad_output)`) and so needs no graph around the
    loss. Carries no gradient itself. The second gradient is None without `output_uncond`.

    Args:
        scale: one number, or one a row; 1 / (number of rows of the update) gives the gradient of its mean.
        needs_uncond: False leaves out the gradient of `output_uncond`, which is None then.
        everything else: as in `transition_policy_loss`.
    """
    given = (output,) if output_uncond is None else (output, output_uncond)
    outputs = [x.detach().requires_grad_(number == 0 or needs_uncond) for number, x in enumerate(given)]
    with torch.enable_grad():
        loss, stats = transition_policy_loss(
            sample, outputs[0], prev_sample, coef, old_log_prob, advantage, clip_range=clip_range,
            clip_range_high=clip_range_high, output_uncond=outputs[1] if len(outputs) == 2 else None,
            guidance_scale=guidance_scale, ref_output=ref_output, kl_weight=kl_weight, clip=clip, kind=kind, rows=rows,
        )  # fmt: skip
        weight = _row_weight("scale", scale, loss)
        wanted = [x for x in outputs if x.requires_grad]
        grad_output, *rest = torch.autograd.grad((weight * loss).sum(), wanted)
    return loss.detach(), stats, grad_output, rest[0] if rest else None


def _row_weight(name: str, weight: float | Tensor, loss: Tensor) -> float | Tensor:
    """The weight, without gradient and in the loss' type if it is a tensor; a ValueError unless that is [n]."""
    if not isinstance(weight, Tensor):
        return weight
    if weight.shape != loss.shape:
        raise ValueError(f"{name} must be a number or [{len(loss)}], one for each row, not {list(weight.shape)}")
    return weight.detach().to(loss.dtype)
