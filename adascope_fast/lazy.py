"""Public names that are imported when first used, so that settings are read without importing torch.

And what to say where an import fails because of what is installed beside this package.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any


def lazy(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` (PEP 562) that finds each public name in its submodule.

    Args:
        package: the module's own `__name__`.
        homes: the submodule of each name.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807 - it becomes the module's
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(import_module(f"{package}.{homes[name]}"), name)
        except (ImportError, RuntimeError):
            refuse_broken_torchvision()
            raise

    return __getattr__


def refuse_broken_torchvision() -> None:
    """ValueError where torchvision is installed and cannot be imported: then neither can diffusers' pipelines.

    To be asked once an import has failed: diffusers and transformers, which import it where they find it, do not say
    why theirs did.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except Exception as error:
        import torch

        raise ValueError(
            f"torchvision must fit torch {torch.__version__}, and {_release()} cannot be imported "
            f"({' '.join(str(error).split())}), nor can diffusers beside it; remove it, nothing here needs it, with "
            f"pip uninstall torchvision, or install the release and build that belong to this torch"
        ) from None


def _release() -> str:
    try:
        return f"torchvision {version('torchvision')}"
    except ModuleNotFoundError:
        return "the one found"
