"""AdaScope (arXiv 2605.15855): where RL pays along a trajectory, from how structure forms and reward saturates."""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.adascope.interval_rule import Interval as Interval
    from adascope_fast.adascope.interval_rule import IntervalRule as IntervalRule
    from adascope_fast.adascope.interval_rule import select_interval as select_interval
    from adascope_fast.adascope.selector import AdaScope as AdaScope
    from adascope_fast.adascope.sensing import Curves as Curves
    from adascope_fast.adascope.sensing import DecodedSensor as DecodedSensor
    from adascope_fast.adascope.sensing import LatentSensor as LatentSensor
    from adascope_fast.adascope.sensing import Sensor as Sensor
    from adascope_fast.adascope.sensing import curves_of_guesses as curves_of_guesses
    from adascope_fast.adascope.sensing import latent_curves as latent_curves
    from adascope_fast.theory import theoretical_correlation as theoretical_correlation

__getattr__ = lazy(
    __name__,
    {
        "AdaScope": "selector",
        "Curves": "sensing",
        "DecodedSensor": "sensing",
        "Interval": "interval_rule",
        "IntervalRule": "interval_rule",
        "LatentSensor": "sensing",
        "Sensor": "sensing",
        "curves_of_guesses": "sensing",
        "latent_curves": "sensing",
        "select_interval": "interval_rule",
        "theoretical_correlation": "selector",
    },
)
