# ruff: noqa: N803 -- compile-time constants are upper case, as Triton writes them
# pyright: reportGeneralTypeIssues=false
"""How every kernel reads rows of latents and splits them over programs.

Axes: `n` rows, `d` elements of a row. A row is cut into at most 16 chunks, a function of d alone, not of n nor of the
GPU. The kernels that reduce write one partial result a chunk, and a second launch adds them in index order, so a row's
result is the same bits in any batch and on any run. What else could change the compiled sum is pinned too: rows are
aligned alike or copied, multiply-adds are not fused, and the sums behind a log-probability spell out their order
(`ordered_sum`), so two kernels that write one expression compute one number however their registers are laid out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
LEVELS = tl.constexpr(BLOCK.bit_length() - 1)
NUM_STAGES = tl.constexpr(3)
MAX_SPLITS = 16
MIN_CHUNK = 8192


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def split(d: int) -> tuple[int, int]:
    """(number of chunks of a row, elements of a chunk, a multiple of BLOCK); the last chunks may be short or empty."""
    num_splits = min(MAX_SPLITS, max(1, cdiv(d, MIN_CHUNK)))
    return num_splits, cdiv(d, num_splits * BLOCK) * BLOCK


def check(coef: Tensor | None, **latents: Tensor) -> tuple[int, int]:
    """(n, d) of latents that share one shape [n, ...], with `coef` [n, 3]; a ValueError otherwise."""
    first, *others = latents.values()
    if first.dim() < 2 or any(x.shape != first.shape for x in others):
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in latents.items())
        raise ValueError(f"latents must share one shape [n, ...], not {shapes}")
    n = first.shape[0]
    if coef is not None and coef.shape != (n, 3):
        raise ValueError(f"coef must be [{n}, 3], one (a, b, std) for each row, not {list(coef.shape)}")
    return n, first.shape[1:].numel()


def is_first(name: str, value: str, choices: tuple[str, str]) -> bool:
    """Whether the value is the first of two choices; a ValueError if it is neither."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return value == choices[0]


def aligned(x: Tensor) -> tuple[Tensor, int]:
    """The latents as rows of adjacent elements, and the distance between rows; copied only if they are not so already.

    The first row must start at a multiple of 16 bytes; rows whose length is a multiple of 16 must lie multiples of 16
    apart, others must touch. Then the compiled kernel, and so the order of its sums, depends on d and dtypes alone.
    """
    x = x.detach().flatten(1)
    n, d = x.shape
    stride = d if n == 1 else x.stride(0)
    is_even = x.data_ptr() % 16 == 0 and (stride % 16 == 0 if d % 16 == 0 else stride == d)
    if not is_even or (d > 1 and x.stride(1) != 1):
        return x.clone(memory_format=torch.contiguous_format), d
    return x, stride


def vector(x: Tensor) -> Tensor:
    """One float32 number a row (or `coef`), contiguous: gradients arrive expanded."""
    return x.detach().to(torch.float32).contiguous()


@triton.jit
def load(row_ptr, index, mask):
    """Elements of a row, as float32; 0 beyond its end."""
    return tl.load(row_ptr + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_output(output_row_ptr, uncond_row_ptr, guidance_scale, index, mask, IS_GUIDED: tl.constexpr):
    """Model output after guidance."""
    output = load(output_row_ptr, index, mask)
    if IS_GUIDED:
        uncond = load(uncond_row_ptr, index, mask)
        output = uncond + guidance_scale * (output - uncond)
    return output


@triton.jit
def ordered_sum(values):
    """Sum of BLOCK numbers, neighbours first. Beyond two, `tl.sum` follows the layout of registers, and kernels differ.

    Sums of pairs, not `tl.split`: that moves each pair into one thread, and spilled kilobytes where rows are unaligned.
    """
    for _ in tl.static_range(LEVELS):
        values = tl.sum(tl.reshape(values, [values.shape[0] // 2, 2]), axis=1)
    return tl.sum(values)  # of one number


@triton.jit
def load_sum(partial_ptr, row, mask, NUM_SPLITS: tl.constexpr):
    """Sum of each row's partial results, in index order."""
    total = tl.load(partial_ptr + row * NUM_SPLITS, mask=mask, other=0.0)
    for part in tl.static_range(1, NUM_SPLITS):
        total += tl.load(partial_ptr + row * NUM_SPLITS + part, mask=mask, other=0.0)
    return total
