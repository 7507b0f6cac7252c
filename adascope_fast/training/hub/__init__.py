"""A finished run as a repository of the Hugging Face Hub: its weights, a model card, its settings and its pictures."""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.training.hub.upload import push as push
    from adascope_fast.training.hub.upload import write as write

__getattr__ = lazy(__name__, {"push": "upload", "write": "upload"})
