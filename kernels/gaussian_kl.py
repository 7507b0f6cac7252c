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

from .library import WAVE, launch, register
from .rows import (
    BLOCK,
    FOLDED,
    arranged,
    coefficients,
    fills,
    fold,
    load,
    load_sum,
    new_like,
    ordered_sum,
    split,
    vector,
)


@triton.jit
def output_square_kernel(
    partial_ptr, output_ptr, ref_ptr, d, chunk, num_chunks, output_stride, ref_stride, BLOCK: tl.constexpr
):
    """Sum of (output - ref_output)^2 over each chunk of each row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    total = tl.zeros([BLOCK // FOLDED], tl.float32)
    for start in range(0, chunk, BLOCK):
        index = part * chunk + start + tl.arange(0, BLOCK)
        mask = index < d
        shift = load(output_ptr + row * output_stride, index, mask) - load(ref_ptr + row * ref_stride, index, mask)
        total += fold(shift * shift)
    tl.store(partial_ptr + row * num_chunks + part, ordered_sum(total))


@triton.jit
def kl_kernel(kl_ptr, partial_ptr, coef_ptr, d, num_chunks, coef_stride, WIDTH: tl.constexpr):
    """Finish: one number a row."""
    row = tl.program_id(0).to(tl.int64)
    coef_ptr += row * coef_stride
    scale = tl.load(coef_ptr + 1) / tl.load(coef_ptr + 2)
    mean_square = load_sum(partial_ptr + row * num_chunks, num_chunks, WIDTH) / d
    tl.store(kl_ptr + row, 0.5 * scale * scale * mean_square)


@triton.jit
def kl_grad_kernel(
    grad_output_ptr, grad_ptr, output_ptr, ref_ptr, coef_ptr, d, chunk, output_stride, ref_stride, grad_stride,
    coef_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad * b^2 (output - ref_output) / (d * std^2)."""
    row = tl.program_id(0).to(tl.int64)
    coef_ptr += row * coef_stride
    scale = tl.load(coef_ptr + 1) / tl.load(coef_ptr + 2)
    weight = tl.load(grad_ptr + row) * scale * scale / d
    for start in range(0, chunk, BLOCK):
        index = tl.program_id(1) * chunk + start + tl.arange(0, BLOCK)
        mask = index < d
        shift = load(output_ptr + row * output_stride, index, mask) - load(ref_ptr + row * ref_stride, index, mask)
        grad = (weight * shift).to(grad_output_ptr.dtype.element_ty)
        tl.store(grad_output_ptr + row * grad_stride + index, grad, mask=mask)


def _kl(output: Tensor, ref_output: Tensor, coef: Tensor) -> Tensor:
    n, d, latents = arranged("output ref_output", output, ref_output)
    coef, (num_chunks, chunk, width) = coefficients("coef", coef, n, 3), split(d)
    partial = torch.empty((n, num_chunks), device=coef.device, dtype=torch.float32)
    kl = torch.empty(n, device=coef.device, dtype=torch.float32)
    strides = (x.stride(0) for x in latents)
    launch(output_square_kernel, (n, num_chunks), partial, *latents, d, chunk, num_chunks, *strides, BLOCK=BLOCK)
    launch(kl_kernel, (n,), kl, partial, coef, d, num_chunks, coef.stride(0), WIDTH=width, num_threads=WAVE)
    return kl


def _kl_backward(grad: Tensor, output: Tensor, ref_output: Tensor, coef: Tensor) -> Tensor:
    n, d, latents = arranged("output ref_output", output, ref_output)
    coef, (num_chunks, chunk, _) = coefficients("coef", coef, n, 3), split(d)
    grad_output = new_like(latents[0], n, output.dtype)
    launch(
        kl_grad_kernel, (n, num_chunks), grad_output, vector(grad), *latents, coef, d, chunk,
        *(x.stride(0) for x in latents), d, coef.stride(0), BLOCK=BLOCK,
    )  # fmt: skip
    return grad_output


def _fake_gradient(output: Tensor) -> Tensor:
    is_usable = fills(output.shape[1:], output.stride()[1:])
    return new_like(output if is_usable else output.contiguous(), len(output), output.dtype)


kl_op = register(
    "gaussian_kl(Tensor output, Tensor ref_output, Tensor coef) -> Tensor",
    _kl,
    lambda output, *_: output.new_empty(output.shape[0], dtype=torch.float32),
)
kl_backward_op = register(
    "gaussian_kl_backward(Tensor grad, Tensor output, Tensor ref_output, Tensor coef) -> Tensor",
    _kl_backward,
    lambda grad, output, *_: _fake_gradient(output),
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
