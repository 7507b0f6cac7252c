"""The outer loop, and what a run leaves behind."""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.training.monitoring.callbacks import Callback as Callback
    from adascope_fast.training.monitoring.callbacks import HeldOut as HeldOut
    from adascope_fast.training.trainer import Result as Result
    from adascope_fast.training.trainer import Trainer as Trainer

__getattr__ = lazy(
    __name__,
    {
        "Callback": "monitoring.callbacks",
        "HeldOut": "monitoring.callbacks",
        "Result": "trainer",
        "Trainer": "trainer",
    },
)
