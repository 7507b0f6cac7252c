"""What a run looked like: the report page and the picture grids."""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.reporting.calibration_page import write_calibration as write_calibration
    from adascope_fast.reporting.images import contact_sheet as contact_sheet
    from adascope_fast.reporting.images import save_grid as save_grid
    from adascope_fast.reporting.report import write_report as write_report

__getattr__ = lazy(
    __name__,
    {
        "contact_sheet": "images",
        "save_grid": "images",
        "write_calibration": "calibration_page",
        "write_report": "report",
    },
)
