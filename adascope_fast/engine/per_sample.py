"""Gradients of each sample apart, without a backward pass for each: linear layers with a weight a sample.

Axes: `m` samples of a batch, `k` copies of each (guidance runs a sample with and without its prompt).

A linear layer's gradient is a product over all rows of a batch; here it is a batched product, over each sample's rows.
The forward pass and the gradient of the input stay what they are. Opacus does the same with hooks on every layer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from adascope_fast.backbones.float16_gradients import gradient_scale_of


class PerSampleLinear(nn.Linear):
    """`nn.Linear` whose gradients go to `own_weight` [m, out, in] and `own_bias` [m, out] while these are set.

    They only receive gradients: the output is made with the weight that all samples share, so it costs what it cost.
    """

    own_weight: Tensor | None = None
    own_bias: Tensor | None = None

    def forward(self, input: Float[Tensor, "km *rest in"]) -> Float[Tensor, "km *rest out"]:
        """Row i is sample i % m's."""
        weight, bias = self.own_weight, self.own_bias
        if weight is None and bias is None:
            return functional.linear(input, self.weight, self.bias)
        output = functional.linear(input, self.weight.detach(), None if self.bias is None else self.bias.detach())
        return cast(Tensor, _AddOwnGradients.apply(output, input, weight, bias))


class _AddOwnGradients(Function):
    """The output as it is; backward, the gradient of each sample's own weight and bias besides."""

    @staticmethod
    def forward(output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:  # pyright: ignore
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # pyright: ignore
        _, rows, weight, bias = inputs
        ctx.save_for_backward(rows if weight is not None else None)
        ctx.shapes = [None if own is None else own.shape for own in (weight, bias)]
        ctx.dtypes = [None if own is None else own.dtype for own in (weight, bias)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (rows,) = ctx.saved_tensors
        weight_shape, bias_shape = ctx.shapes
        of_weight = of_bias = None
        if weight_shape is not None:
            of_weight = _per_sample(grad, len(grad)).mT @ _per_sample(rows.to(grad.dtype), len(grad))
            of_weight = _fold(of_weight, weight_shape).to(ctx.dtypes[0])
        if bias_shape is not None:
            of_bias = _fold(_per_sample(grad, len(grad)).sum(1), bias_shape).to(ctx.dtypes[1])
        return grad, None, of_weight, of_bias


def _per_sample(values: Tensor, num_rows: int) -> Tensor:
    return values.reshape(num_rows, -1, values.shape[-1])


def _fold(values: Float[Tensor, "km *own"], shape: torch.Size) -> Float[Tensor, "m *own"]:
    """The sum over the copies of each sample."""
    copies, rest = divmod(len(values), shape[0])
    if rest:
        raise ValueError(
            f"a layer met {len(values)} rows for {shape[0]} samples, so it mixes samples; use train.update = 'replay'"
        )
    return values if copies == 1 else values.view(copies, *shape).sum(0)


class PerSampleGradients:
    """Sums, over any number of backward passes, the gradient of each of `num_samples` samples.

    Args:
        parameters: the trainable ones, all of them weights or biases of linear layers of `model`.
        num_samples: samples of a rollout; memory is that many times the parameters.

    Raises:
        ValueError: a parameter belongs to another kind of layer.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], num_samples: int) -> None:
        owners = _linear_layers(model, parameters)
        self._parameters, self._owners = list(parameters), [owners[id(parameter)] for parameter in parameters]
        for layer, _ in self._owners:
            layer.__class__ = PerSampleLinear  # the same weights, the same state_dict, another forward
        self._sums = [parameter.new_zeros(num_samples, *parameter.shape) for parameter in parameters]

    @contextmanager
    def leaves(self, num_samples: int) -> Iterator[list[Tensor]]:
        """Within it every sample has weights of its own, [m, ...] for each parameter, to differentiate by."""
        leaves = [p.detach().expand(num_samples, *p.shape).requires_grad_() for p in self._parameters]
        for (layer, name), leaf in zip(self._owners, leaves, strict=True):
            setattr(layer, name, leaf)
        for parameter, leaf in zip(self._parameters, leaves, strict=True):
            if (scale := gradient_scale_of(parameter)) != 1:
                leaf.register_hook(lambda gradient, scale=scale: gradient / scale)
        try:
            yield leaves
        finally:
            for layer, name in self._owners:
                setattr(layer, name, None)

    def add(self, rows: slice | Tensor, gradients: Sequence[Tensor]) -> None:
        """Add the gradients [m, ...] of the samples `rows`, given for each parameter."""
        if isinstance(rows, slice):
            torch._foreach_add_([total[rows] for total in self._sums], list(gradients))
            return
        for total, gradient in zip(self._sums, gradients, strict=True):
            total.index_add_(0, rows, gradient.to(total.dtype))

    def keep(self, samples: Tensor) -> None:
        """Forget the gradients of all but these samples."""
        self._sums = [total[samples] for total in self._sums]

    def weighted(self, weight: Float[Tensor, " b"]) -> list[Tensor]:
        """The sum over samples of weight * gradient, for each parameter."""
        return [torch.tensordot(weight.to(total.dtype), total, dims=1) for total in self._sums]


def _linear_layers(model: nn.Module, parameters: Sequence[nn.Parameter]) -> dict[int, tuple[nn.Module, str]]:
    """The layer of each parameter, and the attribute that replaces it."""
    wanted = {id(parameter) for parameter in parameters}
    found: dict[int, tuple[nn.Module, str]] = {}
    for path, layer in model.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) not in wanted:
                continue
            if type(layer) not in (nn.Linear, PerSampleLinear):
                raise ValueError(
                    f"gradients of each sample apart need adapters on linear layers, got {path}.{name} of a "
                    f"{type(layer).__name__}; use train.update = 'replay', or other model.lora_targets"
                )
            if id(parameter) in found:
                raise ValueError(f"{path}.{name} is shared between layers; use train.update = 'replay'")
            found[id(parameter)] = (layer, f"own_{name}")
    missing = len(wanted) - len(found)
    if missing:
        raise ValueError(f"{missing} trainable parameters are not in the denoiser; use train.update = 'replay'")
    return found
