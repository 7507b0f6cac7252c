"""Numbers of sets of images: those of the paper's Table 3, and others besides."""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.metrics.metric import Compared as Compared
    from adascope_fast.metrics.metric import MeanScore as MeanScore
    from adascope_fast.metrics.metric import Metric as Metric
    from adascope_fast.metrics.metric import Unavailable as Unavailable
    from adascope_fast.metrics.metric import interval as interval
    from adascope_fast.metrics.scores import ScoreOf as ScoreOf
    from adascope_fast.metrics.sources import Sources as Sources
    from adascope_fast.metrics.table import BESIDES as BESIDES
    from adascope_fast.metrics.table import ROWS as ROWS
    from adascope_fast.metrics.table import Row as Row
    from adascope_fast.metrics.table import row as row

__getattr__ = lazy(
    __name__,
    {
        "BESIDES": "table",
        "Compared": "metric",
        "MeanScore": "metric",
        "Metric": "metric",
        "ROWS": "table",
        "Row": "table",
        "ScoreOf": "scores",
        "Sources": "sources",
        "Unavailable": "metric",
        "interval": "metric",
        "row": "table",
    },
)
