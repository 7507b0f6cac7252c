"""Numbers of sets of images: those of the paper's Table 3."""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.metrics.metric import MeanScore as MeanScore
    from adascope_fast.metrics.metric import Metric as Metric
    from adascope_fast.metrics.metric import interval as interval

__getattr__ = lazy(__name__, {"MeanScore": "metric", "Metric": "metric", "interval": "metric"})
