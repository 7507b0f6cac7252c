"""One iteration of reinforcement learning, and what makes it fast."""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.engine.engine import Engine as Engine

__getattr__ = lazy(
    __name__,
    {
        "Engine": "engine",
    },
)
