# ruff: noqa: N803 -- compile-time constants are upper case, as Triton writes them
# pyright: reportGeneralTypeIssues=false
"""The loss of a whole training step and its gradient in the model outputs, without a graph, in 2 launches.

Bytes moved: on policy, where the ratio is 1 and dloss / dlog_prob = -advantage, the first launch reads every latent
once, writes the gradient and leaves partial sums; the second makes loss and statistics of these. Else the first takes
the partial sums, and each program of the second, which reads the latents again, derives its row's slope from them; the
first program of a row writes the loss and the statistics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .library import launch, register
from .policy_loss import clip_bounds, is_ppo
from .rows import BLOCK, load_output, row_of, vector
from .training_step import Inputs, named, new_numbers, penalty, slope_of, split_weight, store_numbers
from .transition import (
    each_gradient,
    fake_gradients,
    gradient_of,
    is_gaussian,
    new_gradients,
    residual_weight,
    shift_weight,
    store_gradients,
    terms_of,
    weight_of,
)


@triton.jit
def policy_grad_kernel(
    grad_output_ptr, grad_uncond_ptr, numbers_ptr, partial_ptr, old_log_prob_ptr, advantage_ptr, kl_weights_ptr,
    scales_ptr, sample_ptr, output_ptr, uncond_ptr, prev_ptr, ref_ptr, rows_ptr, coef_ptr, n, d, chunk, num_chunks,
    sample_stride, output_stride, uncond_stride, prev_stride, ref_stride, grad_stride, coef_stride, guidance_scale,
    low, high, kl_weight, scale, IS_GUIDED: tl.constexpr, NEEDS_UNCOND: tl.constexpr, HAS_ROWS: tl.constexpr,
    HAS_REF: tl.constexpr, HAS_PENALTY: tl.constexpr, HAS_KL_WEIGHTS: tl.constexpr, HAS_SCALES: tl.constexpr,
    IS_PPO: tl.constexpr, IS_GAUSSIAN: tl.constexpr, SUMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient; from the first program of each row, its loss and statistics too."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = row_of(rows_ptr, row, HAS_ROWS)
    coef_ptr += row * coef_stride
    sample_ptr += at * sample_stride
    prev_ptr += at * prev_stride
    output_ptr += row * output_stride
    uncond_ptr += row * uncond_stride
    ref_ptr += row * ref_stride
    grad_output_ptr += row * grad_stride
    grad_uncond_ptr += row * grad_stride
    weight_sample, weight_output = tl.load(coef_ptr), tl.load(coef_ptr + 1)
    # The first block is on its way while the slope is made.
    index = part * chunk + tl.arange(0, BLOCK)
    mask = index < d
    output = load_output(output_ptr, uncond_ptr, guidance_scale, index, mask, IS_GUIDED)
    residual, shift = terms_of(
        output, sample_ptr, prev_ptr, ref_ptr, weight_sample, weight_output, index, mask, HAS_PENALTY
    )
    kl_weight = weight_of(kl_weight, kl_weights_ptr, row, HAS_KL_WEIGHTS)
    slope, loss, log_prob, ratio, approx_kl, clipfrac, kl, nonfinite, output_gradient = slope_of(
        partial_ptr, coef_ptr, old_log_prob_ptr, advantage_ptr, row, d, num_chunks, low, high, kl_weight,
        guidance_scale,
        True, HAS_REF, HAS_PENALTY, IS_PPO, IS_GAUSSIAN, IS_GUIDED, NEEDS_UNCOND, SUMS, WIDTH,  # pyright: ignore
    )  # fmt: skip
    store_numbers(
        numbers_ptr, row, n, part == 0, loss, log_prob, ratio, approx_kl, clipfrac, kl, nonfinite, output_gradient
    )  # fmt: skip
    scale = weight_of(scale, scales_ptr, row, HAS_SCALES)
    of_residual = scale * slope * residual_weight(coef_ptr, d, IS_GAUSSIAN)
    of_shift = scale
    if HAS_PENALTY:
        of_shift = scale * kl_weight * shift_weight(coef_ptr, d)
    gradient = gradient_of(residual, shift, of_residual, of_shift, HAS_PENALTY)
    store_gradients(grad_output_ptr, grad_uncond_ptr, index, gradient, guidance_scale, mask, IS_GUIDED, NEEDS_UNCOND)
    for start in range(part * chunk + BLOCK, (part + 1) * chunk, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < d
        output = load_output(output_ptr, uncond_ptr, guidance_scale, index, mask, IS_GUIDED)
        residual, shift = terms_of(
            output, sample_ptr, prev_ptr, ref_ptr, weight_sample, weight_output, index, mask, HAS_PENALTY
        )
        gradient = gradient_of(residual, shift, of_residual, of_shift, HAS_PENALTY)
        store_gradients(
            grad_output_ptr, grad_uncond_ptr, index, gradient, guidance_scale, mask, IS_GUIDED, NEEDS_UNCOND
        )


def _policy_grad(
    sample: Tensor, output: Tensor, output_uncond: Tensor | None, guidance_scale: float, prev_sample: Tensor,
    ref_output: Tensor | None, kl_weight: float, kl_weights: Tensor | None, coef: Tensor, old_log_prob: Tensor | None,
    advantage: Tensor, rows: Tensor | None, low: float, high: float, is_ppo: bool, is_gaussian: bool,
    needs_uncond: bool, scale: float, scales: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    it = Inputs(
        sample, output, output_uncond, prev_sample, ref_output, kl_weight, kl_weights, coef, old_log_prob, advantage,
        rows, needs_uncond,
    )  # fmt: skip
    made = new_gradients(it.latents[0], output, output_uncond, needs_uncond)
    gradients, is_on_policy = each_gradient(made, it.n), old_log_prob is None
    partial = it.sum_chunks(
        guidance_scale, gradients, scale, scales, is_on_policy=is_on_policy, is_gaussian=is_gaussian
    )
    if is_on_policy:
        numbers = it.finish(
            partial, None, low, high, guidance_scale, has_old=False, is_ppo=is_ppo, is_gaussian=is_gaussian
        )
        return numbers, *made
    numbers = new_numbers(it.coef, it.n)
    launch(
        policy_grad_kernel, (it.n, it.num_chunks), *gradients, numbers, partial, it.old, it.advantage, it.kl_weights,
        it.coef if scales is None else vector(scales), *it.latents, it.ref, it.places, it.coef, it.n, it.d, it.chunk,
        it.num_chunks, *it.strides, it.d, it.coef.stride(0), guidance_scale, low, high, kl_weight, scale,
        HAS_ROWS=rows is not None, HAS_SCALES=scales is not None, IS_PPO=is_ppo, IS_GAUSSIAN=is_gaussian,
        WIDTH=it.width, BLOCK=BLOCK, **it.flags,
    )  # fmt: skip
    return numbers, *made


policy_grad_op = register(
    "transition_policy_grad(Tensor sample, Tensor output, Tensor? output_uncond, float guidance_scale, "
    "Tensor prev_sample, Tensor? ref_output, float kl_weight, Tensor? kl_weights, Tensor coef, Tensor? old_log_prob, "
    "Tensor advantage, Tensor? rows, float low, float high, bool is_ppo, bool is_gaussian, bool needs_uncond, "
    "float scale, Tensor? scales) -> (Tensor, Tensor, Tensor)",
    _policy_grad,
    lambda sample, output, output_uncond, *rest: (
        new_numbers(output, len(output)),
        *fake_gradients(sample, output, output_uncond, rest[-3]),
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
    rows: Tensor | None = None,
    needs_uncond: bool = True,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor | None]:
    """`reference.transition_policy_grad`."""
    n, needs_uncond = len(output), needs_uncond and output_uncond is not None
    with torch.no_grad():
        numbers, *made = policy_grad_op(
            sample, output, output_uncond, guidance_scale, prev_sample, ref_output,
            *penalty(kl_weight, ref_output, n), coef, old_log_prob, advantage, rows,
            *clip_bounds(clip_range, clip_range_high), is_ppo(clip), is_gaussian(kind), needs_uncond,
            *split_weight("scale", scale, n),
        )  # fmt: skip
    grad_output, grad_uncond = each_gradient((made[0], made[1]), n)
    return *named(numbers), grad_output, grad_uncond if needs_uncond else None
