"""The libraries that take seconds to import: told while it lasts, once there is nothing to refuse without them."""

from importlib import import_module

from adascope_fast.training.monitoring.progress import Progress


def import_libraries() -> None:
    """Import torch, diffusers and transformers, and say so on standard error."""
    with Progress().stage("loading torch and diffusers"):
        import_module("adascope_fast.backbones.loading")
