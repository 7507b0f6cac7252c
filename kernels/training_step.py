# ruff: noqa: N803 -- compile-time constants are upper case, as Triton writes them
# pyright: reportGeneralTypeIssues=false
"""The loss of a whole training step of a row: guidance, log-probability, ratio, clip and KL; differentiable.

Bytes moved a row of d elements, e bytes an element: the loss reads 3 d e (4 d e with guidance), and d e more if a
reference output is given; the gradient reads the same and writes d e (2 d e with guidance). Nothing of size d is kept
between the two: the gradient needs one slope a row, dloss / dlog_prob. Launches: 2 forward, 1 backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .library import WAVE, launch, register
from .policy_loss import clip_bounds, clipped_loss_of, is_ppo
from .rows import BLOCK, arranged, coefficients, load_sum, split, vector
from .transition import (
    each_gradient,
    fake_gradients,
    is_gaussian,
    launch_gradient,
    log_prob_of,
    new_gradients,
    residual_square_kernel,
    residual_weight,
    shift_weight,
    weight_of,
)

STATISTICS: tuple[str, ...] = (
    "log_prob", "ratio", "approx_kl", "clipfrac", "kl", "nonfinite", "output_gradient"
)  # fmt: skip


@triton.jit
def slope_of(
    partial_ptr, coef_ptr, old_log_prob_ptr, advantage_ptr, row, d, num_chunks, low, high, kl_weight, guidance_scale,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_PENALTY: tl.constexpr,
    IS_PPO: tl.constexpr, IS_GAUSSIAN: tl.constexpr, IS_GUIDED: tl.constexpr, NEEDS_UNCOND: tl.constexpr,
    SUMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dloss / dlog_prob of a row from its partial sums; then its loss and STATISTICS.

    `coef_ptr` is that of the row. Without old_log_prob the ratio is 1 and the slope -advantage, whatever the sums are.
    """
    partial_ptr += row * SUMS * num_chunks
    square = load_sum(partial_ptr, num_chunks, WIDTH)
    log_prob = log_prob_of(square / d, coef_ptr, IS_GAUSSIAN)
    advantage = tl.load(advantage_ptr + row)
    if HAS_OLD:
        old_log_prob = tl.load(old_log_prob_ptr + row)
        loss, ratio, slope = clipped_loss_of(log_prob, old_log_prob, advantage, low, high, IS_PPO)
    else:
        old_log_prob = log_prob
        ratio = 1.0 + (log_prob - old_log_prob)  # NaN unless log_prob is finite
        loss, slope = -advantage * ratio, -advantage
    of_residual = slope * residual_weight(coef_ptr, d, IS_GAUSSIAN)
    gradient = tl.where(slope == 0, 0.0, of_residual * of_residual * square)  # not NaN where the square overflows
    kl = tl.zeros((), tl.float32)
    if HAS_REF:
        shift_square = load_sum(partial_ptr + num_chunks, num_chunks, WIDTH)
        of_kl = shift_weight(coef_ptr, d)
        kl = 0.5 * of_kl * shift_square
        if HAS_PENALTY:
            loss += kl_weight * kl
            of_shift = kl_weight * of_kl
            product = load_sum(partial_ptr + 2 * num_chunks, num_chunks, WIDTH)
            gradient += of_shift * (2 * of_residual * product + of_shift * shift_square)
            gradient = tl.where(gradient < 0, 0.0, gradient)
    if IS_GUIDED:
        share = guidance_scale * guidance_scale
        if NEEDS_UNCOND:
            share += (1 - guidance_scale) * (1 - guidance_scale)
        gradient *= share
    log_ratio = log_prob - old_log_prob
    is_finite = (tl.abs(log_prob) < float("inf")) & (tl.abs(ratio) < float("inf"))
    approx_kl, clipfrac = 0.5 * log_ratio * log_ratio, ((ratio < low) | (ratio > high)).to(tl.float32)
    return slope, loss, log_prob, ratio, approx_kl, clipfrac, kl, 1.0 - is_finite.to(tl.float32), tl.sqrt(gradient)


@triton.jit
def store_numbers(
    numbers_ptr, row, n, is_first, loss, log_prob, ratio, approx_kl, clipfrac, kl, nonfinite, output_gradient
):  # fmt: skip
    """The loss and STATISTICS of a row, in [8, n]."""
    stride = tl.cast(n, tl.int64)
    numbers_ptr += row
    tl.store(numbers_ptr, loss, mask=is_first)
    tl.store(numbers_ptr + stride, log_prob, mask=is_first)
    tl.store(numbers_ptr + 2 * stride, ratio, mask=is_first)
    tl.store(numbers_ptr + 3 * stride, approx_kl, mask=is_first)
    tl.store(numbers_ptr + 4 * stride, clipfrac, mask=is_first)
    tl.store(numbers_ptr + 5 * stride, kl, mask=is_first)
    tl.store(numbers_ptr + 6 * stride, nonfinite, mask=is_first)
    tl.store(numbers_ptr + 7 * stride, output_gradient, mask=is_first)


@triton.jit
def policy_loss_kernel(
    numbers_ptr, loss_ptr, slope_ptr, partial_ptr, coef_ptr, old_log_prob_ptr, advantage_ptr, kl_weights_ptr, n, d,
    num_chunks, coef_stride, low, high, kl_weight, guidance_scale, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_PENALTY: tl.constexpr, HAS_KL_WEIGHTS: tl.constexpr, HAS_SLOPE: tl.constexpr, IS_PPO: tl.constexpr,
    IS_GAUSSIAN: tl.constexpr, IS_GUIDED: tl.constexpr, NEEDS_UNCOND: tl.constexpr, SUMS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Finish: loss, statistics and slope of a row."""
    row = tl.program_id(0).to(tl.int64)
    slope, loss, log_prob, ratio, approx_kl, clipfrac, kl, nonfinite, output_gradient = slope_of(
        partial_ptr, coef_ptr + row * coef_stride, old_log_prob_ptr, advantage_ptr, row, d, num_chunks, low, high,
        weight_of(kl_weight, kl_weights_ptr, row, HAS_KL_WEIGHTS), guidance_scale,
        HAS_OLD, HAS_REF, HAS_PENALTY, IS_PPO, IS_GAUSSIAN, IS_GUIDED, NEEDS_UNCOND, SUMS, WIDTH,
    )  # fmt: skip
    store_numbers(
        numbers_ptr, row, n, True, loss, log_prob, ratio, approx_kl, clipfrac, kl, nonfinite, output_gradient
    )  # fmt: skip
    if HAS_SLOPE:
        tl.store(loss_ptr + row, loss)
        tl.store(slope_ptr + row, slope)


class Inputs:
    """The arguments of a training step, checked and arranged: what both of its operations launch with."""

    def __init__(
        self, sample: Tensor, output: Tensor, output_uncond: Tensor | None, prev_sample: Tensor,
        ref_output: Tensor | None, kl_weight: float, kl_weights: Tensor | None, coef: Tensor,
        old_log_prob: Tensor | None, advantage: Tensor, rows: Tensor | None, needs_uncond: bool,
    ) -> None:  # fmt: skip
        uncond = output if output_uncond is None else output_uncond
        ref = output if ref_output is None else ref_output
        self.n, self.d, (*self.latents, self.ref) = arranged(
            "sample output output_uncond prev_sample ref_output", sample, output, uncond, prev_sample, ref, rows=rows
        )
        check_vectors(self.n, coef.device, old_log_prob=old_log_prob, advantage=advantage)
        self.coef, self.advantage = coefficients("coef", coef, self.n, 3), vector(advantage)
        self.old = self.coef if old_log_prob is None else vector(old_log_prob)
        self.rows, self.places = rows, self.coef if rows is None else rows
        self.kl_weight = kl_weight
        self.kl_weights = self.coef if kl_weights is None else vector(kl_weights)
        self.num_chunks, self.chunk, self.width = split(self.d)
        self.sums = 1 if ref_output is None else 3 if kl_weight != 0 else 2
        self.strides = [x.stride(0) for x in (*self.latents, self.ref)]
        self.is_guided, self.needs_uncond = output_uncond is not None, needs_uncond
        self.flags = {
            "IS_GUIDED": self.is_guided,
            "NEEDS_UNCOND": needs_uncond,
            "HAS_REF": ref_output is not None,
            "HAS_PENALTY": self.sums == 3,
            "HAS_KL_WEIGHTS": kl_weights is not None,
            "SUMS": self.sums,
        }

    def sum_chunks(
        self, guidance_scale: float, gradients: tuple[Tensor, Tensor], scale: float, scales: Tensor | None,
        *, is_on_policy: bool, is_gaussian: bool,
    ) -> Tensor:  # fmt: skip
        """The partial sums [n, sums, chunks]; on policy the gradients are written as well."""
        partial = torch.empty((self.n, self.sums, self.num_chunks), device=self.coef.device, dtype=torch.float32)
        sample, output, uncond, prev_sample = self.latents
        launch(
            residual_square_kernel, (self.n, self.num_chunks), partial, *gradients, sample, output, uncond,
            prev_sample, self.ref, self.places, self.coef, self.advantage, self.kl_weights,
            self.coef if scales is None else vector(scales), self.d, self.chunk, self.num_chunks, *self.strides, self.d,
            self.coef.stride(0), guidance_scale, self.kl_weight, scale, HAS_ROWS=self.rows is not None,
            HAS_SCALES=scales is not None, IS_ON_POLICY=is_on_policy, IS_GAUSSIAN=is_gaussian, BLOCK=BLOCK,
            **self.flags,
        )  # fmt: skip
        return partial

    def finish(
        self, partial: Tensor, apart: tuple[Tensor, Tensor] | None, low: float, high: float, guidance_scale: float,
        *, has_old: bool, is_ppo: bool, is_gaussian: bool,
    ) -> Tensor:  # fmt: skip
        """Loss and statistics [8, n], from the partial sums; writes losses and slopes apart as well, if asked for."""
        numbers = new_numbers(self.coef, self.n)
        launch(
            policy_loss_kernel, (self.n,), numbers, *((numbers, numbers) if apart is None else apart), partial,
            self.coef, self.old, self.advantage, self.kl_weights, self.n, self.d, self.num_chunks,
            self.coef.stride(0), low, high, self.kl_weight, guidance_scale, HAS_OLD=has_old,
            HAS_SLOPE=apart is not None, IS_PPO=is_ppo,
            IS_GAUSSIAN=is_gaussian, WIDTH=self.width, num_threads=WAVE, **self.flags,
        )  # fmt: skip
        return numbers


def _policy_loss(
    sample: Tensor, output: Tensor, output_uncond: Tensor | None, guidance_scale: float, prev_sample: Tensor,
    ref_output: Tensor | None, kl_weight: float, kl_weights: Tensor | None, coef: Tensor, old_log_prob: Tensor | None,
    advantage: Tensor, rows: Tensor | None, low: float, high: float, is_ppo: bool, is_gaussian: bool,
    needs_uncond: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = Inputs(
        sample, output, output_uncond, prev_sample, ref_output, kl_weight, kl_weights, coef, old_log_prob, advantage,
        rows, needs_uncond,
    )  # fmt: skip
    nothing = (inputs.coef, inputs.coef)
    partial = inputs.sum_chunks(guidance_scale, nothing, 1.0, None, is_on_policy=False, is_gaussian=is_gaussian)
    loss, slope = (torch.empty(inputs.n, device=coef.device, dtype=torch.float32) for _ in range(2))
    numbers = inputs.finish(
        partial, (loss, slope), low, high, guidance_scale,
        has_old=old_log_prob is not None, is_ppo=is_ppo, is_gaussian=is_gaussian,
    )  # fmt: skip
    return loss, numbers, slope


def _policy_loss_backward(
    grad: Tensor, slope: Tensor, sample: Tensor, output: Tensor, output_uncond: Tensor | None, guidance_scale: float,
    prev_sample: Tensor, ref_output: Tensor | None, kl_weight: float, kl_weights: Tensor | None, coef: Tensor,
    rows: Tensor | None, is_gaussian: bool, needs_uncond: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = Inputs(
        sample, output, output_uncond, prev_sample, ref_output, kl_weight, kl_weights, coef, None, slope, rows,
        needs_uncond,
    )  # fmt: skip
    gradients = new_gradients(inputs.latents[0], output, output_uncond, needs_uncond)
    launch_gradient(
        each_gradient(gradients, inputs.n), vector(grad), vector(slope), inputs.d, inputs.latents,
        None if ref_output is None else inputs.ref, rows, inputs.coef, guidance_scale, kl_weight,
        None if kl_weights is None else inputs.kl_weights, is_guided=inputs.is_guided, needs_uncond=needs_uncond,
        is_gaussian=is_gaussian,
    )  # fmt: skip
    return gradients


def check_vectors(n: int, device: torch.device, **vectors: Tensor | None) -> None:
    """A ValueError unless all are [n] and on the device."""
    for name, x in vectors.items():
        if x is not None and (x.shape != (n,) or x.device != device):
            raise ValueError(f"{name} must be [{n}] on {device}, one for each row, not {list(x.shape)} on {x.device}")


def split_weight(name: str, weight: float | Tensor, n: int) -> tuple[float, Tensor | None]:
    """The two factors of a weight: one number, and one for each row."""
    if not isinstance(weight, Tensor):
        return weight, None
    if weight.shape != (n,):
        raise ValueError(f"{name} must be a number or [{n}], one for each row, not {list(weight.shape)}")
    return 1.0, weight


def new_numbers(like: Tensor, n: int) -> Tensor:
    """Memory for the loss and the statistics, a row for each."""
    return torch.empty((1 + len(STATISTICS), n), device=like.device, dtype=torch.float32)


def named(numbers: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, statistics by name) of what a finish has written: views of it."""
    loss, *statistics = numbers.unbind()
    return loss, dict(zip(STATISTICS, statistics, strict=True))


policy_loss_op = register(
    "transition_policy_loss(Tensor sample, Tensor output, Tensor? output_uncond, float guidance_scale, "
    "Tensor prev_sample, Tensor? ref_output, float kl_weight, Tensor? kl_weights, Tensor coef, Tensor? old_log_prob, "
    "Tensor advantage, Tensor? rows, float low, float high, bool is_ppo, bool is_gaussian, bool needs_uncond) "
    "-> (Tensor, Tensor, Tensor)",
    _policy_loss,
    lambda sample, output, *_: (
        output.new_empty(len(output), dtype=torch.float32),
        new_numbers(output, len(output)),
        output.new_empty(len(output), dtype=torch.float32),
    ),
)
policy_loss_backward_op = register(
    "transition_policy_loss_backward(Tensor grad, Tensor slope, Tensor sample, Tensor output, Tensor? output_uncond, "
    "float guidance_scale, Tensor prev_sample, Tensor? ref_output, float kl_weight, Tensor? kl_weights, Tensor coef, "
    "Tensor? rows, bool is_gaussian, bool needs_uncond) -> (Tensor, Tensor)",
    _policy_loss_backward,
    lambda grad, slope, sample, output, output_uncond, *rest: fake_gradients(sample, output, output_uncond, rest[-1]),
)


class _PolicyLoss(Function):
    @staticmethod
    def forward(*inputs):  # pyright: ignore
        return policy_loss_op(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):  # pyright: ignore
        sample, model_output, output_uncond, ctx.guidance_scale, prev_sample, *rest = inputs
        ref_output, ctx.kl_weight, kl_weights, coef, _, _, rows, *_, ctx.is_gaussian, _ = rest
        _, numbers, slope = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(numbers, slope)
        ref_output = ref_output if ctx.kl_weight != 0 else None
        ctx.save_for_backward(
            slope, sample, model_output, output_uncond, prev_sample, ref_output, kl_weights, coef, rows
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):  # pyright: ignore
        slope, sample, output, output_uncond, prev_sample, ref_output, kl_weights, coef, rows = ctx.saved_tensors
        needs_uncond = output_uncond is not None and ctx.needs_input_grad[2]
        gradients = policy_loss_backward_op(
            grad, slope, sample, output, output_uncond, ctx.guidance_scale, prev_sample, ref_output, ctx.kl_weight,
            kl_weights, coef, rows, ctx.is_gaussian, needs_uncond,
        )  # fmt: skip
        grad_output, grad_uncond = each_gradient(gradients, len(output))
        return None, grad_output, grad_uncond if needs_uncond else None, *(None,) * 14


def transition_policy_loss(
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
    rows: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`reference.transition_policy_loss`."""
    needs_uncond = output_uncond is not None and output_uncond.requires_grad
    loss, numbers, _ = _PolicyLoss.apply(  # pyright: ignore
        sample, output, output_uncond, guidance_scale, prev_sample, ref_output,
        *penalty(kl_weight, ref_output, len(output)), coef, old_log_prob, advantage, rows,
        *clip_bounds(clip_range, clip_range_high), is_ppo(clip), is_gaussian(kind), needs_uncond,
    )  # fmt: skip
    return loss, named(numbers)[1]


def penalty(kl_weight: float | Tensor, ref_output: Tensor | None, n: int) -> tuple[float, Tensor | None]:
    """The two factors of the KL's weight; a ValueError if there is a weight and nothing to weigh."""
    if ref_output is None and (isinstance(kl_weight, Tensor) or kl_weight != 0):
        raise ValueError(
            f"kl_weight = {kl_weight} needs ref_output, the reference policy's output; pass it or set kl_weight = 0"
        )
    return split_weight("kl_weight", kl_weight, n)
