"""Counting floating-point operations and live memory of a computation on the meta device, where nothing is computed.

Attention is taken as its fused kernels run it: no matrix of scores is kept, and the backward pass recomputes it.
Autocast is taken as a GPU does it, which the meta device does not.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:
    from adascope_fast.backbones import PipelineBackbone


@dataclass(frozen=True)
class Cost:
    """Operations forward and backward, and the most bytes alive at once beyond what the computation was given."""

    forward_flops: float
    backward_flops: float
    peak_bytes: float


def measure(compute: Callable[[], Tensor], *, backward: bool, autocast: torch.dtype | None = None) -> Cost:
    """The cost of `compute()`, on the meta device; with `backward`, also of differentiating its sum.

    Args:
        autocast: the type that matrix products are cast to, as in `torch.autocast` on a GPU.
    """
    meter = _Meter()
    casting = _Autocast(autocast) if autocast else nullcontext()
    with _fused_attention(meter, autocast), casting, meter, torch.set_grad_enabled(backward):
        result = compute()
        forward = meter.flops
        if backward:
            result.sum().backward()
    return Cost(forward, meter.flops - forward, meter.peak)


def denoiser_cost(
    backbone: "PipelineBackbone", rows: int, *, backward: bool, autocast: torch.dtype | None = None
) -> Cost:
    """Of one call with `rows` samples."""
    sample = torch.empty(rows, *backbone.latent_shape, device="meta")
    condition = {
        name: torch.empty(rows, *shape, dtype=backbone.dtype, device="meta")
        for name, shape in backbone.condition_shape().items()
    }
    timestep = torch.empty(rows, device="meta")
    return measure(lambda: backbone.predict(sample, timestep, condition), backward=backward, autocast=autocast)


class _Meter(TorchDispatchMode):
    """Operations, by PyTorch's own formulas; bytes of the storages made within it: those alive, and the most ever.

    PyTorch's FlopCounterMode follows modules too, and thereby keeps tensors that checkpointing would free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.alive = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **kwargs)
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = id(storage)
                if key not in before and key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self.alive += self._sizes[key]
                    weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.alive)
        return result

    def _free(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)


class _FusedAttention(torch.autograd.Function):
    """Shapes of a flash kernel: keeps query, key, value, output and one number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, meter: _Meter) -> Tensor:
        batch, heads, rows = query.shape[:-1]
        ctx.product, ctx.meter = 2 * batch * heads * rows * key.shape[-2] * query.shape[-1], meter
        meter.flops += 2 * ctx.product
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(batch, heads, rows, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.meter.flops += 5 * ctx.product
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


# The parts of torch.autocast's lists for CUDA that these models meet.
_CAST_DOWN = {functional.linear, functional.conv1d, functional.conv2d, functional.conv3d}
_CAST_DOWN |= {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm, torch.addmm, torch.baddbmm}
_CAST_UP = {functional.layer_norm, functional.group_norm, functional.softmax, torch.softmax, Tensor.softmax}
_CAST_UP |= {torch.exp, Tensor.exp, torch.pow, Tensor.pow, torch.sum, Tensor.sum}


class _Autocast(TorchFunctionMode):
    """Matrix products in `dtype`, normalisation in float32; casts of trained weights are kept until the end."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype, self._kept = dtype, {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtype = self._dtype if function in _CAST_DOWN else torch.float32 if function in _CAST_UP else None
        if dtype is not None:
            args, kwargs = tree_map(lambda leaf: self._cast(leaf, dtype), (args, kwargs))
        return function(*args, **kwargs)

    def _cast(self, leaf: Any, dtype: torch.dtype) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dtype == dtype:
            return leaf
        if not (leaf.is_leaf and leaf.requires_grad):
            return leaf.to(dtype)
        if id(leaf) not in self._kept:
            self._kept[id(leaf)] = leaf.to(dtype)
        return self._kept[id(leaf)]


@contextmanager
def _fused_attention(meter: _Meter, autocast: torch.dtype | None) -> Iterator[None]:
    """Within it scaled_dot_product_attention costs what a fused kernel costs."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        if autocast:
            query, key, value = (tensor.to(autocast) for tensor in (query, key, value))
        return _FusedAttention.apply(query, key, value, meter)  # type: ignore[return-value]

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
        yield
