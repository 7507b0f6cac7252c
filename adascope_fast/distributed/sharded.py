"""A model that ranks hold together (PyTorch's FSDP2, `fully_shard`), and its tensors, whole and in parts.

Each rank has a part of every weight, of its gradient and of its moments; a block's weights are gathered when the block
is called, and let go after it. So every rank has to call the model as often as the others.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard
from weakref import WeakSet

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_SPREAD: WeakSet[nn.Module] = WeakSet()
"""The models that are spread in this process."""


def _is_spread(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether ranks hold it together. Importing what tells so takes a second: without it there is no such tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor as it is without ranks: put together, on every rank, where it is spread over them."""
    return tensor.full_tensor() if _is_spread(tensor) else tensor


def all_whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each of the tensors, whole; those that were spread are on the CPU, so that no device holds them all."""
    return {name: whole(value).cpu() if _is_spread(value) else value for name, value in tensors.items()}


def own(tensor: Tensor) -> Tensor:
    """This rank's part, in the same memory; the tensor itself where it is not spread."""
    return tensor.to_local() if _is_spread(tensor) else tensor


def like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor as `other` is: spread over the same ranks, or not."""
    if not _is_spread(other):
        return value
    from torch.distributed.tensor import distribute_tensor

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
    from torch.distributed.fsdp import FSDPModule, fully_shard

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
    if not _SPREAD:
        return
    from torch.distributed.fsdp import FSDPModule

    for model in _SPREAD:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def sum_gradients(model: nn.Module, *, now: bool) -> None:
    """Whether the next backward pass adds its gradients up over the ranks, with those that were kept before it."""
    if model in _SPREAD:
        spread: Any = model
        spread.set_requires_gradient_sync(now)
