"""`adascope-fast report`: the page of a run, written again from its folder."""

import logging

from adascope_fast.commands.configuration import RunFolder, refuse_no_run

logger = logging.getLogger(__name__)


def report(run: RunFolder) -> None:
    """Write a run's report.html again; what is missing or cannot be read is named, and the page is made without it."""
    refuse_no_run(run)
    from adascope_fast.reporting.report import unread, write_report

    lacking, page = unread(run), write_report(run)
    if lacking:
        logger.warning("made without %s of %s, which cannot be read", ", ".join(lacking), run)
    print(page)
