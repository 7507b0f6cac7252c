"""How weights come into a model: into memory that is aligned alike, wherever they come from.

PyTorch's own memory starts at multiples of 64 bytes. A safetensors file is mapped, and its tensors start wherever they
lie in the file. Matrix products on a CPU (MKL's, for one) take paths that round otherwise by the address of a weight,
so without this equal weights of two files, or of a file and of memory, do not give equal bits.
"""

from collections.abc import Mapping
from itertools import chain

from torch import Tensor, nn

ALIGNMENT = 64  # bytes, of what PyTorch allocates on a CPU


def align(module: nn.Module) -> None:
    """Move each weight and buffer of `module` on the CPU that is not so aligned to memory of its own."""
    for tensor in chain(module.parameters(), module.buffers()):
        tensor.data = _aligned(tensor.data)


def aligned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, copied where they are not so aligned."""
    return {name: _aligned(tensor) for name, tensor in tensors.items()}


def _aligned(tensor: Tensor) -> Tensor:
    is_off = tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT != 0
    return tensor.clone() if is_off else tensor
