# ruff: noqa: N803 -- compile-time constants are upper case, as Triton writes them
# pyright: reportGeneralTypeIssues=false
"""How every kernel reads rows of latents and splits them over programs.

Axes: `n` rows, `d` elements of a row, in the order in which they lie in memory: any dense layout will do, channels-last
too, if all latents of a call share it; those that have another are copied to that of the first. A row is cut into at
most 128 chunks, a function of d alone, not of n nor of the GPU. The kernels that reduce write one partial result a
chunk, and a second launch adds them, so a row's result is the same bits in any batch and on any run. Multiply-adds are
not fused, and sums spell out their order (`fold`, `ordered_sum`), so two kernels that write one expression compute one
number however their registers are laid out.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
MAX_CHUNKS = 128
LEVELS = tl.constexpr(BLOCK.bit_length() - 1)
FOLDED = tl.constexpr(4)
"""Neighbours that are added before blocks are: as many as a thread holds at least."""
SPREAD = tl.constexpr(8)
"""Numbers that a sum of a chunk may be left as: further, warps would have to wait for one another."""
TYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
TABLES = ("sample", "prev_sample", "noise", "prev_x0")
"""Latents that `rows` are picked from, in every operation."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@cache
def split(d: int) -> tuple[int, int, int]:
    """(chunks of a row, elements of a chunk, the power of two that holds the chunks); the last chunk may be short."""
    chunk = cdiv(cdiv(d, BLOCK), MAX_CHUNKS) * BLOCK
    num_chunks = cdiv(d, chunk)
    return num_chunks, chunk, 1 << (num_chunks - 1).bit_length()


def fills(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements of a row fill a piece of memory without gaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


is_dense = cache(fills)
"""`fills`, for what is not traced: shapes of a trace cannot be looked up, and a trace would see through the cache."""


@cache
def is_alike(shape: tuple[int, ...], strides: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whether two layouts of rows of a shape are one; an axis of length 1 may have any stride."""
    return all(size == 1 or a == b for size, a, b in zip(shape, strides, others, strict=True))


def arranged(names: str, *latents: Tensor, rows: Tensor | None = None) -> tuple[int, int, list[Tensor]]:
    """(n, d, the latents in one dense layout, that of the first): only those that have another are copied.

    Args:
        names: of the latents, for errors.
        rows: [n] int64, the rows that are meant of `TABLES`, which have the length of the first; None: all.

    Raises:
        ValueError: shapes or devices differ, a type is none of float32, bfloat16 and float16, or rows are empty.
    """
    first = latents[0]
    shape, device = first.shape, first.device
    row = shape[1:]
    n = shape[0] if rows is None else rows.shape[0]
    if rows is not None and (rows.dtype != torch.int64 or rows.dim() != 1):
        raise ValueError(f"rows must be int64 and [n], got {rows.dtype} and {list(rows.shape)}")
    of_call = shape if rows is None else torch.Size((n, *row))
    lengths = None if rows is None else [shape if name in TABLES else of_call for name in names.split()]
    last = None
    for number, x in enumerate(latents):
        if x is last:  # a stand-in for what is not given
            continue
        last = x
        if x.shape != (shape if lengths is None else lengths[number]):
            shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in zip(names.split(), latents, strict=True))
            wanted = "[n, ...]" if rows is None else f"[{n}, ...], or [{len(first)}, ...] where rows pick from them"
            raise ValueError(f"latents must share one shape {wanted}, not {shapes}")
        if x.device != device:
            devices = ", ".join(f"{name} on {x.device}" for name, x in zip(names.split(), latents, strict=True))
            raise ValueError(f"latents must be on one device, not {devices}; move them")
        if x.dtype not in TYPES:
            types = ", ".join(f"{name} {x.dtype}" for name, x in zip(names.split(), latents, strict=True))
            raise ValueError(f"kernels read float32, bfloat16 and float16, not {types}; convert, or use the reference")
    if len(shape) < 2:
        raise ValueError(f"latents must share one shape [n, ...], not {names.split()[0]} {list(shape)}")
    d = row.numel()
    if d == 0:
        raise ValueError(f"latents must have elements, got rows of shape {list(row)}")
    layout = first.stride()[1:]
    if not is_dense(row, layout):
        first = first.clone(memory_format=torch.contiguous_format)
        layout = first.stride()[1:]
    found = [first]
    for number, x in enumerate(latents[1:]):
        strides = x.stride()[1:]
        if x is latents[number]:  # the one before it, which need not be copied again
            found.append(found[-1])
        else:
            found.append(x if strides == layout or is_alike(row, layout, strides) else alike(x, first))
    return n, d, found


def alike(x: Tensor, like: Tensor) -> Tensor:
    """A copy of `x` whose rows are laid out as those of `like`."""
    return new_like(like, len(x), x.dtype).copy_(x)


def new_like(like: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Memory for `n` rows, touching one another, laid out as those of `like`."""
    d = like.shape[1:].numel()
    return like.new_empty_strided((n, *like.shape[1:]), (d, *like.stride()[1:]), dtype=dtype)


def new_rows(like: Tensor) -> Tensor:
    """Memory for as many rows as `like` has, of its type, in its layout if that is dense."""
    is_usable = fills(like.shape[1:], like.stride()[1:])
    return new_like(like, len(like), like.dtype) if is_usable else like.new_empty(like.shape)


def coefficients(name: str, coef: Tensor, n: int, width: int) -> Tensor:
    """`coef` [n, width] in float32, each row in one piece; rows may be one and the same, expanded."""
    if coef.shape != (n, width):
        raise ValueError(f"{name} must be [{n}, {width}], one {WORDS[width]} for each row, not {list(coef.shape)}")
    if coef.dtype != torch.float32 or coef.stride(1) != 1:
        coef = coef.to(torch.float32).contiguous()
    return coef


WORDS = {2: "(c0, c1)", 3: "(a, b, std)"}


def is_first(name: str, value: str, choices: tuple[str, str]) -> bool:
    """Whether the value is the first of two choices; a ValueError if it is neither."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return value == choices[0]


def vector(x: Tensor) -> Tensor:
    """One float32 number a row, contiguous: gradients arrive expanded."""
    if x.dtype != torch.float32:
        x = x.to(torch.float32)
    return x.contiguous()


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
def row_of(rows_ptr, row, HAS_ROWS: tl.constexpr):
    """The row of the tables that row `row` of the call means."""
    at = row
    if HAS_ROWS:
        at = tl.load(rows_ptr + row)
    return at


@triton.jit
def fold(values):
    """A block's numbers, FOLDED neighbours added: what is accumulated from block to block."""
    return _pairs_summed(values, values.shape[0] // FOLDED)


@triton.jit
def ordered_sum(values):
    """Sum of a power of two of numbers, neighbours first. Beyond two, `tl.sum` follows the layout of registers."""
    return tl.sum(_pairs_summed(values, 1))  # pyright: ignore -- of one number


@triton.jit
def spread(values):
    """A sum as SPREAD numbers: what `ordered_sum` would add up."""
    return _pairs_summed(values, SPREAD)


@triton.jit
def store_spread(part_ptr, values):
    """Store `spread(values)`."""
    tl.store(part_ptr + tl.arange(0, SPREAD), spread(values))


@triton.jit
def load_spread(partial_ptr, num_chunks, WIDTH: tl.constexpr):
    """The sum of each chunk of a row, of what `store_spread` left; 0 beyond the last chunk."""
    part = tl.arange(0, WIDTH * SPREAD)
    return _pairs_summed(tl.load(partial_ptr + part, mask=part < num_chunks * SPREAD, other=0.0), WIDTH)


@triton.jit
def _pairs_summed(values, length: tl.constexpr):
    """Neighbours added until `length` numbers are left.

    Sums of pairs, not `tl.split`: that moves each pair into one thread, and spilled kilobytes where rows are unaligned.
    """
    for _ in tl.static_range(LEVELS):
        if values.shape[0] > length:
            values = tl.sum(tl.reshape(values, [values.shape[0] // 2, 2]), axis=1)
    return values


@triton.jit
def load_parts(partial_ptr, part, num_chunks):
    """One of the numbers that each chunk of a row left; 0 beyond the last chunk."""
    return tl.load(partial_ptr + part, mask=part < num_chunks, other=0.0)


@triton.jit
def load_sum(partial_ptr, num_chunks, WIDTH: tl.constexpr):
    """The sum of the numbers that the chunks of a row left."""
    return ordered_sum(load_parts(partial_ptr, tl.arange(0, WIDTH), num_chunks))
