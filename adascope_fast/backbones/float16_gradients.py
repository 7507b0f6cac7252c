"""Gradients through a float16 denoiser, or one under float16 autocast, most of which would be lost.

d log_prob / d output is about 1 / (elements of a latent), and an update divides it by its pairs besides, which is below
float16's smallest numbers (6e-8). So a gradient is multiplied where it enters the denoiser, and divided where it leaves
it, at the float32 parameters that are trained.
"""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function


def scale_for(num_elements: int) -> float:
    """The power of two nearest to the elements of a latent, which makes d log_prob / d output about 1."""
    return 2.0 ** round(math.log2(num_elements))


def divide_gradients(parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Have every gradient of the parameters divided by `scale`, which `gradient_scale_of` then tells."""
    for parameter in parameters:
        setattr(parameter, "gradient_scale", scale)  # noqa: B010 - pyright knows no such attribute
        parameter.register_hook(lambda gradient: gradient / scale)


def gradient_scale_of(parameter: nn.Parameter) -> float:
    """By what a tensor that stands in for the parameter must divide its gradient."""
    return getattr(parameter, "gradient_scale", 1.0)


def multiply_gradient(output: Tensor, scale: float) -> Tensor:
    """`output` as it is, its gradient times `scale`."""
    return _Multiply.apply(output, scale)  # type: ignore[return-value]


class _Multiply(Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.scale, None
