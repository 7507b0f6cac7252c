"""`report`: the page can be made from the folder alone."""

from pathlib import Path

from command_line import call


def test_report_is_written_again(run: Path):
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert call("report", run).out == f"{run / 'report.html'}\n"
    assert (run / "report.html").read_text() == before
