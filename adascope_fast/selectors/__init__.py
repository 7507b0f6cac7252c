"""Which denoising steps are trained."""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.selectors.protocol import TimestepSelector as TimestepSelector
    from adascope_fast.selectors.simple import Complement as Complement
    from adascope_fast.selectors.simple import EveryStep as EveryStep
    from adascope_fast.selectors.simple import RandomFraction as RandomFraction
    from adascope_fast.selectors.simple import StaticRange as StaticRange
    from adascope_fast.selectors.simple import Threshold as Threshold
    from adascope_fast.selectors.windows import FastWindow as FastWindow
    from adascope_fast.selectors.windows import Window as Window

__getattr__ = lazy(
    __name__,
    {
        "Complement": "simple",
        "EveryStep": "simple",
        "FastWindow": "windows",
        "RandomFraction": "simple",
        "StaticRange": "simple",
        "Threshold": "simple",
        "TimestepSelector": "protocol",
        "Window": "windows",
    },
)
