# ruff: noqa: N803 -- compile-time constants are upper case, as Triton writes them
# pyright: reportGeneralTypeIssues=false
"""The loss of a whole training step and its gradient in the model outputs, without a graph, in 2 launches.

Bytes moved: those of `training_step.py`. The first launch takes the partial sums. Each program of the second derives
its row's slope, dloss / dlog_prob, from the row's at most 16 partial sums; the first program of a row writes the loss
and the statistics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .library import launch, register
from .policy_loss import clip_bounds, is_ppo
from .rows import BLOCK, aligned, cdiv, vector
from .training_step import (
    STATISTICS,
    new_losses,
    old_vector,
    penalty,
    row_weights,
    slope_of,
    split_weight,
    store_policy_gradients,
    weight_of,
)
from .transition import gradients, is_gaussian, residual_square


@triton.jit
def policy_grad_kernel(
    grad_output_ptr, grad_uncond_ptr, loss_ptr, statistics_ptr, partial_ptr, kl_partial_ptr, old_log_prob_ptr,
    advantage_ptr, kl_weights_ptr, scales_ptr, sample_ptr, output_ptr, uncond_ptr, prev_ptr, ref_ptr, coef_ptr, n, d,
    sample_stride, output_stride, uncond_stride, prev_stride, ref_stride, guidance_scale, low, high, kl_weight, scale,
    IS_GUIDED: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_PENALTY: tl.constexpr,
    HAS_KL_WEIGHTS: tl.constexpr, HAS_SCALES: tl.constexpr, IS_PPO: tl.constexpr, IS_GAUSSIAN: tl.constexpr,
    NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient; from the first program of each row, its loss and statistics too."""
    row = tl.program_id(0).to(tl.int64)
    mask = row < n
    kl_weight = weight_of(kl_weight, kl_weights_ptr, row, mask, HAS_KL_WEIGHTS)
    slope = slope_of(
        loss_ptr, statistics_ptr, partial_ptr, kl_partial_ptr, coef_ptr, old_log_prob_ptr, advantage_ptr, row, mask,
        tl.program_id(1) == 0, n, d, low, high, kl_weight,
        HAS_OLD, HAS_REF, HAS_PENALTY, IS_PPO, IS_GAUSSIAN, NUM_SPLITS,
    )  # fmt: skip
    store_policy_gradients(
        grad_output_ptr, grad_uncond_ptr, weight_of(scale, scales_ptr, row, mask, HAS_SCALES), slope, kl_weight,
        sample_ptr, output_ptr, uncond_ptr, prev_ptr, ref_ptr, coef_ptr, d, sample_stride, output_stride,
        uncond_stride, prev_stride, ref_stride, guidance_scale,
        IS_GUIDED, IS_GUIDED, HAS_PENALTY, IS_GAUSSIAN, BLOCK,
    )  # fmt: skip


def _policy_grad(
    sample: Tensor, output: Tensor, output_uncond: Tensor | None, guidance_scale: float, prev_sample: Tensor,
    ref_output: Tensor | None, kl_weight: float, kl_weights: Tensor | None, coef: Tensor, old_log_prob: Tensor | None,
    advantage: Tensor, low: float, high: float, is_ppo: bool, is_gaussian: bool, scale: float, scales: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    coef, is_guided = vector(coef), output_uncond is not None
    partials = residual_square(sample, output, output_uncond, guidance_scale, prev_sample, ref_output, coef)
    (n, num_splits), d = partials[0].shape, sample.shape[1:].numel()
    old, advantage = old_vector(coef, old_log_prob, advantage), vector(advantage)
    loss, statistics = coef.new_empty(n), coef.new_empty(len(STATISTICS), n)
    grad_output, grad_uncond = gradients(output, output_uncond, is_guided)
    uncond = output if output_uncond is None else output_uncond
    ref = output if ref_output is None else ref_output
    latents, strides = zip(*(aligned(x) for x in (sample, output, uncond, prev_sample, ref)), strict=True)
    launch(
        policy_grad_kernel, (n, cdiv(d, BLOCK)), grad_output, grad_uncond, loss, statistics, *partials, old,
        advantage, row_weights(kl_weights, coef), row_weights(scales, coef), *latents, coef, n, d, *strides,
        guidance_scale, low, high, kl_weight, scale, IS_GUIDED=is_guided, HAS_OLD=old_log_prob is not None,
        HAS_REF=ref_output is not None, HAS_PENALTY=kl_weight != 0, HAS_KL_WEIGHTS=kl_weights is not None,
        HAS_SCALES=scales is not None, IS_PPO=is_ppo, IS_GAUSSIAN=is_gaussian, NUM_SPLITS=num_splits, BLOCK=BLOCK,
    )  # fmt: skip
    return loss, statistics, grad_output, grad_uncond


policy_grad_op = register(
    "transition_policy_grad(Tensor sample, Tensor output, Tensor? output_uncond, float guidance_scale, "
    "Tensor prev_sample, Tensor? ref_output, float kl_weight, Tensor? kl_weights, Tensor coef, Tensor? old_log_prob, "
    "Tensor advantage, float low, float high, bool is_ppo, bool is_gaussian, float scale, Tensor? scales) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _policy_grad,
    lambda sample, output, output_uncond, *_: (
        *new_losses(sample),
        *gradients(output, output_uncond, needs_uncond=output_uncond is not None),
    ),
)


def transition_policy_grad(
    sample: Tensor,
    output: Tensor,
    prev_sample: Tensor,
    coef: Tensor,
    old_log_prob: Tensor | None,
    advantage: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    output_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    ref_output: Tensor | None = None,
    kl_weight: float | Tensor = 0.0,
    clip: str = "ppo",
    kind: str = "gaussian",
    scale: float | Tensor = 1.0,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor | None]:
    """`reference.transition_policy_grad`."""
    n = len(sample)
    with torch.no_grad():
        loss, statistics, grad_output, grad_uncond = policy_grad_op(
            sample, output, output_uncond, guidance_scale, prev_sample, ref_output,
            *penalty(kl_weight, ref_output, n), coef, old_log_prob, advantage,
            *clip_bounds(clip_range, clip_range_high), is_ppo(clip), is_gaussian(kind),
            *split_weight("scale", scale, n),
        )  # fmt: skip
    stats = dict(zip(STATISTICS, statistics, strict=True))
    return loss, stats, grad_output, None if output_uncond is None else grad_uncond
