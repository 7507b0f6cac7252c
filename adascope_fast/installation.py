"""What is installed beside this package and breaks it."""

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec


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
