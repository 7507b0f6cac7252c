"""A model that ranks hold together (PyTorch's FSDP2, `fully_shard`), and its tensors, whole and in parts.

Each rank has a part of every weight, of its gradient and of its moments; a block's weights are gathered when the block
is called, and let go after it. So every rank has to call the model as often as the others.
"""

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_SPREAD: WeakSet[nn.Module] = WeakSet()
"""The models that are spread in this process."""


def whole(tensor: Tensor) -> Tensor:
    """The tensor as it is without ranks: put together, on every rank, where it is spread over them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each of the tensors, whole; those that were spread are on the CPU, so that no device holds them all."""
    return {name: whole(value).cpu() if isinstance(value, DTensor) else value for name, value in tensors.items()}


def own(tensor: Tensor) -> Tensor:
    """This rank's part, in the same memory; the tensor itself where it is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor as `other` is: spread over the same ranks, or not."""
    if not isinstance(other, DTensor):
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)


@torch.no_grad()
def copy_into(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor the values of a whole one."""
    own(tensor).copy_(own(like(value, tensor)))


def shard(model: nn.Module, device: torch.device, *, reshards: bool = True, **options: Any) -> int:
    """Spread the weights of a model over all ranks, in place; the number of its parts that are gathered at once.

    These are the blocks that diffusers names as repeated, and what is left over. Gradients are summed over the ranks.

    Args:
        reshards: whether a block's weights are let go after each call, or when their gradients have been added up.
        options: of `fully_shard`.

    Raises:
        ValueError: the model names no blocks.
    """
    names = set(getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"a model that processes share is gathered block by block, got {type(model).__name__}, which names no "
            f"repeated blocks; give each process the whole model"
        )
    mesh = torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshards, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _SPREAD.add(model)
    return len(blocks) + 1


def weights_changed() -> None:
    """Let go what models have gathered of their weights, since other ones have taken their place.

    An update does so itself; what exchanges weights between two calls without a gradient has to say it.
    """
    for model in _SPREAD:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def sum_gradients(model: nn.Module, *, now: bool) -> None:
    """Whether the next backward pass adds its gradients up over the ranks, with those that were kept before it."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
