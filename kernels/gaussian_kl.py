# ruff: noqa: N803 -- compile-time constants are upper case, as Triton writes them
# pyright: reportGeneralTypeIssues=false
"""KL of a Gaussian step from the reference policy's, b^2 (output - ref_output)^2 / (2 std^2), mean over d.

Bytes moved a row of d elements, e bytes an element: forward reads 2 d e, the gradient reads 2 d e and writes d e.
Launches: 2 forward, 1 backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .library import launch, register
from .rows import BLOCK, NUM_STAGES, aligned, cdiv, check, load, load_sum, ordered_sum, split, vector

FINISH_ROWS = 128


@triton.jit
def output_square_kernel(
    partial_ptr, output_ptr, ref_ptr, d, chunk, output_stride, ref_stride,
    NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of (output - ref_output)^2 over each chunk of each row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, chunk, BLOCK, num_stages=NUM_STAGES):
        index = part * chunk + start + tl.arange(0, BLOCK)
        mask = index < d
        shift = load(output_ptr + row * output_stride, index, mask) - load(ref_ptr + row * ref_stride, index, mask)
        total += shift * shift
    tl.store(partial_ptr + row * NUM_SPLITS + part, ordered_sum(total))


@triton.jit
def kl_of(partial_ptr, coef_ptr, row, mask, d, NUM_SPLITS: tl.constexpr):
    """KL of each row from its partial sums of squares."""
    scale = tl.load(coef_ptr + row * 3 + 1, mask=mask, other=0.0)
    scale /= tl.load(coef_ptr + row * 3 + 2, mask=mask, other=1.0)
    return 0.5 * scale * scale * (load_sum(partial_ptr, row, mask, NUM_SPLITS) / d)


@triton.jit
def kl_kernel(kl_ptr, partial_ptr, coef_ptr, n, d, NUM_SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Finish: one number a row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < n
    tl.store(kl_ptr + row, kl_of(partial_ptr, coef_ptr, row, mask, d, NUM_SPLITS), mask=mask)


@triton.jit
def kl_grad_kernel(
    grad_output_ptr, grad_ptr, output_ptr, ref_ptr, coef_ptr, d, output_stride, ref_stride, BLOCK: tl.constexpr
):
    """grad * b^2 (output - ref_output) / (d * std^2)."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < d
    scale = tl.load(coef_ptr + row * 3 + 1) / tl.load(coef_ptr + row * 3 + 2)
    shift = load(output_ptr + row * output_stride, index, mask) - load(ref_ptr + row * ref_stride, index, mask)
    grad = tl.load(grad_ptr + row) * scale * scale / d * shift
    tl.store(grad_output_ptr + row * d + index, grad.to(grad_output_ptr.dtype.element_ty), mask=mask)


def _kl(output: Tensor, ref_output: Tensor, coef: Tensor) -> Tensor:
    n, d = check(coef, output=output, ref_output=ref_output)
    num_splits, chunk = split(d)
    partial = torch.empty(n, num_splits, device=output.device, dtype=torch.float32)
    latents, strides = zip(aligned(output), aligned(ref_output), strict=True)
    constants = {"NUM_SPLITS": num_splits, "BLOCK": BLOCK}
    launch(output_square_kernel, (n, num_splits), partial, *latents, d, chunk, *strides, **constants)
    kl = torch.empty(n, device=output.device, dtype=torch.float32)
    grid = (cdiv(n, FINISH_ROWS),)
    launch(kl_kernel, grid, kl, partial, vector(coef), n, d, NUM_SPLITS=num_splits, ROWS=FINISH_ROWS)
    return kl


def _kl_backward(grad: Tensor, output: Tensor, ref_output: Tensor, coef: Tensor) -> Tensor:
    n, d = check(coef, output=output, ref_output=ref_output)
    grad_output = torch.empty_like(output, memory_format=torch.contiguous_format)
    latents, strides = zip(aligned(output), aligned(ref_output), strict=True)
    grid = (n, cdiv(d, BLOCK))
    launch(kl_grad_kernel, grid, grad_output, vector(grad), *latents, vector(coef), d, *strides, BLOCK=BLOCK)
    return grad_output


kl_op = register(
    "gaussian_kl(Tensor output, Tensor ref_output, Tensor coef) -> Tensor",
    _kl,
    lambda output, *_: output.new_empty(output.shape[0], dtype=torch.float32),
)
kl_backward_op = register(
    "gaussian_kl_backward(Tensor grad, Tensor output, Tensor ref_output, Tensor coef) -> Tensor",
    _kl_backward,
    lambda grad, output, *_: torch.empty_like(output, memory_format=torch.contiguous_format),
)


class _GaussianKl(Function):
    @staticmethod
    def forward(output, ref_output, coef):  # pyright: ignore
        return kl_op(output, ref_output, coef)

    @staticmethod
    def setup_context(ctx, inputs, output):  # pyright: ignore
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore
        return kl_backward_op(grad, *ctx.saved_tensors), None, None


def gaussian_kl(output: Tensor, ref_output: Tensor, coef: Tensor) -> Tensor:
    """`reference.gaussian_kl`."""
    return _GaussianKl.apply(output, ref_output, coef)  # pyright: ignore
